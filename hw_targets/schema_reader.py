"""Tables of a target file -> `Target`: quantities become numbers, names are checked, figures need a source.

`Reader(where).target(table)` raises DiagnosticError with the path of the faulty field.
"""

from __future__ import annotations

import re
from typing import Any

from hw_targets import cpu_features
from hw_targets import schema_tables as tables
from hw_targets.memory import Fabric, Link, MemoryTier, Storage, StoragePoint, Switch
from hw_targets.quantities import parse_quantity
from hw_targets.target import Cache, ComputeUnit, Price, Target
from ir.diagnostics import DiagnosticError

ELEMENTS = ("f64", "f32", "f16", "bf16", "f8", "f4", "i8", "i4")
UNIT_KINDS = ("cpu", "gpu", "near-memory")
MAX_COUNT = 1 << 20
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

# Fields that are figures: those given need a source. Sizes, counts and names need none.
_UNIT_FIGURES = (
    *("clock", "peak", "efficiency", "bandwidth_efficiency", "few_rows_efficiency"),
    *("launch", "barrier", "power", "idle"),
)
_TIER_FIGURES = ("read", "write", "latency", "read_by_threads", "page_fault", "power", "idle", "energy")
_LINK_FIGURES = ("bandwidth", "back", "latency", "efficiency", "pageable", "power", "energy")
_FABRIC_FIGURES = ("bandwidth", "latency", "efficiency", "energy")
_STORAGE_FIGURES = ("points", "latency", "burst", "power", "idle", "energy")


class Reader:
    """Converts the tables of one file; `where` is its path."""

    def __init__(self, where: str) -> None:
        self.where = where

    def target(self, t: tables.TargetFile) -> Target:
        """The whole file; checks what refers to what."""
        self._check_name(t.name, "name")
        features = cpu_features.closure(t.llvm.features) | cpu_features.cpu_baseline(t.llvm.triple, t.llvm.cpu)
        both = sorted(features & set(t.llvm.disabled))
        if both:
            self._fail("llvm.disabled", f"{', '.join(both)} is enabled too")
        if not re.fullmatch(r"[A-Za-z0-9_.]+(-[A-Za-z0-9_.]+){2,3}", t.llvm.triple):
            self._fail("llvm.triple", f"{t.llvm.triple!r} is not a triple", "such as x86_64-unknown-linux-gnu")
        self._count(t.nodes, "nodes")
        result = Target(
            name=t.name,
            description=t.description,
            llvm_triple=t.llvm.triple,
            llvm_cpu=t.llvm.cpu,
            llvm_features=features,
            llvm_disabled=frozenset(t.llvm.disabled),
            units=tuple(self._unit(x, f"unit[{i}]") for i, x in enumerate(t.unit)),
            caches=tuple(self._cache(x, f"cache[{i}]") for i, x in enumerate(t.cache)),
            tiers=tuple(self._tier(x, f"tier[{i}]") for i, x in enumerate(t.tier)),
            links=tuple(self._link(x, f"link[{i}]") for i, x in enumerate(t.link)),
            storage=tuple(self._storage(x, f"storage[{i}]") for i, x in enumerate(t.storage)),
            power_watts=self._optional(t.power, "power", "power"),
            origin=self.where,
            switches=tuple(self._switch(x, f"switch[{i}]") for i, x in enumerate(t.switch)),
            fabrics=tuple(self._fabric(x, f"fabric[{i}]") for i, x in enumerate(t.fabric)),
            nodes=t.nodes,
            idle_watts=self._optional(t.idle, "power", "idle"),
            price=self._price(t.price),
            source=self._source(t, "", ("power", "idle")),
        )
        self._check_references(result)
        return result

    def _unit(self, t: tables.UnitTable, path: str) -> ComputeUnit:
        self._check_name(t.name, f"{path}.name")
        if t.kind not in UNIT_KINDS:
            self._fail(f"{path}.kind", f"{t.kind!r} is not a kind of unit", "cpu, gpu or near-memory")
        shares = t.efficiency if isinstance(t.efficiency, dict) else dict.fromkeys(sorted(t.peak), t.efficiency)
        if isinstance(t.efficiency, float | int) and not t.peak:
            self._fail(f"{path}.efficiency", "a share of no peak", "a peak, or { f16 = 0.7 }")
        few = t.few_rows_efficiency
        for field, names in (("peak", t.peak), ("efficiency", shares), ("few_rows_efficiency", few)):
            for element in names:
                if element not in ELEMENTS:
                    self._fail(f"{path}.{field}", f"{element!r} is not an element", ", ".join(ELEMENTS))
        cores = t.cores if t.cores is not None or t.kind == "cpu" else 1
        if cores is not None and not 1 <= cores <= MAX_COUNT:
            self._fail(f"{path}.cores", f"{cores} cores", "1 or more")
        if t.multiprocessors is not None:
            if t.kind != "gpu":
                self._fail(f"{path}.multiprocessors", f"multiprocessors of a unit of kind {t.kind}", "a GPU")
            self._count(t.multiprocessors, f"{path}.multiprocessors")
        given = {e: v for e, v in sorted(shares.items()) if v is not None}
        return ComputeUnit(
            name=t.name,
            kind=t.kind,
            tier=t.tier,
            cores=cores,
            clock_hz=self._optional(t.clock, "frequency", f"{path}.clock"),
            peak=tuple((e, self._quantity(v, "rate", f"{path}.peak.{e}")) for e, v in sorted(t.peak.items())),
            source=self._source(t, path, _UNIT_FIGURES),
            efficiency=tuple((e, self._share(v, f"{path}.efficiency.{e}")) for e, v in given.items()),
            bandwidth_efficiency=self._optional_share(t.bandwidth_efficiency, f"{path}.bandwidth_efficiency"),
            few_rows_efficiency=tuple(
                (e, self._share(v, f"{path}.few_rows_efficiency.{e}")) for e, v in sorted(t.few_rows_efficiency.items())
            ),
            launch_seconds=self._optional(t.launch, "time", f"{path}.launch"),
            barrier_seconds=self._optional(t.barrier, "time", f"{path}.barrier"),
            power_watts=self._optional(t.power, "power", f"{path}.power"),
            idle_watts=self._optional(t.idle, "power", f"{path}.idle"),
            arch=t.arch,
            multiprocessors=t.multiprocessors,
            count=self._count(t.count, f"{path}.count"),
        )

    def _cache(self, t: tables.CacheTable, path: str) -> Cache:
        if not 1 <= t.level <= 4 or t.kind not in ("data", "unified"):
            self._fail(path, f"level {t.level}, kind {t.kind!r}", "level 1 to 4, kind data or unified")
        size = int(self._quantity(t.size, "bytes", f"{path}.size"))
        if size < 1 or t.line < 1 or t.shared_by < 1:
            self._fail(path, f"size {size}, line {t.line}, shared_by {t.shared_by}", "positive numbers")
        return Cache(t.level, t.kind, size, t.line, t.shared_by)

    def _tier(self, t: tables.TierTable, path: str) -> MemoryTier:
        self._check_name(t.name, f"{path}.name")
        by_threads = []
        for i, point in enumerate(t.read_by_threads):
            at = f"{path}.read_by_threads[{i}]"
            self._count(point.threads, f"{at}.threads")
            if by_threads and point.threads <= by_threads[-1][0]:
                self._fail(f"{at}.threads", f"{point.threads}", f"more than {by_threads[-1][0]}, the one before")
            by_threads.append((point.threads, self._quantity(point.read, "bandwidth", f"{at}.read")))
        return MemoryTier(
            name=t.name,
            capacity_bytes=self._size(t.capacity, f"{path}.capacity"),
            reserve_bytes=int(self._quantity(t.reserve, "bytes", f"{path}.reserve")),
            read_bandwidth=self._optional(t.read, "bandwidth", f"{path}.read"),
            write_bandwidth=self._optional(t.write, "bandwidth", f"{path}.write"),
            latency_seconds=self._optional(t.latency, "time", f"{path}.latency"),
            source=self._source(t, path, _TIER_FIGURES),
            read_by_threads=tuple(by_threads),
            page_fault_seconds=self._optional(t.page_fault, "time", f"{path}.page_fault"),
            power_watts=self._optional(t.power, "power", f"{path}.power"),
            idle_watts=self._optional(t.idle, "power", f"{path}.idle"),
            joules_per_byte=self._optional(t.energy, "energy", f"{path}.energy"),
            count=self._count(t.count, f"{path}.count"),
        )

    def _link(self, t: tables.LinkTable, path: str) -> Link:
        self._check_name(t.name, f"{path}.name")
        return Link(
            name=t.name,
            from_tier=t.from_tier,
            to_tier=t.to_tier,
            bandwidth=self._optional(t.bandwidth, "bandwidth", f"{path}.bandwidth"),
            latency_seconds=self._optional(t.latency, "time", f"{path}.latency"),
            source=self._source(t, path, _LINK_FIGURES),
            back_bandwidth=self._optional(t.back, "bandwidth", f"{path}.back"),
            duplex=t.duplex,
            switch=t.switch,
            efficiency=self._optional_share(t.efficiency, f"{path}.efficiency"),
            pageable_bandwidth=self._optional(t.pageable, "bandwidth", f"{path}.pageable"),
            pinned=t.pinned,
            power_watts=self._optional(t.power, "power", f"{path}.power"),
            joules_per_byte=self._optional(t.energy, "energy", f"{path}.energy"),
            count=self._count(t.count, f"{path}.count"),
        )

    def _switch(self, t: tables.SwitchTable, path: str) -> Switch:
        self._check_name(t.name, f"{path}.name")
        bandwidth = self._optional(t.bandwidth, "bandwidth", f"{path}.bandwidth")
        return Switch(t.name, bandwidth, self._source(t, path, ("bandwidth",)), self._count(t.count, f"{path}.count"))

    def _fabric(self, t: tables.FabricTable, path: str) -> Fabric:
        self._check_name(t.name, f"{path}.name")
        if t.scope not in ("node", "cluster"):
            self._fail(f"{path}.scope", f"{t.scope!r} is not a scope", "node or cluster")
        if t.topology not in ("switch", "ring", "mesh"):
            self._fail(f"{path}.topology", f"{t.topology!r} is not a topology", "switch, ring or mesh")
        return Fabric(
            name=t.name,
            tier=t.tier,
            scope=t.scope,
            bandwidth=self._optional(t.bandwidth, "bandwidth", f"{path}.bandwidth"),
            latency_seconds=self._optional(t.latency, "time", f"{path}.latency"),
            topology=t.topology,
            efficiency=self._optional_share(t.efficiency, f"{path}.efficiency"),
            joules_per_byte=self._optional(t.energy, "energy", f"{path}.energy"),
            source=self._source(t, path, _FABRIC_FIGURES),
        )

    def _storage(self, t: tables.StorageTable, path: str) -> Storage:
        self._check_name(t.name, f"{path}.name")
        points = []
        for i, p in enumerate(t.points):
            at = f"{path}.points[{i}]"
            if p.depth < 1:
                self._fail(f"{at}.depth", f"{p.depth}", "1 or more")
            if p.access not in ("any", "random", "sequential"):
                self._fail(f"{at}.access", f"{p.access!r} is not an access", "any, random or sequential")
            block = int(self._quantity(p.block, "bytes", f"{at}.block"))
            if block < 1:
                self._fail(f"{at}.block", f"{block} bytes", "1 or more")
            read = self._quantity(p.read, "bandwidth", f"{at}.read")
            write = self._optional(p.write, "bandwidth", f"{at}.write")
            points.append(StoragePoint(block, p.depth, read, write, p.access))
        return Storage(
            name=t.name,
            capacity_bytes=self._size(t.capacity, f"{path}.capacity"),
            points=tuple(points),
            source=self._source(t, path, _STORAGE_FIGURES),
            tier=t.tier,
            switch=t.switch,
            latency_seconds=self._optional(t.latency, "time", f"{path}.latency"),
            burst_bandwidth=self._optional(t.burst, "bandwidth", f"{path}.burst"),
            burst_bytes=self._size(t.burst_bytes, f"{path}.burst_bytes"),
            power_watts=self._optional(t.power, "power", f"{path}.power"),
            idle_watts=self._optional(t.idle, "power", f"{path}.idle"),
            joules_per_byte=self._optional(t.energy, "energy", f"{path}.energy"),
            count=self._count(t.count, f"{path}.count"),
        )

    def _price(self, t: tables.PriceTable | None) -> Price | None:
        if t is None:
            return None
        for field, value in (("hour", t.hour), ("purchase", t.purchase)):
            if value is not None and not 0 <= value < 1e12:
                self._fail(f"price.{field}", f"{value} is out of range", "a price")
        if not t.source:
            self._fail("price.source", "missing", "where the price comes from, and of when it is")
        return Price(t.hour, t.purchase, t.currency, t.source)

    def _check_references(self, target: Target) -> None:
        kinds = ("units", "tiers", "links", "storage", "switches", "fabrics")
        for kind in kinds:
            names = [item.name for item in getattr(target, kind)]
            for name in names:
                if names.count(name) > 1:
                    self._fail(kind, f"two are named {name!r}", "different names")
        tiers = {t.name: t.count for t in target.tiers}
        used = [(f"unit {u.name}", u.tier, u.count) for u in target.units]
        used += [(f"link {x.name}", t, x.count) for x in target.links for t in (x.from_tier, x.to_tier)]
        used += [(f"fabric {f.name}", f.tier, 0) for f in target.fabrics]
        used += [(f"storage {s.name}", s.tier, 0) for s in target.storage if s.tier]
        for user, tier, count in used:
            if tier not in tiers:
                self._fail(user, f"the tier {tier!r} is not described", ", ".join(tiers) or "a [[tier]] of that name")
            if count and tiers[tier] not in (1, count) and count != 1:
                self._fail(user, f"{count} copies do not fit {tiers[tier]} of the tier {tier!r}", f"1 or {tiers[tier]}")
        switches = [s.name for s in target.switches]
        for item in (*target.links, *target.storage):
            if item.switch and item.switch not in switches:
                expected = ", ".join(switches) or "a [[switch]] of that name"
                self._fail(item.name, f"the switch {item.switch!r} is not described", expected)

    def _source(self, table: Any, path: str, figures: tuple[str, ...]) -> str:
        """The table's source as one text; fails when a figure is given without one."""
        at = f"{path}.source" if path else "source"
        given = [name for name in figures if getattr(table, name) not in (None, {}, [])]
        expected = "where the figures come from, such as a datasheet or a measurement"
        if isinstance(table.source, dict):
            for name, text in table.source.items():
                if name not in given:
                    self._fail(at, f"there is no figure {name!r} in this table", ", ".join(given))
                if not text.strip():
                    self._fail(f"{at}.{name}", "missing", expected)
            for name in given:
                if name not in table.source:
                    self._fail(f"{at}.{name}", "missing", expected)
            return "; ".join(f"{name}: {text.strip()}" for name, text in table.source.items())
        if given and not table.source.strip():
            self._fail(at, "missing", expected)
        return table.source.strip()

    def _count(self, value: int, path: str) -> int:
        if not 1 <= value <= MAX_COUNT:
            self._fail(path, f"{value} is not a count", f"1 to {MAX_COUNT}")
        return value

    def _share(self, value: float, path: str) -> float:
        if not 0 < value <= 1:
            self._fail(path, f"{value} is not a share", "above 0, at most 1")
        return float(value)

    def _optional_share(self, value: float | None, path: str) -> float | None:
        return None if value is None else self._share(value, path)

    def _quantity(self, value: Any, kind: str, path: str) -> float:
        return parse_quantity(value, kind, where=f"{self.where}: {path}" if self.where else path)

    def _optional(self, value: Any, kind: str, path: str) -> float | None:
        return None if value is None else self._quantity(value, kind, path)

    def _size(self, value: Any, path: str) -> int | None:
        return None if value is None else int(self._quantity(value, "bytes", path))

    def _check_name(self, name: str, path: str) -> None:
        if not _NAME.fullmatch(name):
            self._fail(path, f"{name!r} is not a name", "letters, digits, '.', '_' and '-'")

    def _fail(self, path: str, message: str, expected: str = "") -> None:
        where = f"{self.where}: {path}" if self.where else path
        raise DiagnosticError(message, where=where, expected=expected)
