"""What more of something would buy: the same problem solved again with a little more of each resource.

    for gain in gains(solution): gain.what, gain.decode, gain.prefill

One GiB more of every tier that is filled to within that, 10 GB/s more of what bounds a phase (1 GB/s of a drive), and
the next format down of the ladder. Sorted by what they save of a whole session.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from passes.place.formats import next_down
from passes.place.gain import GIB, Gain, with_rate
from passes.place.milp import FEW_NODES
from passes.place.outcome import Outcome
from passes.place.problem import Problem
from passes.place.solve import NoFit, Solution, solve


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
