"""What one piece of work costs on one unit of a target: seconds, and the resource that bounds them.

    work = Work(flops=2e9, element="bf16", traffic=(("hbm", 1e9),), launches=2)
    price(work, target.unit("gpu"), target)      # Price(seconds=..., bound="hbm read", parts=(...))

Everything that a piece of work uses runs at the same time, so the slowest resource decides; the start of kernels (and
the meeting of cores after each) comes on top. A rate that nobody stated is never guessed: asking for it is a diagnostic
that names the figure and how to give it. Rates are those to plan with: stated times stated efficiency.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from hw_targets.target import ComputeUnit, Link, MemoryTier, Target
from ir.diagnostics import DiagnosticError

# Instead of an element whose peak nobody stated, one that takes at least as long: its products are exact for the other.
_STAND_INS: dict[str, tuple[str, ...]] = {
    "i4": ("i8", "f8", "bf16", "f16", "f32"),
    "i8": ("f8", "bf16", "f16", "f32"),
    "f8": ("i8", "bf16", "f16", "f32"),
    "bf16": ("f16", "f32"),
    "f16": ("bf16", "f32"),
    "f32": ("f64",),
    "f64": (),
}


FEW_ROWS = 16  # below, a product is one of few rows


@dataclass(frozen=True)
class Work:
    """What a kernel, a layer or a whole phase asks of one unit.

    `traffic` is ((tier, bytes read or written), ...); bytes of the unit's own tier and of caches are read by its cores,
    others come over a link. `transfers` is ((from tier or storage, to tier, bytes), ...). `launches` counts kernels.
    `threads` are the cores that take part, None for all. `rows` are the tokens that each matrix of the work meets,
    None: many.
    """

    flops: float = 0.0
    element: str = "f32"
    traffic: tuple[tuple[str, float], ...] = ()
    transfers: tuple[tuple[str, str, float], ...] = ()
    launches: int = 0
    threads: int | None = None
    rows: float | None = None


@dataclass(frozen=True)
class Price:
    """Seconds of a piece of work. `parts` is ((resource, seconds), ...) of all that it uses, each by itself."""

    seconds: float
    bound: str
    parts: tuple[tuple[str, float], ...] = ()
    joules: float | None = field(default=None, compare=False)


def price(work: Work, unit: ComputeUnit, target: Target) -> Price:
    """The least time that `work` takes on `unit`. Raises DiagnosticError when a rate it needs is not stated."""
    parts: dict[str, float] = {}
    if work.flops:
        rate, element = compute_rate(unit, work.element, target, work.threads)
        few = dict(unit.few_rows_efficiency).get(element)
        if work.rows is not None and work.rows < FEW_ROWS and few is not None:
            rate *= few / unit.efficiency_of(element)
        parts[f"{unit.name} {element}"] = work.flops / rate
    for name, nbytes in work.traffic:
        _add(parts, f"{name} read", nbytes / tier_rate(target, name, unit, work.threads))
    for source, goal, nbytes in work.transfers:
        resource, seconds = transfer_time(target, source, goal, nbytes)
        _add(parts, resource, seconds)
    dispatch = work.launches * dispatch_seconds(unit)
    slowest = max(parts.values(), default=0.0)
    if dispatch:
        parts["dispatch"] = dispatch
    bound = max(parts, key=lambda name: parts[name], default="nothing")
    seconds = slowest + dispatch
    return Price(seconds, bound, tuple(parts.items()), _joules(target, unit, seconds))


def compute_rate(unit: ComputeUnit, element: str, target: Target, threads: int | None = None) -> tuple[float, str]:
    """(FLOP/s with the stated efficiency, the element they are stated for) of products of `element`."""
    for name in (element, *_STAND_INS.get(element, ())):
        rate = unit.achieved_of(name, threads)
        if rate is None and unit.kind != "cpu" and unit.cores is None and dict(unit.peak).get(name) is not None:
            rate = unit.achieved_of(name, 1)  # a GPU is one core unless its file says otherwise
        if rate:
            return rate, name
    raise DiagnosticError(
        f"target {target.name} does not state what unit {unit.name} computes in {element}",
        where=target.origin or target.name,
        expected=f"a peak, such as {target.name}{{{unit.name}.peak.{element}=1TFLOP/s}}",
        hint="of this machine, 'compile-model targets calibrate' measures it" if target.name == "host" else "",
    )


def tier_rate(target: Target, name: str, unit: ComputeUnit | None = None, threads: int | None = None) -> float:
    """Bytes/s that a unit reads from a tier: with the unit's stated share when the tier is its own."""
    tier = _tier(target, name)
    rate = tier.read_rate(threads)
    if not rate:
        raise _unknown(target, f"how fast tier {name} is read", f"{name}.read=50GB/s")
    if unit is not None and unit.tier == name and unit.bandwidth_efficiency is not None:
        rate *= unit.bandwidth_efficiency
    return rate


def transfer_time(target: Target, source: str, goal: str, nbytes: float, block: int | None = None) -> tuple[str, float]:
    """(resource, seconds) of moving bytes between a storage or a tier and another one, over one copy of the link."""
    store = target.store(source) if source and target.tier(source) is None else None
    if store is not None:
        rate = store.read_rate(block)
        if not rate:
            raise _unknown(target, f"how fast storage {source} is read", "a [[storage]] with points")
        return f"{source} read", nbytes / (rate * store.count)
    store = target.store(goal) if target.tier(goal) is None else None
    if store is not None:
        rate = store.write_rate(block)
        if not rate:
            raise _unknown(target, f"how fast storage {goal} is written", "points with 'write'")
        return f"{goal} write", nbytes / (rate * store.count)
    link = target.link_between(source, goal)
    if link is None:
        raise DiagnosticError(
            f"target {target.name} has no link between {source} and {goal}", where=target.origin or target.name
        )
    rate = link.rate(goal)
    if not rate:
        raise _unknown(target, *unstated_link(link))
    return f"{link.name} {source}->{goal}", nbytes / rate


def unstated_link(link: Link) -> tuple[str, str]:
    """(what is missing, an override that states it) of a link that has no rate."""
    if link.bandwidth is not None and not link.pinned:
        return f"what link {link.name} moves of memory that is not pinned", f"{link.name}.pageable=6GB/s"
    return f"the bandwidth of link {link.name}", f"{link.name}.bandwidth=25GB/s"


def dispatch_seconds(unit: ComputeUnit) -> float:
    """What starting one kernel costs: the launch, and the meeting of the cores at its end."""
    return (unit.launch_seconds or 0.0) + (unit.barrier_seconds or 0.0)


def _joules(target: Target, unit: ComputeUnit, seconds: float) -> float | None:
    """Energy of a unit at work for this long; of the whole machine where only that is stated."""
    watts = unit.power_watts if unit.power_watts is not None else target.power_watts
    return None if watts is None else watts * seconds


def _tier(target: Target, name: str) -> MemoryTier:
    tier = target.tier(name) if name else None
    if tier is None:
        known = ", ".join(t.name for t in target.tiers) or "none"
        raise DiagnosticError(f"target {target.name} has no tier {name!r}", expected=f"one of: {known}")
    return tier


def _unknown(target: Target, what: str, override: str) -> DiagnosticError:
    return DiagnosticError(
        f"target {target.name} does not state {what}",
        where=target.origin or target.name,
        expected=f"such as {override}, in the file or as an override",
        hint="of this machine, 'compile-model targets calibrate' measures it" if target.name == "host" else "",
    )


def _add(parts: dict[str, float], name: str, seconds: float) -> None:
    parts[name] = parts.get(name, 0.0) + seconds
