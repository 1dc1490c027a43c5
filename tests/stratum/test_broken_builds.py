"""Builds that end in the middle, by a full disk or a kill: nothing that loads is left, and the next one cleans up."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runtime.artifact import open_artifact
from runtime.errors import RuntimeDiagnostic
from stratum.cli import main

ROOT = Path(__file__).parent.parent.parent


def python(code: str, *arguments: object, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """A child process; `limit` is the largest file it may write."""

    def prepare() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        preexec_fn=prepare,
    )


def test_disk_full(llama_directory: Path, tmp_path: Path) -> None:
    """A limit on file sizes fails like a full disk, in the middle of the weights."""
    code = "import sys; from stratum.cli import main; sys.exit(main(sys.argv[1:]))"
    result = python(code, "build", llama_directory, "-o", tmp_path / "out", "-q", limit=100_000)
    assert result.returncode == 2, result.stderr
    assert "not enough room" in result.stderr and str(tmp_path / "out") in result.stderr
    assert "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


KILLED = """
import os, signal, sys
import codegen.build, codegen.lower_to_tile, codegen.object_cache, frontends.huggingface, stratum.opt_driver
import stratum

model, stages = sys.argv[1], sys.argv[2:]
while stages:  # each build in a child of its own, which has all modules already
    (out, stage, part), stages = stages[:3], stages[3:]
    child = os.fork()
    if not child:
        break
    print(os.waitpid(child, 0)[1], flush=True)
else:
    sys.exit()

def progress(name, done, total, unit=""):
    if name == stage and total and done / total >= float(part):
        os.kill(os.getpid(), signal.SIGKILL)
    if name == stage and float(part) == 0:
        os.kill(os.getpid(), signal.SIGKILL)

def dying(call):
    def wrapped(*a, **k):
        if stage == "before " + call.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        result = call(*a, **k)
        if stage == "after " + call.__name__:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return wrapped

if stage.split()[-1] in ("rename", "fsync"):
    setattr(os, stage.split()[-1], dying(getattr(os, stage.split()[-1])))
stratum.build(model, out, progress=progress)
"""
KILLS = [
    ("import", 0), ("passes", 0), ("code", 0), ("weights", 0), ("weights", 0.5), ("weights", 1),
    ("before fsync", 1), ("after fsync", 1), ("before rename", 1), ("after rename", 1),
]  # fmt: skip


@pytest.fixture(scope="module")
def killed(llama_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each of KILLS, by number, in which a build was killed."""
    root = tmp_path_factory.mktemp("killed")
    arguments: list[object] = []
    for number, (stage, part) in enumerate(KILLS):
        (root / str(number)).mkdir()
        arguments += [root / str(number) / "out", stage, part]
    result = python(KILLED, llama_directory, *arguments)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(int(signal.SIGKILL))] * len(KILLS), result.stderr
    return root


@pytest.mark.parametrize("number", range(len(KILLS)), ids=[f"{stage} {part}" for stage, part in KILLS])
def test_killed_build_leaves_nothing_that_loads(number: int, killed: Path, llama_directory: Path) -> None:
    stage, folder = KILLS[number][0], killed / str(number)
    out = folder / "out"
    assert not out.exists()
    for leftover in folder.iterdir():
        assert leftover.name.startswith(".out.partial-")
        if stage == "after rename":  # of the manifest: whole from here on, but still under a hidden name
            open_artifact(leftover, verify=True)
        else:
            with pytest.raises(RuntimeDiagnostic):
                open_artifact(leftover)
    assert main(["build", str(llama_directory), "-o", str(out), "-q"]) == 0
    assert [p.name for p in folder.iterdir()] == ["out"]  # the next build cleans up
    open_artifact(out, verify=True)


def test_killed_rebuild_keeps_the_old_artifact(llama_directory: Path, llama_artifact: Path, tmp_path: Path) -> None:
    artifact = shutil.copytree(llama_artifact, tmp_path / "artifact")
    before = (artifact / "manifest.json").read_bytes()
    result = python(KILLED, llama_directory, artifact, "weights", 0.5)
    assert result.stdout.split() == [str(int(signal.SIGKILL))], result.stderr
    assert (artifact / "manifest.json").read_bytes() == before
    open_artifact(artifact, verify=True)
