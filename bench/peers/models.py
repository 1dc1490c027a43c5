"""What is measured, and where it is kept: random checkpoints, the peers' files made of them, and our artifacts.

    models = Models(work, python, say)
    models.checkpoint("llama-1.1b")              # Hugging Face directory, bf16
    models.gguf("llama-1.1b", "q4_0")            # by llama.cpp's own quantization
    models.openvino("llama-1.1b", group=128)     # by optimum-intel and nncf
    models.artifact("llama-1.1b", "w4a8-g32")    # by `compile-model build`; made again when the sources changed

Each is made once, under a name that is there only when it is whole.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.measure import ROOT, cli

CONTEXT = 4096  # decoding at a depth of 2048 must fit
# A random router chooses almost the same experts for every token: large embeddings let the token decide.
OPTIONS: dict[str, list[str]] = {
    "llama-1.1b": ["--set", f"max_position_embeddings={CONTEXT}"],
    "olmoe-1b-7b": ["--embedding-scale", "400"],
    "olmoe-1b-7b-session": ["--embedding-scale", "400", "--router", "session"],
}
VARIANTS = {"olmoe-1b-7b-session": "olmoe-1b-7b"}  # the same but for embedding and routers
COMPILER = ("ir", "frontends", "hw_targets", "passes", "codegen", "runtime", "stratum")


class Models:
    """The files under `work`. `keep_builds`: our artifacts stay though the sources have changed since."""

    def __init__(
        self, work: Path, python: Path | None, say: Callable[[str], None], *, keep_builds: bool = False
    ) -> None:
        self.work, self._python, self._say, self._keep = work, python, say, keep_builds
        self._sources = ""

    def checkpoint(self, preset: str) -> Path:
        """The Hugging Face directory of random weights."""
        path = self.work / preset
        if not path.exists():
            self._make(
                path,
                [
                    sys.executable, "examples/make_model.py", VARIANTS.get(preset, preset), "{}", "--dtype", "bf16",
                    *OPTIONS.get(preset, []),
                ],
            )  # fmt: skip
        return path

    def drop_variant(self, preset: str) -> None:
        """Removes the checkpoint of a variant, which is large and made again in minutes."""
        if preset in VARIANTS:
            shutil.rmtree(self.work / preset, ignore_errors=True)

    def gguf(self, preset: str, kind: str) -> Path:
        """A GGUF file, quantized by llama.cpp ("bf16": not at all)."""
        path = self.work / f"{preset}-{kind}.gguf"
        if not path.exists():
            base = [str(self.gguf(VARIANTS[preset], kind))] if preset in VARIANTS else []
            how = base or ([] if kind == "bf16" else [kind])
            directory = self.checkpoint(preset)
            self._make(path, [str(self._python), "-m", "bench.peers.write_gguf", str(directory), "{}", *how])
        return path

    def openvino(self, preset: str, group: int) -> Path:
        """An OpenVINO directory: symmetric int4 in groups, head and embedding int8."""
        path = self.work / f"{preset}-openvino-g{group}"
        if not path.exists():
            self._make(path, [
                str(self._python), "-m", "optimum.commands.optimum_cli", "export", "openvino",
                "--model", str(self.checkpoint(preset)), "--task", "text-generation-with-past",
                "--weight-format", "int4", "--sym", "--ratio", "1.0", "--group-size", str(group), "{}",
            ])  # fmt: skip
        return path

    def artifact(self, preset: str, recipe: str) -> Path:
        """Our build of the checkpoint by a recipe ("bf16": without one). Raises BuildError in the builder's words."""
        path = self.work / f"{preset}-{recipe.replace(',', '+')}.stratum"
        stamp = path.with_suffix(".sources")
        if path.exists() and stamp.exists() and (self._keep or stamp.read_text() == self.sources()):
            return path
        self._say(f"building {path.name}")
        arguments = ["build", str(self.checkpoint(preset)), "-o", str(path), "--quiet"]
        arguments += [] if recipe == "bf16" else ["--recipe", recipe]
        done = subprocess.run(cli(*arguments), cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            words = [line for line in done.stderr.splitlines() if line.strip()]
            raise BuildError(f"{preset} {recipe}: {words[0] if words else f'ended with {done.returncode}'}")
        stamp.write_text(self.sources())
        return path

    def sources(self) -> str:
        """A hash of the compiler's sources: an artifact of other sources is none of this compiler's."""
        if not self._sources:
            digest = hashlib.sha256()
            for floor in COMPILER:
                for path in sorted((ROOT / floor).rglob("*")):
                    if path.suffix in (".py", ".toml", ".lark"):
                        digest.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
            self._sources = digest.hexdigest()
        return self._sources

    def _make(self, path: Path, command: Sequence[str]) -> None:
        """Runs `command` with the name {} of a partial result, and renames that."""
        self._say(f"making {path.name}")
        partial = path.with_name(f".partial-{path.name}")
        if partial.is_dir():
            shutil.rmtree(partial)
        partial.unlink(missing_ok=True)
        words = [str(partial) if word == "{}" else word for word in command]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"{' '.join(words)}\nended with {done.returncode}:\n{done.stderr[-4000:]}")
        partial.rename(path)


class BuildError(Exception):
    """Our own build failed: the row is reported as such, and the others go on."""
