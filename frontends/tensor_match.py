"""Compares the tensors a model needs with those a checkpoint has, and reports every difference at once.

Names that differ only in numbers (layers, experts) are reported as one line, so that a report stays readable for a
model of ten thousand tensors. Each missing name is shown with the nearest name that fits nowhere.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.safetensors_header import TensorInfo
from frontends.step import WeightSpec
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location

_MAX_LINES = 24  # of one kind
_MAX_COMPARED = 64  # names that are searched for a near one; nearness takes time quadratic in the length
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
_FUSED_EXPERTS = re.compile(r".*\.experts\.(gate_up_proj|down_proj)(\.weight)?")


def check_tensors(
    needed: Mapping[str, WeightSpec],
    tensors: Mapping[str, TensorInfo],
    where: Path,
    *,
    ignored: tuple[str, ...] = (),
    stacks: Mapping[str, str] | None = None,
    quantized: Collection[str] = (),
) -> None:
    """Raises one DiagnosticError that lists missing, unmapped and misshapen tensors, and dtypes that are not taken.

    `ignored` are regular expressions of names that may be left over. `stacks` maps a tensor to the one whose dtype it
    must share, because both become one constant. `quantized` are those whose dtype is a low-bit format.
    """
    skip = re.compile("|".join(f"(?:{p})" for p in ignored) or r"(?!)")
    missing = [n for n in needed if n not in tensors]
    unmapped = [n for n in tensors if n not in needed and not skip.fullmatch(n)]
    notes = _missing_notes(missing, unmapped) + _lines("unmapped", dict.fromkeys(unmapped, ""))
    counts = [_count(len(missing), "missing"), _count(len(unmapped), "of no known use")]
    for kind, faults in (
        ("wrong shape", _shapes(needed, tensors)),
        ("wrong dtype", _dtypes(needed, tensors, stacks, quantized)),
    ):
        notes += _lines(kind, faults)
        counts.append(_count(len(faults), f"of a {kind}"))
    if not notes:
        return
    if any(_FUSED_EXPERTS.fullmatch(n) for n in unmapped):
        notes.append(Diagnostic("hint", "the experts of a layer are fused in one tensor; load the model with"
                                " transformers and save_pretrained it, which writes one tensor an expert"))  # fmt: skip
    if missing == ["lm_head.weight"]:
        notes.append(Diagnostic("hint", "a model whose head is its embedding table has"
                                " 'tie_word_embeddings': true in config.json"))  # fmt: skip
    message = "the tensors do not fit the model that config.json describes: " + ", ".join(c for c in counts if c)
    raise DiagnosticError.of(Diagnostic("error", message, Location(file=str(where)), tuple(notes)))


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number else ""


def _shapes(needed: Mapping[str, WeightSpec], tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    return {
        name: f": {list(tensors[name].shape)}, expected {list(spec.shape)}"
        for name, spec in needed.items()
        if name in tensors and tensors[name].shape != spec.shape
    }


def _dtypes(
    needed: Mapping[str, WeightSpec],
    tensors: Mapping[str, TensorInfo],
    stacks: Mapping[str, str] | None,
    quantized: Collection[str],
) -> dict[str, str]:
    faults = {}
    for name in needed:
        if name not in tensors:
            continue
        dtype = tensors[name].dtype
        first = (stacks or {}).get(name, name)
        if dtype not in WEIGHT_FORMATS and name not in quantized:
            faults[name] = f": {dtype}, expected {' or '.join(WEIGHT_FORMATS)}"
        elif first in tensors and tensors[first].dtype != dtype:
            faults[name] = f": {dtype}, expected {tensors[first].dtype} like {first}"
    return faults


def _missing_notes(missing: list[str], unmapped: list[str]) -> list[Diagnostic]:
    near = list(dict.fromkeys(_pattern(n)[:200] for n in unmapped[: 50 * _MAX_COMPARED]))[:_MAX_COMPARED]

    def suggestion(name: str) -> str:
        found = difflib.get_close_matches(_pattern(name)[:200], near, n=1)
        return f"; did you mean {found[0]}?" if found else ""

    grouped = dict.fromkeys(_pattern(n) for n in missing)
    suggestions = {p: suggestion(p) for p in list(grouped)[:_MAX_LINES]}
    return _lines("missing", {n: suggestions.get(_pattern(n), "") for n in missing})


def _lines(kind: str, faults: Mapping[str, str]) -> list[Diagnostic]:
    """One note for all names of a pattern, saying how many they are."""
    groups: dict[str, list[str]] = {}
    for name in faults:
        groups.setdefault(_pattern(name), []).append(name)
    notes = []
    for pattern, names in list(groups.items())[:_MAX_LINES]:
        shown = names[0][:200] if len(names) == 1 else f"{pattern[:200]} ({len(names)} tensors)"
        notes.append(Diagnostic(kind, shown + faults[names[0]]))
    if len(groups) > _MAX_LINES:
        notes.append(Diagnostic(kind, f"and {len(groups) - _MAX_LINES} more kinds of names"))
    return notes


def _pattern(name: str) -> str:
    """The name with every number between dots replaced by `*`."""
    return _NUMBER.sub("*", name)
