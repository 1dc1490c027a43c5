"""Overrides on the command line: `name{key=value, key=value}`.

dram=8GiB                    capacity of the tier `dram`
dram.read=40GB/s             any field of a tier, unit, link, switch, fabric or storage, as the file names them
cpu.cores=4   cpu.peak.bf16=0.2TFLOP/s   gpu.efficiency=0.6 (all elements)   gpu.efficiency.f16=0.6   gpu.count=4
nvme.read=3GB/s              scales all points of a drive, so that the fastest one is this
pcie.duplex=no               pcie.pinned=no (copies get `pageable`)   nodes=4   power=1kW
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
from hw_targets.memory import MemoryTier, Storage, StoragePoint
from hw_targets.quantities import parse_quantity
from hw_targets.schema_reader import ELEMENTS, MAX_COUNT
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError

# Name in the file -> (attribute, kind of quantity). Peaks are handled apart.
_FIELDS: dict[str, dict[str, tuple[str, str]]] = {
    "units": {
        "cores": ("cores", "count"),
        "count": ("count", "count"),
        "clock": ("clock_hz", "frequency"),
        "bandwidth_efficiency": ("bandwidth_efficiency", "share"),
        "launch": ("launch_seconds", "time"),
        "barrier": ("barrier_seconds", "time"),
        "power": ("power_watts", "power"),
        "idle": ("idle_watts", "power"),
    },
    "tiers": {
        "capacity": ("capacity_bytes", "bytes"),
        "count": ("count", "count"),
        "reserve": ("reserve_bytes", "bytes"),
        "read": ("read_bandwidth", "bandwidth"),
        "write": ("write_bandwidth", "bandwidth"),
        "latency": ("latency_seconds", "time"),
        "page_fault": ("page_fault_seconds", "time"),
        "power": ("power_watts", "power"),
        "idle": ("idle_watts", "power"),
        "energy": ("joules_per_byte", "energy"),
    },
    "links": {
        "bandwidth": ("bandwidth", "bandwidth"),
        "count": ("count", "count"),
        "back": ("back_bandwidth", "bandwidth"),
        "latency": ("latency_seconds", "time"),
        "duplex": ("duplex", "flag"),
        "pinned": ("pinned", "flag"),
        "efficiency": ("efficiency", "share"),
        "pageable": ("pageable_bandwidth", "bandwidth"),
        "power": ("power_watts", "power"),
        "energy": ("joules_per_byte", "energy"),
    },
    "storage": {
        "capacity": ("capacity_bytes", "bytes"),
        "count": ("count", "count"),
        "read": ("read_bandwidth", "bandwidth"),
        "write": ("write_bandwidth", "bandwidth"),
        "latency": ("latency_seconds", "time"),
        "burst": ("burst_bandwidth", "bandwidth"),
        "burst_bytes": ("burst_bytes", "bytes"),
        "power": ("power_watts", "power"),
        "idle": ("idle_watts", "power"),
        "energy": ("joules_per_byte", "energy"),
    },
    "switches": {"bandwidth": ("bandwidth", "bandwidth"), "count": ("count", "count")},
    "fabrics": {
        "bandwidth": ("bandwidth", "bandwidth"),
        "latency": ("latency_seconds", "time"),
        "efficiency": ("efficiency", "share"),
        "energy": ("joules_per_byte", "energy"),
    },
}
_TARGET_FIELDS = {
    "nodes": ("nodes", "count"),
    "power": ("power_watts", "power"),
    "idle": ("idle_watts", "power"),
}
_DEFAULT_FIELD = {"units": "cores", "switches": "bandwidth", "links": "bandwidth", "fabrics": "bandwidth"}
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
    if key in _TARGET_FIELDS:
        return _change_item(target, key, value, _TARGET_FIELDS, key)
    name, _, attribute = key.partition(".")
    for kind, fields in _FIELDS.items():
        items = getattr(target, kind)
        for index, item in enumerate(items):
            if item.name == name:
                attribute = attribute or _DEFAULT_FIELD.get(kind, "capacity")
                changed = _change_item(item, attribute, value, fields, key)
                return dataclasses.replace(target, **{kind: (*items[:index], changed, *items[index + 1 :])})
    known = _known_keys(target)
    close = difflib.get_close_matches(key, known, 1)
    raise DiagnosticError(
        f"target {target.name} has nothing named {key!r}",
        expected=", ".join(known),
        hint=f"did you mean {close[0]}?" if close else "",
    )


def _change_item(item: Any, attribute: str, value: str, fields: dict[str, tuple[str, str]], key: str) -> Any:
    if isinstance(item, ComputeUnit) and attribute.startswith(("peak.", "efficiency")):
        return _change_elements(item, attribute, value, key)
    if attribute not in fields:
        known = [*fields, *(("peak.f32", "efficiency") if isinstance(item, ComputeUnit) else ())]
        raise DiagnosticError(f"{item.name} has no field {attribute!r}", where=key, expected=", ".join(known))
    name, kind = fields[attribute]
    if kind == "flag":
        return dataclasses.replace(item, **{name: _flag(value, key)})
    number = parse_quantity(value, kind, where=key)
    if kind == "count" and (number != int(number) or not 1 <= number <= MAX_COUNT):
        raise DiagnosticError(f"{value} is not a count", where=key, expected=f"1 to {MAX_COUNT}")
    if kind == "share":
        _check_share(number, key)
    changes: dict[str, Any] = {name: int(number) if kind in _WHOLE else number}
    if isinstance(item, Storage) and name in ("read_bandwidth", "write_bandwidth"):
        changes = {"points": _scaled(item, name, number, key)}
    if isinstance(item, MemoryTier) and name == "read_bandwidth" and item.read_by_threads:
        # The curve keeps its shape: who says what the memory gives means all threads together.
        factor = number / item.read_by_threads[-1][1] if item.read_by_threads[-1][1] else 0.0
        changes["read_by_threads"] = tuple((n, rate * factor) for n, rate in item.read_by_threads)
    if kind not in _WHOLE:
        changes["source"] = _joined(item.source)
    return dataclasses.replace(item, **changes)


def _change_elements(unit: ComputeUnit, attribute: str, value: str, key: str) -> ComputeUnit:
    field, _, element = attribute.partition(".")
    if element and element not in ELEMENTS:
        raise DiagnosticError(f"{element!r} is not an element", where=key, expected=", ".join(ELEMENTS))
    if field == "peak":
        changed = {element: parse_quantity(value, "rate", where=key)}
    elif field == "efficiency":
        share = parse_quantity(value, "share", where=key)
        _check_share(share, key)
        changed = dict.fromkeys([element] if element else [e for e, _ in unit.peak], share)
    else:
        raise DiagnosticError(f"{unit.name} has no field {attribute!r}", where=key, expected="efficiency, peak.f32")
    merged = tuple(sorted((dict(getattr(unit, field)) | changed).items()))
    return dataclasses.replace(unit, **{field: merged}, source=_joined(unit.source))


def _scaled(drive: Storage, name: str, rate: float, key: str) -> tuple[StoragePoint, ...]:
    """The drive's points with the fastest at `rate`; one point of 1 MiB when there are none."""
    best = drive.read_rate() if name == "read_bandwidth" else drive.write_rate()
    if not best:
        if name == "read_bandwidth":
            return (StoragePoint(1 << 20, 1, rate),)
        raise DiagnosticError(f"{drive.name} states no write bandwidth to scale", where=key)
    points = []
    for point in drive.points:
        old = getattr(point, name)
        points.append(point if old is None else dataclasses.replace(point, **{name: old / best * rate}))
    return tuple(points)


def _flag(value: str, key: str) -> bool:
    if value.lower() in ("yes", "true", "on", "1"):
        return True
    if value.lower() in ("no", "false", "off", "0"):
        return False
    raise DiagnosticError(f"{value!r} is neither yes nor no", where=key, expected="yes or no")


def _check_share(number: float, key: str) -> None:
    if not 0 < number <= 1:
        raise DiagnosticError(f"{number:g} is not a share", where=key, expected="above 0, at most 1")


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
    keys = ["features", "without", "cpu", "triple", *_TARGET_FIELDS]
    keys += [t.name for t in (*target.tiers, *target.storage)]
    for kind, fields in _FIELDS.items():
        keys += [f"{item.name}.{name}" for item in getattr(target, kind) for name in fields]
    return keys
