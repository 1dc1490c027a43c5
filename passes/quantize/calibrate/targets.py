"""Which tensors of a checkpoint are rounded, and to what: a recipe, asked about every weight that a product has.

    targets = find_targets(imported, recipe)
    targets.formats["model.layers.0.mlp.up_proj.weight"]     # q4_sym<group=128, scale=f16>
    targets.notes                                             # what is not as the recipe says, and why

What a recipe says of activations and of the KV cache concerns a build, not a checkpoint. Groups that do not fill the
rows of a weight give way to smaller ones, as in a build. Refuses quantized checkpoints, formats that the layout of the
checkpoint cannot hold, rotations and outlier columns, and recipes that leave nothing to round.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from frontends.huggingface import ImportedModel
from frontends.quantized import QuantizedCheckpoint
from ir.diagnostics import DiagnosticError
from ir.formats import GroupedIntFormat, PlainFormat
from ir.ops.tensor import EmbedOp
from passes.analysis.constants import constant_leaves
from passes.quantize.calibrate.executor import is_streamed, weight_names
from passes.quantize.calibrate.gptq import check_format
from passes.quantize.quantize import SMALLER_GROUPS
from passes.quantize.recipe import Recipe
from passes.quantize.roles import weight_parts


@dataclass(frozen=True)
class Targets:
    """`formats` and `roundings` of the tensors that are rounded, in the order of a step; `linears` are the weights of
    all products; `roles` those of the frontend.
    """

    formats: dict[str, GroupedIntFormat]
    roundings: dict[str, str]
    linears: tuple[str, ...]
    roles: dict[str, str]
    notes: tuple[str, ...]


def find_targets(imported: ImportedModel, recipe: Recipe) -> Targets:
    """What a recipe asks for; see the module docstring."""
    where = str(imported.directory)
    if isinstance(imported.checkpoint, QuantizedCheckpoint):
        raise DiagnosticError(
            "the checkpoint is quantized already",
            where=where,
            expected="weights in F32, F16 or BF16",
            hint="use the checkpoint that this one was quantized from",
        )
    roles = {name: spec.role for name, spec in imported.weights.items()}
    tables, parts = _products(imported, roles)
    formats: dict[str, GroupedIntFormat] = {}
    roundings: dict[str, str] = {}
    notes: dict[str, int] = {}
    for name, role in parts.items():
        choice = recipe.choice(name, role)
        if choice.format is None or isinstance(choice.format, str | PlainFormat):
            continue
        if name in tables:
            note = f"{name} is the table of the embedding too (tied) and keeps its floats; a build can round the head"
        elif not name.endswith(".weight"):
            note = "tensors whose names do not end in .weight keep their floats"
        else:
            _check_choice(recipe, name, choice.rotate or 0, choice.outliers or 0, choice.format)
            assert isinstance(choice.format, GroupedIntFormat)
            k = imported.weights[name].shape[-1]
            format = _fitting(choice.format, k)
            if format is not None:
                formats[name], roundings[name] = format, choice.rounding or "mse"
            found = format or "floats"
            note = (
                f"rows of {k} are not whole groups of {choice.format}: {found} instead"
                if found != choice.format
                else ""
            )
        if note:
            notes[note] = notes.get(note, 0) + 1
    _share_in_stacks(imported, formats, notes)
    if not formats:
        raise DiagnosticError(
            f"the recipe {recipe.name!r} rounds no weight of the model", where=where, expected="one that does"
        )
    told = tuple(f"{note} ({count} tensors)" if count > 1 else note for note, count in notes.items())
    return Targets(formats, roundings, tuple(parts), roles, told)


def _products(imported: ImportedModel, roles: dict[str, str]) -> tuple[set[str], dict[str, str]]:
    """(tensors that rows are looked up in, role of every weight of a product)."""
    tables: set[str] = set()
    parts: dict[str, str] = {}
    for op in imported.module.function("step").block.ops:
        if isinstance(op, EmbedOp):
            tables.update(leaf.attributes["symbol"].name for leaf in constant_leaves(op.table))
        elif is_streamed(op):
            parts.update(weight_parts(op, roles))
    return tables, parts


def _share_in_stacks(imported: ImportedModel, formats: dict[str, GroupedIntFormat], notes: dict[str, int]) -> None:
    """One format for all experts of a product, the most precise that is asked for; floats when one keeps its floats."""
    for op in imported.module.function("step").block.ops:
        names: tuple[str, ...] = weight_names(op) if is_streamed(op) else ()
        found = [formats.get(name) for name in names]
        if len(set(found)) < 2:
            continue
        widest = max(
            (f for f in found if f is not None), key=lambda f: (f.bits, f.nbytes(imported.weights[names[0]].shape))
        )
        shared = None if None in found else widest
        for name in names:
            formats.pop(name, None)
            if shared is not None:
                formats[name] = shared
        note = f"experts of one product share a format, the most precise asked for: {shared or 'floats'}"
        notes[note] = notes.get(note, 0) + len(names)


def _check_choice(recipe: Recipe, name: str, rotate: int, outliers: int, format: object) -> None:
    if rotate or outliers:
        raise DiagnosticError(
            f"the recipe {recipe.name!r} wants {'a rotation' if rotate else 'outlier columns'} for {name}",
            expected="a recipe of formats alone: a checkpoint has no place for anything else",
            hint="such recipes are for 'compile-model build --recipe'",
        )
    try:
        check_format(format)
    except DiagnosticError as error:
        first = error.diagnostics[0]
        raise DiagnosticError(
            f"{first.message}, which the recipe {recipe.name!r} wants for {name}",
            expected="integers of 2 to 8 bits with one level of scales: w4a8-g128, w4a16-g32, w3, w8a8, ...",
            hint="other formats are made from the floats: 'compile-model build --recipe'",
        ) from None


def _fitting(format: GroupedIntFormat, k: int) -> GroupedIntFormat | None:
    """The format, with smaller groups where its own do not fill rows of k elements; None when none do."""
    for group in (format.group, *(g for g in SMALLER_GROUPS if g < format.group)):
        if k % (group or k) == 0:
            return replace(format, group=group)
    return None
