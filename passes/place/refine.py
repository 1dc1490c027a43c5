"""The best plan by simulation among a few that are best in closed form under different rules.

    refined = refine(solution)      # Refined(solution, step_seconds): the decode step as simulated, event by event

The closed form lets streams run beside everything else. In a plan they wait for slots, and for units that take turns,
so that a plan that streams less, or with more slots, can be faster than the one with the lowest bound. Tried are the
solved plan, the best without streamed weights, and the best with twice the slots. What cannot be simulated keeps its
bound and stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError
from passes.place.outcome import objective
from passes.place.problem import Pin, Problem, Slo
from passes.place.solve import Solution, solve

_SAMPLES = 8  # draws of expert misses


@dataclass(frozen=True)
class Refined:
    """The plan that is fastest as simulated. `step_seconds` is None where plans of this kind cannot be simulated."""

    solution: Solution
    step_seconds: float | None


def refine(solution: Solution) -> Refined:
    """The fastest of the candidates; the given solution where none can be simulated."""
    best: Refined | None = None
    lowest = 0.0
    for candidate in _candidates(solution):
        seconds = simulated(candidate)
        if seconds is None or _late(candidate, seconds, solution.problem.slo):
            continue
        value = objective(candidate.problem, seconds, candidate.outcome.prefill.seconds)
        if best is None or value < lowest * (1 - 1e-6):
            best, lowest = Refined(candidate, seconds), value
    if best is None:
        return Refined(solution, simulated(solution))
    return best


def simulated(solution: Solution) -> float | None:
    """Seconds of a decode step, simulated; never below the closed form. None for micro-batches and shared buffers."""
    from passes.schedule.placed_plan import step_seconds

    if solution.problem.session.micro_batches > 1 or solution.problem.together_decode:
        return None
    try:
        found = step_seconds(solution.problem, solution.choice, samples=_SAMPLES)
    except DiagnosticError:
        return None
    return max(found, solution.outcome.decode.seconds)


def _late(candidate: Solution, seconds: float, slo: Slo) -> bool:
    return slo.tpot is not None and seconds > slo.tpot


def _candidates(solution: Solution) -> Iterator[Solution]:
    """The solution itself, then others where it streams weights."""
    yield solution
    if all(option.mode != "streamed" for option, _ in solution.choice):
        return
    problem = solution.problem
    still = Pin("weights=resident", "weights", "resident")
    deeper = dataclasses.replace(problem.session, depth=2 * problem.session.depth)
    for variant in (
        dataclasses.replace(problem, pins=(*problem.pins, still)),
        dataclasses.replace(problem, session=deeper),
    ):
        found = _solved(variant)
        if found is not None:
            yield dataclasses.replace(found, problem=dataclasses.replace(found.problem, pins=problem.pins))


def _solved(problem: Problem) -> Solution | None:
    try:
        return solve(problem)
    except DiagnosticError:  # nothing fits, or a pin of the user's leaves nothing beside ours
        return None
