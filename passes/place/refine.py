"""The best plan by simulation among a few that are best in closed form under different rules.

    refined = refine(solution)      # Refined(solution, step_seconds, prompt): both phases as simulated, event by event

The closed form lets streams run beside everything else. In a plan they wait for slots, and for units that take turns,
so that a plan that streams less, or with more slots, can be faster than the one with the lowest bound. Tried are the
solved plan, the best without streamed weights, the best without caches of experts, the best with twice the slots, and
where prompts are computed on another unit than decode steps, the best that computes them where the weights lie. Where a
GPU and a CPU share the work, also plans of one kind: experts in a cache throughout, everything by the CPU, everything
streamed to the GPU; so that no plan is slower than these, as simulated. What cannot be simulated keeps its bound and
stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError
from passes.place.build_plan import to_placement
from passes.place.milp import FEW_NODES
from passes.place.outcome import evaluate, objective
from passes.place.problem import Pin, Problem
from passes.place.solve import Solution, choices_of, keeps_quality, solve
from passes.place.tidy import experts_whole

if TYPE_CHECKING:
    from passes.schedule.placed_plan import PromptTime

_SAMPLES = 4  # steps in which expert misses are drawn
_BATCHES = 3


@dataclass(frozen=True)
class Refined:
    """The plan that is fastest as simulated. `step_seconds` and `prompt` are None where that cannot be simulated."""

    solution: Solution
    step_seconds: float | None
    prompt: PromptTime | None = None

    @property
    def seconds(self) -> tuple[float, float]:
        """A prompt and a step, as simulated where that was possible."""
        outcome = self.solution.outcome
        prompt = self.prompt.seconds if self.prompt is not None else outcome.prefill.seconds
        return prompt, self.step_seconds if self.step_seconds is not None else outcome.decode.seconds

    @property
    def in_time(self) -> bool:
        """Whether both keep the bounds that were asked for."""
        return self.solution.problem.slo.kept(*self.seconds)


def refine(solution: Solution) -> Refined:
    """The fastest of the candidates; the given solution where none can be simulated."""
    best: Refined | None = None
    lowest, slo = 0.0, solution.problem.slo
    for candidate in _candidates(solution):
        outcome = candidate.outcome
        bound = objective(candidate.problem, outcome.decode.seconds, outcome.prefill.seconds)
        if best is not None and bound >= lowest:
            continue  # what is simulated is never below the closed form
        seconds = simulated(candidate)
        if seconds is None or not slo.kept(0.0, seconds):
            continue
        least = objective(candidate.problem, seconds, outcome.prefill.seconds)
        if best is not None and least >= lowest:
            continue
        prompt = simulated_prompt(candidate)
        length = prompt.seconds if prompt is not None else outcome.prefill.seconds
        if not slo.kept(length, seconds):
            continue
        value = objective(candidate.problem, seconds, length)
        if best is None or value < lowest * (1 - 1e-6):
            best, lowest = Refined(candidate, seconds, prompt), value
    if best is None:
        return Refined(solution, simulated(solution), simulated_prompt(solution))
    return best


def most_tokens(solutions: Sequence[Solution]) -> tuple[Solution, Refined]:
    """Of plans for several batches, most tokens a second first, the one that makes most of them as simulated, among
    those that keep the bounds of time; the first where none does.

    Bounds say which are worth simulating: those that promise more than the best reached, three of them at most.
    """
    found: list[tuple[Solution, Refined]] = []
    best: tuple[Solution, Refined] | None = None
    most = 0.0
    for solution in solutions:
        if sum(refined.in_time for _, refined in found) == _BATCHES:
            break
        if best is not None and solution.placement.tokens_per_second <= most:
            break
        refined = refine(solution)
        found.append((solution, refined))
        tokens = refined.solution.problem.session.batch / refined.seconds[1]
        if refined.in_time and tokens > most:
            best, most = found[-1], tokens
    return best or found[0]


def simulated(solution: Solution) -> float | None:
    """Seconds of a decode step, simulated: as many experts are missing as the closed form expects. None for devices
    that work as one, and where the streams of two units need one tier's buffers at once."""
    from passes.schedule.placed_plan import step_seconds

    if solution.problem.together_decode:
        return None
    try:
        return step_seconds(solution.problem, solution.choice, samples=_SAMPLES)
    except DiagnosticError:
        return None


def simulated_prompt(solution: Solution) -> PromptTime | None:
    """A prompt, simulated chunk by chunk, or the closed form where that is longer: it adds up what chunks do one after
    another, and counts keys of the last chunk that go to a drive. None where `simulated` gives none."""
    from passes.schedule.placed_plan import PromptTime, prompt_time

    if solution.problem.together_prefill:
        return None
    try:
        found = prompt_time(solution.problem, solution.choice)
    except DiagnosticError:
        return None
    least = solution.outcome.prefill
    return found if found.seconds >= least.seconds else PromptTime(least.seconds, least.bound)


def _candidates(solution: Solution) -> Iterator[Solution]:
    """The solution itself (with experts whole where that is the same), then others where it streams weights, or moves
    them for prompts."""
    problem = solution.problem
    choice = experts_whole(problem, choices_of(problem), solution.choice) if _caches(solution) else solution.choice
    if choice != solution.choice:
        outcome = evaluate(problem, choice)
        made = dataclasses.replace(to_placement(problem, choice, outcome), gap=solution.gap)
        if keeps_quality(problem, made):
            yield dataclasses.replace(solution, choice=choice, outcome=outcome, placement=made)
    yield solution
    variants = [dataclasses.replace(problem, pins=(*problem.pins, *pins)) for pins in _of_one_kind(solution)]
    if any(option.mode == "streamed" for option, _ in solution.choice):
        still = Pin("weights=resident", "weights", "resident")
        deeper = dataclasses.replace(problem.session, depth=2 * problem.session.depth)
        variants.append(dataclasses.replace(problem, pins=(*problem.pins, still)))
        variants.append(dataclasses.replace(problem, session=deeper))
    if _caches(solution):  # misses of a cache that has nearly all are little in closed form, and much one by one
        variants.append(
            dataclasses.replace(problem, pins=(*problem.pins, Pin("experts=resident", "experts", "resident")))
        )
    if any(option.missed for option, _ in solution.choice):
        variants.append(dataclasses.replace(problem, compute_missed=False))
    if any(option.prefill_unit != option.unit for option, _ in solution.choice):
        variants.append(dataclasses.replace(problem, move_for_prompts=False))
    if problem.menu is not None and any(option.part.mix is not None for option, _ in solution.choice):
        alike = dataclasses.replace(problem.menu, uses=(), uses_source="")
        variants.append(dataclasses.replace(problem, menu=alike))
    for variant in variants:
        found = _solved(variant)
        if found is not None:
            yield dataclasses.replace(found, problem=dataclasses.replace(found.problem, pins=problem.pins))


def _caches(solution: Solution) -> bool:
    return any(option.mode == "cached" for option, _ in solution.choice)


def _of_one_kind(solution: Solution) -> Iterator[tuple[Pin, ...]]:
    """Pins of plans that are simpler than one that divides its work between a GPU and the CPU."""
    units = {o.unit for o, _ in solution.choice} | {o.helper for o, _ in solution.choice if o.helper}
    used = [u for u in solution.problem.machine.units if u.name in units]
    gpu, cpu = (next((u.name for u in used if u.kind == kind), "") for kind in ("gpu", "cpu"))
    if not gpu or not cpu:
        return
    if any(o.part.experts and o.mode != "cached" for o, _ in solution.choice):
        yield (Pin("experts=cached", "experts", "cached"),)
    groups = ("attention", "mlp", "experts", "head", "kv")
    yield tuple(Pin(f"{group}={cpu}", group, cpu) for group in groups)
    streams = tuple(Pin(f"{group}=streamed", group, "streamed") for group in ("attention", "mlp", "experts"))
    yield (*streams, *(Pin(f"{group}={gpu}", group, gpu) for group in groups))


def _solved(problem: Problem) -> Solution | None:
    try:
        return solve(problem, FEW_NODES)
    except DiagnosticError:  # nothing fits, or a pin of the user's leaves nothing beside ours
        return None
