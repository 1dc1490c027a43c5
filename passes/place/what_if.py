"""What more of something would buy: the same problem solved again with a little more of each resource.

    for gain in gains(solution): gain.what, gain.decode, gain.prefill

One GiB more of every tier that is filled to within that, 10 GB/s more of what bounds a phase (1 GB/s of a drive), and
the next format down of the ladder. Sorted by what they save of a whole session.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass

from hw_targets.target import Storage, Target
from passes.place.formats import next_down
from passes.place.milp import FEW_NODES
from passes.place.outcome import Outcome
from passes.place.problem import Problem
from passes.place.solve import NoFit, Solution, solve

GIB = 1 << 30
_RATE = 10e9
_DISK_RATE = 1e9


@dataclass(frozen=True)
class Gain:
    """The lengths of both phases with a change, and the share of a session's time that it saves."""

    what: str
    decode: float
    prefill: float
    saved: float


def gains(solution: Solution, again: Callable[[Problem], Outcome] | None = None) -> tuple[Gain, ...]:
    """Every change that was tried, those that save most first. `again` places a problem; by default it is solved."""
    found = []
    for what, problem in changes(solution):
        try:
            after = again(problem) if again is not None else solve(problem, FEW_NODES).outcome
        except NoFit:
            continue
        before = solution.outcome.objective
        saved = max(0.0, 1.0 - after.objective / before) if before else 0.0
        found.append(Gain(what, after.decode.seconds, after.prefill.seconds, saved))
    return tuple(sorted(found, key=lambda g: (-g.saved, g.what)))


def changes(solution: Solution) -> list[tuple[str, Problem]]:
    """(what, the problem with it), in a fixed order."""
    problem, outcome = solution.problem, solution.outcome
    found: list[tuple[str, Problem]] = []
    for tier in outcome.tiers:
        if tier.total + GIB > tier.room and problem.machine.target.tier(tier.name) is not None:
            more = problem.machine.with_room(tier.name, tier.room + GIB)
            found.append((f"+1 GiB of {tier.name}", dataclasses.replace(problem, machine=more)))
    for bound in dict.fromkeys((outcome.decode.bound, outcome.prefill.bound)):
        faster = with_rate(problem.machine.target, bound)
        if faster is not None:
            target, amount = faster
            more = problem.machine.with_target(target)
            found.append((f"+{amount} of {bound}", dataclasses.replace(problem, machine=more)))
    lower = next_down(problem.formats)
    if lower is not None:
        found.append((f"--recipe {lower.name}", dataclasses.replace(problem, formats=lower)))
    return found


def with_rate(target: Target, resource: str) -> tuple[Target, str] | None:
    """The target with a little more of a named resource, and how much; None for what is no rate of bytes."""
    name, _, rest = resource.partition(" ")
    tier = target.tier(name) if name else None
    if rest == "read" and tier is not None and tier.read_bandwidth is not None:
        points = tuple((threads, rate + _RATE) for threads, rate in tier.read_by_threads)
        changed = dataclasses.replace(tier, read_bandwidth=tier.read_bandwidth + _RATE, read_by_threads=points)
        tiers = tuple(changed if t.name == name else t for t in target.tiers)
        return dataclasses.replace(target, tiers=tiers), "10 GB/s"
    store = target.store(name) if name else None
    if rest == "read" and store is not None and store.points:
        return dataclasses.replace(
            target, storage=tuple(_faster(s) if s.name == name else s for s in target.storage)
        ), "1 GB/s"
    link = next((x for x in target.links if x.name == name), None)
    if link is not None and link.bandwidth is not None:
        back = None if link.back_bandwidth is None else link.back_bandwidth + _RATE
        changed = dataclasses.replace(link, bandwidth=link.bandwidth + _RATE, back_bandwidth=back)
        return dataclasses.replace(target, links=tuple(changed if x is link else x for x in target.links)), "10 GB/s"
    return None


def _faster(store: Storage) -> Storage:
    """Every point faster in the proportion that adds 1 GB/s to the best."""
    best = max(p.read_bandwidth for p in store.points)
    factor = (best + _DISK_RATE) / best
    points = tuple(dataclasses.replace(p, read_bandwidth=p.read_bandwidth * factor) for p in store.points)
    return dataclasses.replace(store, points=points)
