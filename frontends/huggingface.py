"""A Hugging Face directory in, the graph IR of its step function out.

    imported = import_model(Path("model"))
    print(ir.print_module(imported.module))
    imported.checkpoint.read("model.norm.weight")

Reads config.json, the headers of the weight files and, of quantized ones, the zero points and orders of columns that
decide their formats; weights are read when the artifact is written.
Refuses, each with one diagnostic: schemes of quantization that are not known, unknown families and fields that change
the model, tensors that do not fit; see `frontends.checkpoint`, `frontends.config_reader`,
`frontends.tensor_match`. What is harmless but worth saying is in `ImportedModel.warnings`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frontends.checkpoint import Checkpoint, open_checkpoint
from frontends.checkpoint_files import companion
from frontends.config import ModelConfig, check_architecture, model_type, open_config
from frontends.config_reader import ConfigReader
from frontends.family import Family, find_family
from frontends.json_file import MEBIBYTE, file_size
from frontends.quantized import QuantizedCheckpoint, find_settings, find_settings_of, open_quantized
from frontends.step import StepBuilder, WeightSpec
from frontends.tensor_match import check_tensors
from ir.ops.builtin import ModuleOp

# Files beside the weights that an artifact carries along when they are there.
COMPANIONS = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class ImportedModel:
    """A model read from `directory`.

    `module` holds the function @step; a constant's symbol is the name of a tensor in `checkpoint`, or of a part of a
    quantized one (NAME.codes, ...); `weights` tells the shape and role of NAME. `files` are the companions that exist,
    by name. `license` is what the model card claims, or "".
    """

    name: str
    directory: Path
    module: ModuleOp
    config: ModelConfig
    checkpoint: Checkpoint
    weights: dict[str, WeightSpec]
    files: dict[str, Path]
    license: str
    warnings: tuple[str, ...]

    @property
    def num_parameters(self) -> int:
        """Numbers in all weights that the graph uses."""
        return sum(math.prod(spec.shape) for spec in self.weights.values())


def import_model(directory: Path | str) -> ImportedModel:
    """Builds the step function of the model in `directory` and checks that every tensor fits."""
    directory = Path(directory)
    fields = open_config(directory)
    quantization = find_settings(fields)
    family, config = read_model_config(fields)
    warnings = [*fields.warnings, *fields.unknown()]
    checkpoint = open_checkpoint(directory)
    try:
        quantization = quantization or find_settings_of(checkpoint.tensors, directory)
        if quantization is not None:
            checkpoint = open_quantized(quantization, checkpoint)
            warnings += checkpoint.warnings
        quantized = checkpoint.quantized if isinstance(checkpoint, QuantizedCheckpoint) else {}
        ignored = family.ignored
        if config.tied and _TABLE in checkpoint.tensors and _HEAD in checkpoint.tensors:
            config, note = _resolve_tie(config, checkpoint, fields.where)
            warnings += note
            ignored += (re.escape(_HEAD),)
        step = StepBuilder(config, checkpoint.tensors, quantized)
        module = family.build(step)
        spare = checkpoint.zero_biases(step.weights) if isinstance(checkpoint, QuantizedCheckpoint) else frozenset()
        tensors = {name: info for name, info in checkpoint.tensors.items() if name not in spare}
        check_tensors(step.weights, tensors, directory, ignored=ignored, stacks=step.stacks, quantized=quantized)
        files = {name: path for name in COMPANIONS if (path := companion(directory, name)) is not None}
        return ImportedModel(
            name=directory.resolve().name,
            directory=directory,
            module=module,
            config=config,
            checkpoint=checkpoint,
            weights=step.weights,
            files=files,
            license=_license(directory),
            warnings=tuple(warnings),
        )
    except BaseException:
        checkpoint.close()
        raise


def read_model_config(fields: ConfigReader) -> tuple[Family, ModelConfig]:
    """The family of a config.json and its validated sizes. Unknown fields are left for `fields.unknown()`."""
    name = model_type(fields)
    family = find_family(name, fields.where)
    check_architecture(fields, name, family.architectures)
    config = family.config(fields)
    fields.refuse_foreign()
    return family, config


def expected_weights(config: Mapping[str, Any], where: str = "config.json") -> dict[str, WeightSpec]:
    """The tensors that a checkpoint with this config.json must hold, by name, in order of use."""
    family, sizes = read_model_config(ConfigReader(config, where))
    step = StepBuilder(sizes)
    family.build(step)
    return step.weights


def _resolve_tie(config: ModelConfig, checkpoint: Checkpoint, where: str) -> tuple[ModelConfig, list[str]]:
    """A tied model that has a head of its own all the same: equal to the table it is a copy; else it is the head."""
    table, head = checkpoint.tensors[_TABLE], checkpoint.tensors[_HEAD]
    if (table.dtype, table.shape) == (head.dtype, head.shape) and _same_bytes(checkpoint, _TABLE, _HEAD):
        return config, []
    note = (
        f"{where}: 'tie_word_embeddings' is true, but {_HEAD} differs from {_TABLE}; "
        "both are used, as transformers does"
    )
    return replace(config, tied=False), [note]


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    info = checkpoint.tensors[first]
    rows = info.shape[0] if info.shape else 0
    per_read = max(1, 4 * MEBIBYTE * rows // max(1, info.nbytes))
    for start in range(0, rows, per_read):
        end = min(start + per_read, rows)
        one, other = checkpoint.read_rows(first, start, end), checkpoint.read_rows(second, start, end)
        if one.tobytes() != other.tobytes():
            return False
    return True


def _license(directory: Path) -> str:
    """The `license:` line in the front matter of the model card, or ""."""
    card = companion(directory, "README.md")
    if card is None or file_size(card) > MEBIBYTE:
        return ""
    lines = card.read_bytes()[:MEBIBYTE].decode("utf-8", "replace").splitlines()[:200]
    if not lines or lines[0].strip() != "---":
        return ""
    for line in lines[1:]:
        if line.strip() == "---":
            break
        if line.startswith("license:"):
            return line.removeprefix("license:").strip().strip("\"'")[:80]
    return ""
