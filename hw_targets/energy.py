"""Energy of a phase from the power that a target states: who works how long, and what every byte that moves costs.

    energy(target, seconds, busy, ["gpu"])      # joules; None where nothing that takes part states its power

`busy` are seconds of work by resource, as closed forms and prices name them: `gpu f16`, `vram read`, `nvme read`,
`pcie dram->vram`. Where the target states the power of a whole node, that holds for all its nodes. Else each unit that
takes part is at `power` while it works, or throughout where it does not state its `idle` power; memories, links and
drives add their own power likewise, and `energy` for each byte. What states nothing adds nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from hw_targets.target import Link, MemoryTier, Storage, Target


def energy(target: Target, seconds: float, busy: Mapping[str, float], units: Collection[str]) -> float | None:
    """Joules of `seconds` in which `units` take part."""
    if target.power_watts is not None:
        return target.power_watts * target.nodes * seconds
    known: list[float] = []
    for unit in target.units:
        working = sum(s for name, s in busy.items() if name.startswith(f"{unit.name} ") or name == f"{unit.tier} read")
        if unit.name in units:
            known += _drawn(unit.power_watts, unit.idle_watts, seconds, working)
        elif unit.idle_watts is not None:
            known.append(unit.idle_watts * seconds)
    for place in (*target.tiers, *target.storage, *target.links):
        known += _of_place(place, seconds, busy)
    return sum(known) if known else None


def _drawn(power: float | None, idle: float | None, seconds: float, working: float) -> list[float]:
    """What something takes that works for a part of the time; nothing where no power is stated."""
    if power is None:
        return []
    at_work = seconds if idle is None else min(seconds, working)
    return [power * at_work + (idle or 0.0) * (seconds - at_work)]


def _of_place(place: MemoryTier | Storage | Link, seconds: float, busy: Mapping[str, float]) -> list[float]:
    """What a memory, a drive or a link takes, if it is used."""
    moved, working = 0.0, 0.0
    for name, spent in busy.items():
        rate = _rate(place, name)
        if rate is not None:
            working, moved = working + spent, moved + spent * rate
    if not working:
        return []
    idle = None if isinstance(place, Link) else place.idle_watts
    found = _drawn(place.power_watts, idle, seconds, working)
    return found if place.joules_per_byte is None else [*found, place.joules_per_byte * moved]


def _rate(place: MemoryTier | Storage | Link, resource: str) -> float | None:
    """Bytes/s that a resource moves if it is of this place."""
    if isinstance(place, Link):
        ends = {
            f"{place.name} {a}->{b}": b for a, b in ((place.from_tier, place.to_tier), (place.to_tier, place.from_tier))
        }
        return place.rate(ends[resource]) if resource in ends else None
    if resource == f"{place.name} read":
        return place.read_rate()
    return place.write_rate() if resource == f"{place.name} write" else None
