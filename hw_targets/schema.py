"""Target files: TOML text -> `Target`.

    name = "server"                              description, power
    [llvm]                                       triple, cpu, features (implied ones are added), disabled
    [[unit]]                                     name, kind, tier, cores, clock, peak = { f32 = "0.1TFLOP/s" }, source
    [[cache]]                                    level, kind, size, line, shared_by
    [[tier]]                                     name, capacity, reserve, read, write, latency, source
    [[link]]                                     name, from, to, bandwidth, latency, source
    [[storage]]                                  name, capacity, source, points = [{ block, depth, read, write }]

Peaks are of one core. Figures without a `source` are refused, as are unknown fields, unknown units of measure and
tiers that are named but not described; each with the path of the field in the file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec

from hw_targets import cpu_features
from hw_targets.quantities import parse_quantity
from hw_targets.target import Cache, ComputeUnit, Link, MemoryTier, Storage, StoragePoint, Target
from ir.diagnostics import DiagnosticError

Quantity = str | int | float
MAX_FILE_BYTES = 1 << 20
ELEMENTS = ("f64", "f32", "f16", "bf16", "f8", "i8", "i4")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


class _Table(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """Base of the tables of a target file: an unknown field is an error."""


class LlvmTable(_Table, frozen=True):
    triple: str
    cpu: str
    features: list[str] = []
    disabled: list[str] = []


class UnitTable(_Table, frozen=True):
    name: str
    tier: str
    kind: str = "cpu"
    cores: int | None = None
    clock: Quantity | None = None
    peak: dict[str, Quantity] = {}
    source: str = ""


class CacheTable(_Table, frozen=True):
    level: int
    size: Quantity
    kind: str = "unified"
    line: int = 64
    shared_by: int = 1


class TierTable(_Table, frozen=True):
    name: str
    capacity: Quantity | None = None
    reserve: Quantity = 0
    read: Quantity | None = None
    write: Quantity | None = None
    latency: Quantity | None = None
    source: str = ""


class LinkTable(_Table, frozen=True, rename={"from_tier": "from", "to_tier": "to"}):
    name: str
    from_tier: str
    to_tier: str
    bandwidth: Quantity | None = None
    latency: Quantity | None = None
    source: str = ""


class PointTable(_Table, frozen=True):
    block: Quantity
    depth: int
    read: Quantity
    write: Quantity | None = None


class StorageTable(_Table, frozen=True):
    name: str
    capacity: Quantity | None = None
    points: list[PointTable] = []
    source: str = ""


class TargetFile(_Table, frozen=True):
    name: str
    llvm: LlvmTable
    description: str = ""
    power: Quantity | None = None
    unit: list[UnitTable] = []
    cache: list[CacheTable] = []
    tier: list[TierTable] = []
    link: list[LinkTable] = []
    storage: list[StorageTable] = []


def load_file(path: Path) -> Target:
    """The target that a TOML file describes."""
    where = str(path)
    try:
        with open(path, "rb") as file:
            text = file.read(MAX_FILE_BYTES + 1)
    except OSError as fault:
        raise DiagnosticError(f"cannot read the target file: {fault.strerror}", where=where) from None
    if len(text) > MAX_FILE_BYTES:
        raise DiagnosticError("the target file is too large", where=where, expected=f"at most {MAX_FILE_BYTES} bytes")
    return parse_target(text, where)


def parse_target(text: bytes | str, where: str = "") -> Target:
    """The target that TOML text describes. Raises DiagnosticError naming the field."""
    try:
        table = msgspec.toml.decode(text, type=TargetFile)
    except msgspec.ValidationError as fault:
        raise DiagnosticError(f"not a valid target: {fault}", where=where, hint="see hw_targets/schema.py") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        raise DiagnosticError(f"not a TOML file: {fault}", where=where) from None
    return _Reader(where).target(table)


class _Reader:
    """Converts the tables of one file; `where` is its path."""

    def __init__(self, where: str) -> None:
        self.where = where

    def target(self, t: TargetFile) -> Target:
        self._check_name(t.name, "name")
        features = cpu_features.closure(t.llvm.features) | cpu_features.cpu_baseline(t.llvm.triple, t.llvm.cpu)
        both = sorted(features & set(t.llvm.disabled))
        if both:
            self._fail("llvm.disabled", f"{', '.join(both)} is enabled too")
        if not re.fullmatch(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+){2,3}", t.llvm.triple):
            self._fail("llvm.triple", f"{t.llvm.triple!r} is not a triple", "such as x86_64-unknown-linux-gnu")
        tiers = tuple(self._tier(x, f"tier[{i}]") for i, x in enumerate(t.tier))
        result = Target(
            name=t.name,
            description=t.description,
            llvm_triple=t.llvm.triple,
            llvm_cpu=t.llvm.cpu,
            llvm_features=features,
            llvm_disabled=frozenset(t.llvm.disabled),
            units=tuple(self._unit(x, f"unit[{i}]") for i, x in enumerate(t.unit)),
            caches=tuple(self._cache(x, f"cache[{i}]") for i, x in enumerate(t.cache)),
            tiers=tiers,
            links=tuple(self._link(x, f"link[{i}]") for i, x in enumerate(t.link)),
            storage=tuple(self._storage(x, f"storage[{i}]") for i, x in enumerate(t.storage)),
            power_watts=self._optional(t.power, "power", "power"),
            origin=self.where,
        )
        self._check_references(result)
        return result

    def _unit(self, t: UnitTable, path: str) -> ComputeUnit:
        self._check_name(t.name, f"{path}.name")
        if t.kind not in ("cpu", "gpu", "near-memory"):
            self._fail(f"{path}.kind", f"{t.kind!r} is not a kind of unit", "cpu, gpu or near-memory")
        for element in t.peak:
            if element not in ELEMENTS:
                self._fail(f"{path}.peak", f"{element!r} is not an element", ", ".join(ELEMENTS))
        if t.cores is not None and not 1 <= t.cores <= 1 << 20:
            self._fail(f"{path}.cores", f"{t.cores} cores", "1 or more")
        self._check_source(path, t.source, bool(t.peak) or t.clock is not None)
        peak = tuple((e, self._quantity(v, "rate", f"{path}.peak.{e}")) for e, v in sorted(t.peak.items()))
        clock = self._optional(t.clock, "frequency", f"{path}.clock")
        return ComputeUnit(t.name, t.kind, t.tier, t.cores, clock, peak, t.source)

    def _cache(self, t: CacheTable, path: str) -> Cache:
        if not 1 <= t.level <= 4 or t.kind not in ("data", "unified"):
            self._fail(path, f"level {t.level}, kind {t.kind!r}", "level 1 to 4, kind data or unified")
        size = int(self._quantity(t.size, "bytes", f"{path}.size"))
        if size < 1 or t.line < 1 or t.shared_by < 1:
            self._fail(path, f"size {size}, line {t.line}, shared_by {t.shared_by}", "positive numbers")
        return Cache(t.level, t.kind, size, t.line, t.shared_by)

    def _tier(self, t: TierTable, path: str) -> MemoryTier:
        self._check_name(t.name, f"{path}.name")
        figures = (t.read, t.write, t.latency)
        self._check_source(path, t.source, any(figure is not None for figure in figures))
        capacity = self._optional(t.capacity, "bytes", f"{path}.capacity")
        return MemoryTier(
            name=t.name,
            capacity_bytes=None if capacity is None else int(capacity),
            reserve_bytes=int(self._quantity(t.reserve, "bytes", f"{path}.reserve")),
            read_bandwidth=self._optional(t.read, "bandwidth", f"{path}.read"),
            write_bandwidth=self._optional(t.write, "bandwidth", f"{path}.write"),
            latency_seconds=self._optional(t.latency, "time", f"{path}.latency"),
            source=t.source,
        )

    def _link(self, t: LinkTable, path: str) -> Link:
        self._check_name(t.name, f"{path}.name")
        self._check_source(path, t.source, t.bandwidth is not None or t.latency is not None)
        bandwidth = self._optional(t.bandwidth, "bandwidth", f"{path}.bandwidth")
        latency = self._optional(t.latency, "time", f"{path}.latency")
        return Link(t.name, t.from_tier, t.to_tier, bandwidth, latency, t.source)

    def _storage(self, t: StorageTable, path: str) -> Storage:
        self._check_name(t.name, f"{path}.name")
        self._check_source(path, t.source, bool(t.points))
        capacity = self._optional(t.capacity, "bytes", f"{path}.capacity")
        points = []
        for i, p in enumerate(t.points):
            at = f"{path}.points[{i}]"
            if p.depth < 1:
                self._fail(f"{at}.depth", f"{p.depth}", "1 or more")
            block = int(self._quantity(p.block, "bytes", f"{at}.block"))
            read = self._quantity(p.read, "bandwidth", f"{at}.read")
            points.append(StoragePoint(block, p.depth, read, self._optional(p.write, "bandwidth", f"{at}.write")))
        return Storage(t.name, None if capacity is None else int(capacity), tuple(points), t.source)

    def _check_references(self, target: Target) -> None:
        for kind in ("units", "tiers", "links", "storage"):
            names = [item.name for item in getattr(target, kind)]
            for name in names:
                if names.count(name) > 1:
                    self._fail(kind, f"two are named {name!r}", "different names")
        known = [t.name for t in target.tiers]
        used = [(f"unit {u.name}", u.tier) for u in target.units]
        used += [(f"link {x.name}", t) for x in target.links for t in (x.from_tier, x.to_tier)]
        for user, tier in used:
            if tier not in known:
                self._fail(user, f"the tier {tier!r} is not described", ", ".join(known) or "a [[tier]] of that name")

    def _quantity(self, value: Any, kind: str, path: str) -> float:
        return parse_quantity(value, kind, where=f"{self.where}: {path}" if self.where else path)

    def _optional(self, value: Any, kind: str, path: str) -> float | None:
        return None if value is None else self._quantity(value, kind, path)

    def _check_name(self, name: str, path: str) -> None:
        if not _NAME.fullmatch(name):
            self._fail(path, f"{name!r} is not a name", "letters, digits, '.', '_' and '-'")

    def _check_source(self, path: str, source: str, needed: bool) -> None:
        if needed and not source:
            self._fail(f"{path}.source", "missing", "where the figures come from, such as a datasheet or a measurement")

    def _fail(self, path: str, message: str, expected: str = "") -> None:
        where = f"{self.where}: {path}" if self.where else path
        raise DiagnosticError(message, where=where, expected=expected)
