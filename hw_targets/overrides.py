"""Overrides on the command line: `name{key=value, key=value}`.

dram=8GiB                    capacity of the tier `dram`
dram.read=40GB/s             any field of a tier, unit, link or storage, as the file names them
cpu.cores=4   cpu.peak.bf16=0.2TFLOP/s
features=+avx512bf16+gfni    adds features (with what they imply)
without=avx512f+fma          removes features (with what implies them) and forbids them to LLVM
cpu=znver4   triple=...      LLVM's names
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from typing import Any

from hw_targets import cpu_features
from hw_targets.quantities import parse_quantity
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError

# Name in the file -> (attribute, kind of quantity). Peaks are handled apart.
_FIELDS: dict[str, dict[str, tuple[str, str]]] = {
    "units": {"cores": ("cores", "count"), "clock": ("clock_hz", "frequency")},
    "tiers": {
        "capacity": ("capacity_bytes", "bytes"),
        "reserve": ("reserve_bytes", "bytes"),
        "read": ("read_bandwidth", "bandwidth"),
        "write": ("write_bandwidth", "bandwidth"),
        "latency": ("latency_seconds", "time"),
    },
    "links": {"bandwidth": ("bandwidth", "bandwidth"), "latency": ("latency_seconds", "time")},
    "storage": {"capacity": ("capacity_bytes", "bytes")},
}
_WHOLE = ("count", "bytes")
_SOURCE = "given on the command line"


def split_name(text: str) -> tuple[str, dict[str, str]]:
    """`x86-64-v4{dram=8GiB, cpu.cores=2}` -> (name, overrides). Values end at a comma or a space."""
    match = re.fullmatch(r"\s*([^{}]+?)\s*(?:\{([^{}]*)\})?\s*", text)
    if match is None:
        raise DiagnosticError(f"{text!r} is not a target", expected="a name, or name{key=value, ...}")
    overrides: dict[str, str] = {}
    for part in re.split(r"[,\s]+", match[2] or ""):
        if not part:
            continue
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise DiagnosticError(f"{part!r} is not an override", where=text, expected="key=value")
        if key in overrides:
            raise DiagnosticError(f"{key} is given twice", where=text)
        overrides[key] = value
    return match[1], overrides


def apply_overrides(target: Target, overrides: dict[str, str]) -> Target:
    """`target` with every override applied, in the order given."""
    for key, value in overrides.items():
        target = _apply(target, key, value)
    return target


def _apply(target: Target, key: str, value: str) -> Target:
    if key in ("features", "without"):
        return _change_features(target, key, value)
    if key == "cpu":
        features = target.llvm_features | cpu_features.cpu_baseline(target.llvm_triple, value)
        return dataclasses.replace(target, llvm_cpu=value, llvm_features=features - target.llvm_disabled)
    if key == "triple":
        return dataclasses.replace(target, llvm_triple=value)
    name, _, attribute = key.partition(".")
    for kind, fields in _FIELDS.items():
        items = getattr(target, kind)
        for index, item in enumerate(items):
            if item.name == name:
                changed = _change_item(item, attribute or "capacity", value, fields, key)
                return dataclasses.replace(target, **{kind: (*items[:index], changed, *items[index + 1 :])})
    known = _known_keys(target)
    close = difflib.get_close_matches(key, known, 1)
    raise DiagnosticError(
        f"target {target.name} has nothing named {key!r}",
        expected=", ".join(known),
        hint=f"did you mean {close[0]}?" if close else "",
    )


def _change_item(item: Any, attribute: str, value: str, fields: dict[str, tuple[str, str]], key: str) -> Any:
    if isinstance(item, ComputeUnit) and attribute.startswith("peak."):
        peak = dict(item.peak)
        peak[attribute.removeprefix("peak.")] = parse_quantity(value, "rate", where=key)
        return dataclasses.replace(item, peak=tuple(sorted(peak.items())), source=_joined(item.source))
    if attribute not in fields:
        raise DiagnosticError(f"{item.name} has no field {attribute!r}", where=key, expected=", ".join(fields))
    name, kind = fields[attribute]
    number = parse_quantity(value, kind, where=key)
    changes: dict[str, Any] = {name: int(number) if kind in _WHOLE else number}
    if kind == "count" and (number != int(number) or number < 1):
        raise DiagnosticError(f"{value} is not a count", where=key, expected="1 or more")
    if kind not in _WHOLE:
        changes["source"] = _joined(item.source)
    return dataclasses.replace(item, **changes)


def _change_features(target: Target, key: str, value: str) -> Target:
    names = [name for name in value.split("+") if name]
    unknown = [name for name in names if not re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name)]
    if unknown or not names:
        raise DiagnosticError(f"{value!r} is not a list of features", where=key, expected="such as +avx512bf16+gfni")
    if key == "features":
        added = cpu_features.closure(names)
        disabled = target.llvm_disabled - added
        return dataclasses.replace(target, llvm_features=target.llvm_features | added, llvm_disabled=disabled)
    kept = cpu_features.without(target.llvm_features, names)
    disabled = target.llvm_disabled | (target.llvm_features - kept) | frozenset(names)
    return dataclasses.replace(target, llvm_features=kept, llvm_disabled=disabled)


def _joined(source: str) -> str:
    return source if _SOURCE in source else f"{source}; {_SOURCE}".removeprefix("; ")


def _known_keys(target: Target) -> list[str]:
    keys = ["features", "without", "cpu", "triple"]
    keys += [t.name for t in (*target.tiers, *target.storage)]
    for kind, fields in _FIELDS.items():
        keys += [f"{item.name}.{name}" for item in getattr(target, kind) for name in fields]
    return keys
