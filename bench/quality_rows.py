"""The builds that bench/quality.py compares: how each is made, and how many bits its weights take.

A row is a build of one model. Rows of rounded weights are float builds: every weight is rounded to a format, turned
back into float32 and written as a checkpoint of its own, so that they say what the numbers lose, whoever multiplies
them. Rows of recipes are what users build. All are made by `compile-model`, each in a process of its own.
"""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench.measure import ROOT, cli
from frontends.huggingface import import_model
from ir.diagnostics import DiagnosticError
from ir.formats import PlainFormat
from ir.parse_value import parse_format
from passes.quantize.recipe import Recipe, load_recipe
from passes.quantize.rounding import quantize_rows

Rounding = Callable[[str, str, np.ndarray], "Rounded | None"]  # name, role, values; None leaves the tensor as it is
_RECIPE_ROLES = {"moe.gate": "experts.gate", "moe.up": "experts.up", "moe.down": "experts.down"}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


class MissingError(Exception):
    """A row that cannot be made by this version; the message says why."""


@dataclass(frozen=True)
class Rounded:
    """A tensor after rounding, and the bytes that its format takes."""

    values: np.ndarray
    nbytes: int


@dataclass(frozen=True)
class Row:
    """`make` gets an empty folder and gives (artifact, bits per weight of what was rounded, None if nothing was)."""

    key: str
    section: str
    name: str
    make: Callable[[Path], tuple[Path, float | None]]


def compile_model(*arguments: str) -> None:
    """Runs a verb of `compile-model`. Raises MissingError with its words when it fails."""
    done = subprocess.run(cli(*arguments), capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode != 0:
        faults = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[-1:]
        raise MissingError(faults[0][:200] if faults else f"ended with {done.returncode}")


def built(model: Path, out: Path, *options: str) -> Path:
    """`compile-model build` with these options."""
    compile_model("build", str(model), "-o", str(out), "-q", *options)
    return out


# -- weights alone ---------------------------------------------------------------------------------------------------


def rounded_checkpoint(model: Path, out: Path, rounding: Rounding) -> float:
    """Writes `model` with its weights rounded, in f32; gives the bits per weight of the tensors that were.

    A table that is also the head is asked for as the head: when that is rounded, the copy gets a head of its own.
    """
    from safetensors.numpy import save_file

    out.mkdir(parents=True)
    imported = import_model(model)
    tensors: dict[str, np.ndarray] = {}
    count = nbytes = 0
    with imported.checkpoint as checkpoint:
        for name, spec in imported.weights.items():
            values = tensors[name] = checkpoint.read(name).astype(np.float32)
            asked = [(name, _RECIPE_ROLES.get(spec.role, spec.role))]
            asked += [(HEAD, "head")] if spec.role == "embedding" and HEAD not in imported.weights else []
            for target, role in asked:
                found = rounding(name, role, values)
                if found is not None:
                    tensors[target] = found.values.reshape(values.shape).astype(np.float32)
                    count, nbytes = count + values.size, nbytes + found.nbytes
    for path in imported.files.values():
        shutil.copy(path, out / path.name)
    config = json.loads((model / "config.json").read_text())
    config |= {"torch_dtype": "float32", "tie_word_embeddings": config["tie_word_embeddings"] and HEAD not in tensors}
    (out / "config.json").write_text(json.dumps(config))
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return 8 * nbytes / count if count else 0.0


def is_layer(role: str) -> bool:
    """Whether a role is one of the layers' products: attention, MLP and experts."""
    return role.partition(".")[0] in ("attention", "mlp", "experts")


def with_format(text: str, method: str, *, head: bool) -> Rounding:
    """Every layer's weights (and the head's) in one format of ours. Raises MissingError for formats there are not."""
    try:
        format: Any = parse_format(text)
    except DiagnosticError as error:
        raise MissingError(error.diagnostics[0].message) from error

    def rounding(name: str, role: str, values: np.ndarray) -> Rounded | None:
        return packed(format, method, values) if is_layer(role) or (head and role == "head") else None

    return rounding


def packed(format: Any, method: str, values: np.ndarray) -> Rounded:
    """`values` in a format of ours."""
    try:
        found = quantize_rows(format, values, method)
    except DiagnosticError as error:  # groups that do not divide the rows of this model
        raise MissingError(error.diagnostics[0].message) from error
    return Rounded(format.unpack(found), format.nbytes(values.shape))


def with_gguf(kind: str, *, head: bool) -> Rounding:
    """The same weights in a format of llama.cpp, by its own Python package."""
    from gguf import GGMLQuantizationType, quants

    type = GGMLQuantizationType[kind]

    def rounding(name: str, role: str, values: np.ndarray) -> Rounded | None:
        if not (is_layer(role) or (head and role == "head")):
            return None
        data = quants.quantize(values, type)
        return Rounded(quants.dequantize(data, type), data.nbytes)

    return rounding


def with_recipe(recipe: Recipe) -> Rounding:
    """What a recipe stores, without what it does to activations. Raises MissingError for what is more than rounding."""

    def rounding(name: str, role: str, values: np.ndarray) -> Rounded | None:
        choice = recipe.choice(name, role)
        if choice.rotate or choice.outliers:
            raise MissingError("rotation and outliers are more than a rounding of weights")
        if choice.format is None or isinstance(choice.format, str) or role in ("norm", "bias", "moe.router"):
            return None
        if isinstance(choice.format, PlainFormat):
            return Rounded(choice.format.pack(values).astype(np.float32), choice.format.nbytes(values.shape))
        return packed(choice.format, choice.rounding or "mse", values)

    return rounding


# -- rows ------------------------------------------------------------------------------------------------------------


def rounded_row(model: Path, key: str, section: str, name: str, rounding: Callable[[], Rounding]) -> Row:
    """A float build of rounded weights."""

    def make(folder: Path) -> tuple[Path, float | None]:
        bits = rounded_checkpoint(model, folder / model.name, rounding())
        return built(folder / model.name, folder / "built", "--dtype", "f32"), bits

    return Row(key, section, name, make)


def recipe_row(model: Path, key: str, section: str, name: str, recipe: str, dtype: str = "bf16") -> Row:
    """A build with a recipe: names and paths by commas, or the text of a TOML file."""

    def make(folder: Path) -> tuple[Path, float | None]:
        asked = recipe
        if "\n" in recipe:
            asked = str(folder / "recipe.toml")
            Path(asked).write_text(recipe)
        bits = recipe_bits(model, load_recipe(asked)) if "[kv]" not in recipe and not recipe.startswith("kv") else None
        return built(model, folder / "built", "--recipe", asked, "--dtype", dtype), bits

    return Row(key, section, name, make)


def recipe_bits(model: Path, recipe: Recipe) -> float:
    """Bits per weight, scales included, of what a recipe gives a low-bit format; a tied table counts as the head."""
    imported = import_model(model)
    count = nbytes = 0
    with imported.checkpoint:
        for name, spec in imported.weights.items():
            role = _RECIPE_ROLES.get(spec.role, spec.role)
            tied = spec.role == "embedding" and HEAD not in imported.weights
            format = recipe.choice(*((HEAD, "head") if tied else (name, role))).format
            if len(spec.shape) == 2 and format is not None and not isinstance(format, (str, PlainFormat)):
                count, nbytes = count + math.prod(spec.shape), nbytes + format.nbytes(spec.shape)
    return 8 * nbytes / count if count else 0.0


def shipped(name: str) -> Recipe:
    """A recipe that comes with the compiler. Raises MissingError when it does not."""
    try:
        return load_recipe(name)
    except DiagnosticError as error:
        raise MissingError(error.diagnostics[0].message) from error


def calibrated_row(model: Path, key: str, section: str, name: str, method: str, recipe: str) -> Row:
    """The checkpoint that `compile-model quantize` writes, built with float activations."""

    def make(folder: Path) -> tuple[Path, float | None]:
        text = folder / "calibration.txt"
        text.write_text(calibration_text(model), encoding="utf-8")
        out = folder / model.name
        compile_model(
            *(
                "quantize",
                str(model),
                "-o",
                str(out),
                "--method",
                method,
                "--recipe",
                recipe,
                "--calibration",
                str(text),
            )
        )
        return built(out, folder / "built", "--dtype", "f32"), recipe_bits(model, load_recipe(recipe))

    return Row(key, section, name, make)


def calibration_text(model: Path) -> str:
    """About 200 kB of the documents that tiny-moe was trained on; none of the held-out ones."""
    from examples.corpus import END_OF_TEXT, is_held_out, standard_library_documents

    texts = [text for name, text in standard_library_documents() if not is_held_out(name)]
    return "".join(END_OF_TEXT + text[:6000] for text in texts[:: max(1, len(texts) // 40)])


def solver_rows(model: Path, key: str, section: str, name: str, bits: float) -> list[Row]:
    """What `--bits-per-weight` chooses: the weights of its recipe alone, and the build."""

    def solve(folder: Path) -> tuple[Path, Path]:
        saved, out = folder / "recipe.toml", folder / "solved"
        built(model, out, "--bits-per-weight", str(bits), "--save-recipe", str(saved), "--dtype", "f32")
        return out, saved

    def alone(folder: Path) -> tuple[Path, float | None]:
        _, saved = solve(folder)
        return rounded_row(model, key, section, name, lambda: with_recipe(load_recipe(str(saved)))).make(folder)

    def build(folder: Path) -> tuple[Path, float | None]:
        out, saved = solve(folder)
        return out, recipe_bits(model, load_recipe(str(saved)))

    return [
        Row(key, section, f"{name}: weights", alone),
        Row(f"build-{key}", section, f"{name}: build, rest f32", build),
    ]
