"""Every way to keep the experts of a layer that are not all in the memory of the unit that computes.

    for option in expert_ways(problem, part): option.label     # cached dram->gpu slots=32, with rest@cores, split ...

`cached`: slots hold the experts that were used of late, and a missing one is brought, waited for as far as the others
do not take as long. With `helper`, a unit beside the experts' home, each missing expert is brought or computed there by
HybriMoE's rule (`passes.place.missed_experts`); of those that are computed there one is brought for later, behind the
others and as often as the link has time, so that the cache follows the session all the same. With a chance of being
let in instead of always, least recently used hits no less for a steady popularity (M. Garetto, E. Leonardi,
V. Martina, *A unified approach to the performance analysis of caching systems*, 2016), so that the rate without a
helper is taken. `split`: fixed experts on one unit, the others computed where they lie.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.target import ComputeUnit
from passes.place.missed_experts import computed_there, expected_misses
from passes.place.option import (
    CACHED,
    SOONER,
    SPLIT,
    THERE,
    Missed,
    Option,
    PhaseCost,
    compute_part,
    cross,
    keep_weights,
    move_part,
)
from passes.place.parts import Part
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts

_SLOT_STEPS = 12


def expert_ways(problem: Problem, part: Part) -> Iterator[Option]:
    """All options of this file, with several numbers of slots."""
    machine, session = problem.machine, problem.session
    grid = slot_grid(part.experts, part.top_k)
    for unit in kernels_for(part, machine.units):
        for home in (*machine.tiers, *machine.stores):
            if home == unit.tier or machine.way(home, unit.tier) is None:
                continue
            for slots in grid:
                yield _cached(problem, part, unit, home, slots)
            for helper in machine.units_of(home) if part.mix is None else ():
                for slots in grid if _helps(problem, unit, helper) else ():
                    yield _hybrid(problem, part, unit, helper, slots, SOONER)
                    yield _hybrid(problem, part, unit, helper, slots, THERE)
                for slots in grid:
                    if slots * part.expert_bytes <= machine.room_of(unit.tier) and session.batch < 64:
                        yield _split(problem, part, unit, helper, slots)


def kernels_for(part: Part, units: Sequence[ComputeUnit]) -> list[ComputeUnit]:
    """The units that a part can be built for: experts of several formats in a layer have kernels for CPUs only."""
    return [unit for unit in units if part.mix is None or unit.kind == "cpu"]


def slot_grid(experts: int, top_k: int) -> tuple[int, ...]:
    """Numbers of slots to choose from: from one token's experts to all but one, finer where few."""
    low, high = max(1, top_k), experts - 1
    if high < low:
        return ()
    steps = [low * (high / low) ** (i / (_SLOT_STEPS - 1)) for i in range(_SLOT_STEPS)]
    return tuple(sorted({round(s) for s in steps}))


def option_with(
    problem: Problem,
    part: Part,
    mode: str,
    unit: str,
    home: str,
    slots: int,
    helper: str = "",
    missed: Missed = "",
) -> Option | None:
    """The cached or split option with any number of slots; None when the machine has no such way."""
    units = {u.name: u for u in problem.machine.units}
    if unit not in units or not 0 < slots <= part.experts or home == units[unit].tier:
        return None
    if home not in dict(problem.machine.room) or problem.machine.way(home, units[unit].tier) is None:
        return None
    helpers = problem.machine.units_of(home)
    if part.mix is not None and (helper or mode == SPLIT or not kernels_for(part, [units[unit]])):
        return None
    if mode == CACHED and helper:
        found = next((h for h in helpers if h.name == helper and _helps(problem, units[unit], h)), None)
        return None if found is None else _hybrid(problem, part, units[unit], found, slots, missed or SOONER)
    if mode == CACHED:
        return _cached(problem, part, units[unit], home, slots)
    return _split(problem, part, units[unit], helpers[0], slots) if helpers else None


def _cached(problem: Problem, part: Part, unit: ComputeUnit, home: str, slots: int) -> Option:
    """Experts in slots; misses are waited for as far as the other experts, and all misses but the last to arrive, do
    not take as long."""
    session = problem.session
    option = Option(part, unit.name, home, CACHED, slots=slots, prefill_unit=unit.name)
    keep_weights(option, unit, part.nbytes, problem)
    option.holds = (*option.holds, (unit.tier, "cache", part.slot_bytes(slots)))
    option.hit = problem.cached(part.experts, part.top_k, slots, session.batch)
    needed = min(distinct_experts(part.experts, part.top_k, session.batch), part.top_k * session.batch)
    each = problem.missed_bytes(part, slots, option.hit)
    missed = needed * (1.0 - option.hit) * each
    compute_part(problem, option.decode, unit, part, needed * part.asked_bytes(session.batch), session.batch, 1)
    moves = PhaseCost()
    move_part(problem, moves, home, unit.tier, missed, part)
    slowest = max(moves.streams, key=lambda name: moves.streams[name], default="")
    started = option.decode.path.get("dispatch", 0.0)
    meanwhile = option.decode.waited - (option.decode.waited - started) / most_missing(needed)
    # Those that are guessed may come while the layer before computes, if every guess is right.
    late = max(0.0, 1.0 - session.ahead * each / missed) if missed else 0.0
    waiting = max(0.0, moves.streams.get(slowest, 0.0) * late - meanwhile)
    for resource, seconds in moves.streams.items():
        option.decode.beside(resource, seconds - waiting if resource == slowest else seconds)
    option.decode.wait(unit.name, slowest, waiting)
    rows = session.prompt_rows / session.passes
    touched = min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)
    compute_part(problem, option.prefill, unit, part, touched * part.asked_bytes(rows), rows, session.passes)
    lacking = touched * max(0.0, 1.0 - slots / part.experts) * part.rest_bytes(slots)
    move_part(problem, option.prefill, home, unit.tier, lacking * session.passes, part)
    return option


def _helps(problem: Problem, unit: ComputeUnit, helper: ComputeUnit) -> bool:
    """Whether what a cache of `unit` lacks may be computed by `helper`: a GPU is helped by what is none."""
    return problem.compute_missed and unit.kind == "gpu" and helper.kind != "gpu"


@dataclass(frozen=True)
class MissedExperts:
    """Of the r-th missing expert of a layer, r = 1.., whether the helper computes it. When `later` or more are missing
    the expert of that rank, which the helper computes, is brought as well (0: never)."""

    there: tuple[bool, ...]
    later: int


def missed_experts(problem: Problem, option: Option, rows: float, chances: Sequence[float]) -> MissedExperts:
    """How missing experts of a step of `rows` tokens are divided by the prices of the cost model; r or more are missing
    with the chance `chances[r - 1]`.

    The link brings experts for later when it has time while unit and helper work; as seldom as can be where all are
    the helper's, which leaves the link to others.
    """
    part, machine = option.part, problem.machine
    if option.missed == THERE:
        return MissedExperts((True,) * len(chances), len(chances))
    unit, helper = machine.unit(option.unit), machine.unit(option.helper)
    hops = machine.way(option.home, unit.tier) or ()
    fetch = max(transfer_time(machine.target, *hop, part.expert_bytes, part.expert_bytes)[1] for hop in hops)
    near, far = _expert_seconds(problem, part, unit, rows), _expert_seconds(problem, part, helper, rows)
    meeting = PhaseCost()
    cross(problem, meeting, unit.name, unit.tier, helper.tier, 2 * rows * problem.shape.hidden * 2)
    start = meeting.waited + price(Work(launches=part.launches), helper, machine.target).seconds
    there = computed_there(len(chances), fetch=fetch, near=near, far=far, start=start)
    if not there[0]:
        return MissedExperts(there, 0)  # the first one that is missing is brought anyway
    away = sum(c for c, at in zip(chances, there, strict=True) if at)
    time = max((needed_experts(part, rows) - away) * near, start + away * far)
    ranks = [r for r, at in enumerate(there, 1) if at]
    return MissedExperts(there, next((r for r in ranks if chances[r - 1] * fetch <= time), ranks[-1]))


def _expert_seconds(problem: Problem, part: Part, unit: ComputeUnit, rows: float) -> float:
    """One of the experts that a step of `rows` tokens touches."""
    flops = part.flops_per_token * rows / max(1.0, needed_experts(part, rows))
    traffic = ((unit.tier, float(part.expert_bytes)),)
    work = Work(flops, part.element, traffic, rows=rows * part.top_k / part.experts)
    return price(work, unit, problem.machine.target).seconds


def most_missing(needed: float) -> int:
    """How many experts are missing at most where a step needs so many on average."""
    return max(1, math.ceil(needed - 1e-9))


def missing_chances(needed: float, hit: float) -> tuple[float, ...]:
    """The chance that r or more of the experts that a step needs are missing, r = 1 .. the most there can be."""
    count = most_missing(needed)
    return tuple(chance * needed / count for chance in expected_misses(count, 1.0 - hit))


def needed_experts(part: Part, rows: float) -> float:
    """Experts of a layer that so many tokens touch."""
    return min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)


def _hybrid(problem: Problem, part: Part, unit: ComputeUnit, helper: ComputeUnit, slots: int, missed: Missed) -> Option:
    """Experts in slots; missing ones are brought, or computed by `helper` in the meantime."""
    session = problem.session
    option = Option(part, unit.name, helper.tier, CACHED, slots=slots, helper=helper.name, prefill_unit=unit.name)
    option.missed = missed
    keep_weights(option, unit, part.nbytes, problem)
    option.holds = (*option.holds, (unit.tier, "cache", slots * part.expert_bytes))
    option.hit = problem.cached(part.experts, part.top_k, slots, session.batch)
    for cost, rows, passes in (
        (option.decode, float(session.batch), 1),
        (option.prefill, session.prompt_rows / session.passes, session.passes),
    ):
        needed = needed_experts(part, rows)
        if cost is option.decode:
            chances = missing_chances(needed, option.hit)
        else:  # of a prompt as many are missing as the slots do not hold
            lacking = needed * max(0.0, 1.0 - slots / part.experts)
            count = max(1, math.ceil(lacking - 1e-9))
            chances = (lacking / count,) * count
        divided = missed_experts(problem, option, rows, chances)
        there = divided.there
        away = sum(c for c, at in zip(chances, there, strict=True) if at)
        brought = sum(chances) - away
        often = chances[there.index(True)] if any(there) else 0.0
        later = chances[divided.later - 1] if divided.later and cost is option.decode else 0.0
        _together(problem, option, cost, rows, passes, _Missed(away, brought, later, often))
    return option


@dataclass(frozen=True)
class _Missed:
    """Experts that the helper computes, that are brought for this step and for later ones, on average; the share of
    the steps in which the helper is asked."""

    away: float
    brought: float
    later: float
    often: float


def _together(problem: Problem, option: Option, cost: PhaseCost, rows: float, passes: int, missed: _Missed) -> None:
    """Unit, helper and link at the same time: the slowest is waited for."""
    away = missed.away
    part, needed = option.part, needed_experts(option.part, rows)
    unit, helper = problem.machine.unit(option.unit), problem.machine.unit(option.helper)
    near, far, link = PhaseCost(), PhaseCost(), PhaseCost()
    share = away / needed
    near_share = max(1.0 - share, 1e-9)
    compute_part(problem, near, unit, part, (needed - away) * part.expert_bytes, rows * near_share, passes, near_share)
    if away:
        compute_part(problem, far, helper, part, away * part.expert_bytes, rows * share, passes, share)
        if "dispatch" in far.path:
            far.path["dispatch"] *= min(1.0, missed.often)
        cross(problem, far, unit.name, unit.tier, helper.tier, 2 * rows * passes * problem.shape.hidden * 2)
    moved = (missed.brought + missed.later) * part.expert_bytes * passes
    move_part(problem, link, option.home, unit.tier, moved, part)
    ways = [(near.waited, unit.name, near.path), (far.waited, helper.name, far.path)]
    slowest = max(link.streams, key=lambda name: link.streams[name], default="")
    longest = max(range(2), key=lambda i: ways[i][0])
    for i, (_, name, path) in enumerate(ways):
        for resource, seconds in path.items():
            if i == longest:
                cost.wait(name, resource, seconds)
            else:
                cost.beside(resource, seconds)
    waiting = 0.0
    if cost is option.decode and missed.brought:
        now = link.streams[slowest] * missed.brought / (missed.brought + missed.later)
        waiting = max(0.0, now - ways[longest][0])
    for resource, seconds in link.streams.items():
        cost.beside(resource, seconds - waiting if resource == slowest else seconds)
    cost.wait(unit.name, slowest, waiting)


def _split(problem: Problem, part: Part, unit: ComputeUnit, helper: ComputeUnit, slots: int) -> Option:
    """The popular experts on `unit`, the others computed by `helper` where they lie, both at the same time."""
    session = problem.session
    option = Option(part, unit.name, helper.tier, SPLIT, slots=slots, helper=helper.name, prefill_unit=unit.name)
    here = slots * part.expert_bytes
    option.holds = ((unit.tier, "weights", here), (helper.tier, "weights", part.nbytes - here))
    option.hit = problem.popular(part.experts, part.top_k, slots, session.batch)
    for cost, rows, passes in (
        (option.decode, float(session.batch), 1),
        (option.prefill, session.prompt_rows / session.passes, session.passes),
    ):
        needed = min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)
        share = option.hit if cost is option.decode else slots / part.experts
        near, far = PhaseCost(), PhaseCost()
        compute_part(problem, near, unit, part, needed * share * part.expert_bytes, rows * share, passes)
        compute_part(problem, far, helper, part, needed * (1 - share) * part.expert_bytes, rows * (1 - share), passes)
        slower, name = (near, unit.name) if near.waited >= far.waited else (far, helper.name)
        for resource, seconds in slower.path.items():
            cost.wait(name, resource, seconds)
        for resource, seconds in (far if slower is near else near).path.items():
            cost.beside(resource, seconds)
        width = problem.shape.hidden * 2
        cross(problem, cost, unit.name, unit.tier, helper.tier, 2 * rows * passes * width)
    return option
