"""Shapes by name, config.json or checkpoint directory; headers only, never a weight.

    load_shape("Llama-3.1-8B")          # or meta-llama/Llama-3.1-8B: the built-in list, `shape_names()`
    load_shape("model/config.json")     # or model/: also the headers of its safetensors files, when they are there

A built-in entry is a file `frontends/shapes/<organisation>--<model>.json` with the fields of that model's config.json
that say how large it is. Refuses unknown names (with near ones), and what `frontends.shape_families` refuses; headers
that hold other parameters than the config says become a warning of the shape.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from frontends.checkpoint_files import INDEX_FILE, SINGLE_FILE, check_directory, companion, find_weight_files
from frontends.json_file import read_json_object
from frontends.model_shape import ModelShape
from frontends.safetensors_header import TensorInfo, read_header
from frontends.shape_families import shape_of
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean

_DIRECTORY = Path(__file__).with_name("shapes")
_STORED = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def shape_names() -> list[str]:
    """The built-in list, as the hub names these models, sorted."""
    return sorted((path.stem.replace("--", "/", 1) for path in _DIRECTORY.glob("*.json")), key=str.lower)


def load_shape(model: str | Path) -> ModelShape:
    """The shape of a built-in name, of a config.json or of a checkpoint directory.

    A path that exists wins over a name. DiagnosticError for an unknown name and for faulty files.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return _of_directory(path)
    if path.is_file() or path.suffix == ".json":
        return shape_of(read_json_object(path), str(path), path.parent.name if path.stem == "config" else path.stem)
    return _built_in(str(model))


def _built_in(name: str) -> ModelShape:
    names = shape_names()
    wanted = name.lower()
    fitting = [n for n in names if wanted in (n.lower(), n.lower().rpartition("/")[2])]
    if len(fitting) == 1:
        path = _DIRECTORY / f"{fitting[0].replace('/', '--', 1)}.json"
        return shape_of(read_json_object(path), str(path), fitting[0])
    short = [n.rpartition("/")[2] for n in names]
    raise DiagnosticError(
        f"no file, directory or built-in model is named {name!r}{did_you_mean(name, [*names, *short])}",
        expected="a directory with config.json, a config.json, or one of " + ", ".join(short),
    )


def _of_directory(directory: Path) -> ModelShape:
    path = companion(check_directory(directory), "config.json")
    if path is None:
        raise DiagnosticError(
            "has no config.json", where=str(directory), expected="a Hugging Face model directory with config.json"
        )
    shape = shape_of(read_json_object(path), str(path), directory.resolve().name)
    if not any((directory / name).exists() for name in (SINGLE_FILE, INDEX_FILE)):
        return shape
    tensors: dict[str, TensorInfo] = {}
    for file in find_weight_files(directory).files:
        tensors.update(read_header(file)[0])
    return compared(shape, tensors)


def compared(shape: ModelShape, tensors: Mapping[str, TensorInfo]) -> ModelShape:
    """`shape` with the dtype that most elements are stored in, and a warning when the files hold other parameters."""
    elements: dict[str, int] = {}
    for info in tensors.values():
        elements[info.dtype] = elements.get(info.dtype, 0) + math.prod(info.shape)
    floats = {_STORED[name]: count for name, count in elements.items() if name in _STORED}
    if sum(floats.values()) < sum(elements.values()):
        return shape  # quantized files: their elements are codes
    dtype = max(floats, key=lambda name: floats[name], default=shape.dtype)
    found, expected = sum(floats.values()), shape.parameters()
    if abs(found - expected) <= 1e-4 * expected:
        return replace(shape, dtype=dtype)
    warning = f"the files hold {found} parameters, config.json describes {expected}; plans follow config.json"
    return replace(shape, dtype=dtype, warnings=(*shape.warnings, warning))
