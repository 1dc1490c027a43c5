"""A target as lines of text for people: units, caches, tiers, links, drives, with or without their sources.

`describe(target)` is what `compile-model targets show` prints; `table_row(target)` is its row in docs/targets.md.
"""

from __future__ import annotations

from hw_targets.memory import Fabric, Link, MemoryTier, Storage
from hw_targets.quantities import format_bytes
from hw_targets.target import ComputeUnit, Target

TABLE_HEAD = ("| name | machine | computes | memory | moves |", "|---|---|---|---|---|")


def describe(target: Target, *, sources: bool = False) -> list[str]:
    """Lines without line ends. `sources` puts below each table where its figures come from."""
    nodes = f", {target.nodes} nodes, each with" if target.nodes > 1 else ""
    lines = [
        f"{target.name}: {target.description}{nodes}",
        f"  triple      {target.llvm_triple}, cpu {target.llvm_cpu}, vectors of {target.vector_bits} bits",
        f"  features    {' '.join(target.required_features()) or '(the baseline)'}",
    ]
    for unit in target.units:
        lines += _entry(_named(unit.name, unit.count), _unit(unit), unit.source, sources)
    for cache in target.caches:
        lines.append(f"  L{cache.level} {cache.kind:<8} {_size(cache.nbytes)}, shared by {cache.shared_by}")
    for tier in target.tiers:
        lines += _entry(_named(tier.name, tier.count), _tier(tier), tier.source, sources)
    for link in target.links:
        lines += _entry(_named(link.name, link.count), _link(link), link.source, sources)
    for switch in target.switches:
        text = f"switch, {_rate(switch.bandwidth)} together"
        lines += _entry(_named(switch.name, switch.count), text, switch.source, sources)
    for fabric in target.fabrics:
        lines += _entry(fabric.name, _fabric(fabric), fabric.source, sources)
    for drive in target.storage:
        lines += _entry(_named(drive.name, drive.count), _storage(drive), drive.source, sources)
    if target.power_watts is not None:
        lines += _entry("power", f"{target.power_watts:g} W a node", target.source, sources)
    if target.price is not None:
        cost = [f"{v:g} {target.price.currency} {w}" for v, w in _prices(target) if v is not None]
        lines += _entry("price", ", ".join(cost), target.price.source, sources)
    return lines


def table_row(target: Target) -> str:
    """One row of a Markdown table."""
    computes = "; ".join(_short_unit(u) for u in target.units)
    memory = "; ".join(
        f"{_times(t.count)}{t.name} {_size(t.capacity_bytes)} at {_rate(t.read_bandwidth)}" for t in target.tiers
    )
    moves = [f"{_times(x.count)}{x.name} {_rate(x.rate())}" for x in target.links]
    moves += [f"{f.name} {_rate(f.rate())}" for f in target.fabrics]
    moves += [f"{_times(s.count)}{s.name} {_rate(s.read_rate())}" for s in target.storage]
    nodes = f"{target.nodes} nodes of: " if target.nodes > 1 else ""
    return f"| `{target.name}` | {target.description} | {nodes}{computes} | {memory} | {'; '.join(moves) or '-'} |"


def _entry(name: str, text: str, source: str, sources: bool) -> list[str]:
    lines = [f"  {name:<11} {text}"]
    return [*lines, *(f"{'':<16}{part}" for part in source.split("; "))] if sources and source else lines


def _unit(unit: ComputeUnit) -> str:
    whole = unit.kind != "cpu" or unit.cores is None
    per = "" if whole else " a core"
    peaks = ", ".join(f"{element} {_flops(rate, element)}{per}" for element, rate in unit.peak)
    count = f"{unit.cores} cores" if unit.cores else "cores not stated"
    parts = [count if unit.kind == "cpu" else f"{unit.kind} {unit.arch}".strip(), peaks or "peak not known"]
    if unit.efficiency:
        parts.append("of that " + ", ".join(f"{element} {share:.0%}" for element, share in unit.efficiency))
    if unit.bandwidth_efficiency is not None:
        parts.append(f"{unit.bandwidth_efficiency:.0%} of {unit.tier}'s bandwidth")
    if unit.few_rows_efficiency:
        parts.append("for few rows " + ", ".join(f"{e} {share:.0%}" for e, share in unit.few_rows_efficiency))
    if unit.launch_seconds is not None:
        parts.append(f"launch {_time(unit.launch_seconds)}")
    if unit.barrier_seconds is not None:
        parts.append(f"barrier {_time(unit.barrier_seconds)}")
    if unit.power_watts is not None:
        parts.append(f"{unit.power_watts:g} W")
    return ", ".join(parts)


def _short_unit(unit: ComputeUnit) -> str:
    known = dict(unit.peak)
    shown = next((e for e in (("bf16", "f16", "f32", "i8") if unit.kind != "cpu" else ("f32",)) if e in known), "")
    cores = f"{unit.cores} {unit.name}" if unit.kind == "cpu" else f"{_times(unit.count)}{unit.name}"
    return f"{cores} {_flops(unit.peak_of(shown) or 0.0, shown)} {shown}" if shown else cores


def _tier(tier: MemoryTier) -> str:
    parts = [_size(tier.capacity_bytes) if tier.capacity_bytes else "size not stated"]
    if tier.reserve_bytes:
        parts.append(f"{_size(tier.reserve_bytes)} of it reserved")
    parts.append(f"read {_rate(tier.read_bandwidth)}" if tier.read_bandwidth else "bandwidth not known")
    parts += [
        f"{_rate(rate)} with {threads} thread{'s' * (threads > 1)}" for threads, rate in tier.read_by_threads[:-1]
    ]
    if tier.write_bandwidth is not None:
        parts.append(f"write {_rate(tier.write_bandwidth)}")
    if tier.latency_seconds is not None:
        parts.append(f"latency {_time(tier.latency_seconds)}")
    if tier.page_fault_seconds is not None:
        parts.append(f"page fault {_time(tier.page_fault_seconds)}")
    return ", ".join(parts)


def _link(link: Link) -> str:
    back = link.back_bandwidth
    parts = [f"{link.from_tier} to {link.to_tier} {_rate(link.bandwidth)}" + (f", back {_rate(back)}" if back else "")]
    parts.append("both ways at once" if link.duplex else "one way at a time")
    if link.efficiency is not None:
        parts.append(f"{link.efficiency:.0%} of it reached")
    if link.pageable_bandwidth is not None:
        parts.append(
            f"{_rate(link.pageable_bandwidth)} of memory that is not pinned{'' if link.pinned else ', as here'}"
        )
    if link.switch:
        parts.append(f"through {link.switch}")
    if link.latency_seconds is not None:
        parts.append(f"latency {_time(link.latency_seconds)}")
    return ", ".join(parts)


def _fabric(fabric: Fabric) -> str:
    where = "within a node" if fabric.scope == "node" else "across nodes"
    reached = f", {fabric.efficiency:.0%} of it reached" if fabric.efficiency is not None else ""
    latency = f", latency {_time(fabric.latency_seconds)}" if fabric.latency_seconds is not None else ""
    return f"between copies of {fabric.tier} {where}, {_rate(fabric.bandwidth)} out of each{reached}{latency}"


def _storage(drive: Storage) -> str:
    parts = [_size(drive.capacity_bytes) if drive.capacity_bytes else "size not stated"]
    best, small, write = drive.read_rate(), drive.read_rate(4096, 1, "random"), drive.write_rate()
    parts.append(f"read up to {_rate(best)}" if best else "bandwidth not known")
    if small and best and small < best / 2:
        parts.append(f"single blocks of 4 KiB {_rate(small)}")
    if write:
        parts.append(f"write {_rate(write)}")
    if drive.burst_bandwidth and drive.burst_bytes:
        parts.append(f"first {_size(drive.burst_bytes)} at {_rate(drive.burst_bandwidth)}")
    return ", ".join(parts)


def _prices(target: Target) -> list[tuple[float | None, str]]:
    return [] if target.price is None else [(target.price.hour, "an hour"), (target.price.purchase, "once")]


def _named(name: str, count: int) -> str:
    return f"{_times(count)}{name}"


def _times(count: int) -> str:
    return f"{count} x " if count > 1 else ""


def _size(nbytes: int | None) -> str:
    """In the unit it was most likely written in: decimal when that is a round number, else binary."""
    if nbytes is None:
        return "?"
    for unit, symbol in ((10**12, "TB"), (10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if nbytes >= unit and nbytes % (unit // 100) == 0:
            return f"{nbytes / unit:g} {symbol}"
    number, symbol = format_bytes(nbytes).split()
    return f"{float(number):g} {symbol}"


def _rate(value: float | None) -> str:
    if value is None:
        return "?"
    scale, symbol = next(
        ((s, t) for s, t in ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")) if value >= s), (1e3, "kB/s")
    )
    return f"{value / scale:.4g} {symbol}"


def _flops(value: float, element: str) -> str:
    unit = "OP/s" if element.startswith("i") else "FLOP/s"
    scale, prefix = (1e12, "T") if value >= 1e12 else (1e9, "G")
    return f"{value / scale:.4g} {prefix}{unit}"


def _time(seconds: float) -> str:
    scale, unit = next(((s, t) for s, t in ((1e-3, "ms"), (1e-6, "us")) if seconds >= s), (1e-9, "ns"))
    return f"{seconds / scale:.3g} {unit}"
