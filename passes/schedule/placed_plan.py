"""A placement as streaming plans, a decode step and a prompt: its decisions op by op, to be proven and simulated.

    plan = placed_plan(problem, choice, steps=2)
    check_stream(plan.program, problem.machine.target, dict(problem.machine.room))
    seconds = step_seconds(problem, choice)       # simulated, beside placement.decode.seconds of the closed form
    time = prompt_time(problem, choice)           # of a whole prompt: time.seconds, time.bound

Every unit takes its stages in the order of a token; activations go to the next unit as a message where memories differ.
What a placement streams comes through slots, as many as the buffers that it counts have room for: one piece in use and
`depth - 1` ahead, or more smaller ones; over two links through a slot between. Missing experts are fetched when they
are known and computed in order of arrival. Drives are asked with as many requests at once as they were measured with.
Activations that pass two links are charged the second; new keys and values go home where that is one link.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hw_targets.expert_guesses import with_guesses
from hw_targets.expert_outcomes import LATE, Lacking, even_misses, simulate_steps
from hw_targets.simulator import Simulator, simulate
from hw_targets.timeline import Timeline
from ir.ops.builtin import FuncOp
from passes.place.outcome import Choice, tier_use
from passes.place.placement import RIGHT_GUESSES
from passes.place.problem import Problem
from passes.schedule.placed_emitter import Emitter
from passes.schedule.placed_prompt import prompt_stages
from passes.schedule.placed_stages import Stage, decode_stages

MOST_CHUNKS = 8  # of a prompt that are simulated one by one; of longer ones some, and the rest is read off between
RUN = 3  # chunks after which one takes as long as at any time at its depth


@dataclass(frozen=True)
class PlacedPlan:
    """The plan of `steps` steps, the expert caches that it asks: (name, most missing), and by stage how many missing
    experts it brings on a guess at most."""

    program: FuncOp
    caches: tuple[tuple[str, int], ...]
    early: Mapping[str, int]


@dataclass(frozen=True)
class PromptTime:
    """Simulated seconds of a prompt, and what most of its critical path goes to."""

    seconds: float
    bound: str


def placed_plan(
    problem: Problem, choice: Choice, steps: int = 1, *, order: str = "units", most: Mapping[str, int] | None = None
) -> PlacedPlan:
    """The plan of a choice, its layers in one of the orders of `decode_stages`.

    `most`: how many experts each cache lacks at most in what is asked about (by default all that a step needs). The
    plan is then shorter and takes as long: see `Emitter`.

    Raises DiagnosticError where the streams of two units need one tier's buffers at once."""
    stages = decode_stages(problem, choice, order)
    batches = min(problem.session.micro_batches, problem.session.batch)
    emitter = Emitter(problem, [stages] * steps, _buffers(problem, choice), "decode", batches, most)
    caches = tuple((f"{s.name}.{LATE}", s.fetches) for s in stages if s.fetches)
    return PlacedPlan(emitter.run(), caches, emitter.early)


def prompt_plan(
    problem: Problem, choice: Choice, chunks: Sequence[int] | None = None, *, order: str = "units"
) -> FuncOp:
    """The plan of some chunks of a prompt one after another, all of them by default.

    Raises DiagnosticError where the streams of two units need one tier's buffers at once."""
    wanted = range(problem.session.passes) if chunks is None else chunks
    passes = [prompt_stages(problem, choice, chunk, order, wanted[0]) for chunk in wanted]
    return Emitter(problem, passes, _buffers(problem, choice), "prefill", 1).run()


def prompt_time(problem: Problem, choice: Choice, *, order: str = "units") -> PromptTime:
    """Simulated time of a prompt, from nothing under way to its last token's logits.

    Of a prompt of many chunks the first three are simulated, then one more, and two at the end, each behind two others.
    The length of a chunk is a convex function of its depth (sums and maxima of linear ones), so that what is read off
    between is not too short.
    """
    count, target = problem.session.passes, problem.machine.target

    def run(chunks: Sequence[int] | None = None) -> Timeline:
        return simulate(prompt_plan(problem, choice, chunks, order=order), target)

    if count <= MOST_CHUNKS:
        timeline = run()
        return PromptTime(timeline.seconds, timeline.bound)
    between = [RUN, count - 2]
    counted = [(1.0, run(range(RUN)))]
    for depth, weight in zip(between, _weights(between), strict=True):
        chunks = range(depth - RUN + 1, depth + 1)
        counted += [(weight, run(chunks)), (-weight, run(chunks[:-1]))]
    last = range(count - RUN, count)  # with the head behind it
    counted += [(1.0, run(last)), (-1.0, run(last[:-1]))]
    spent: dict[str, float] = {}
    for weight, timeline in counted:
        for name, seconds in timeline.critical.items():
            spent[name] = spent.get(name, 0.0) + weight * seconds
    total = sum(weight * timeline.seconds for weight, timeline in counted)
    return PromptTime(total, max(spent, key=lambda name: spent[name], default="nothing"))


def _weights(depths: Sequence[int]) -> list[float]:
    """How often each depth counts when all whole numbers between are read off straight lines."""
    found = [0.0] * len(depths)
    found[0] = 1.0
    for i, (low, high) in enumerate(itertools.pairwise(depths)):
        steps = high - low
        found[i] += (steps - 1) / 2  # of low + 1 .. high the line gives the sum of both ends times (steps +- 1) / 2
        found[i + 1] += (steps + 1) / 2
    return found


def step_seconds(problem: Problem, choice: Choice, *, samples: int = 32, seed: int = 0, order: str = "units") -> float:
    """Simulated seconds of a decode step that follows another one, on average.

    Which experts are missing is drawn, in `samples` steps and a few more; as many as are expected, so that the mean is
    not below what the same plan takes with the expected misses."""
    asked = [s for s in decode_stages(problem, choice, order) if s.fetches]
    names: list[str] = []
    drawn, shares, most = np.zeros((1, 0), np.int64), np.ones(1), None
    if asked:
        alike: dict[Lacking, list[Stage]] = {}
        for stage in asked:
            alike.setdefault(Lacking(0, stage.chances, _kinds(stage)), []).append(stage)
        drawn, shares = even_misses([replace(g, caches=len(of)) for g, of in alike.items()], samples, seed)
        names = [stage.name for of in alike.values() for stage in of]
        most = {f"{name}.{LATE}": int(misses.max()) for name, misses in zip(names, drawn.T, strict=True)}
    times = []
    for steps in (1, 2):
        plan = placed_plan(problem, choice, steps, order=order, most=most)
        outcomes = with_guesses(drawn, shares, names, plan.early, RIGHT_GUESSES)
        seconds = simulate_steps(Simulator(plan.program, problem.machine.target), outcomes).seconds
        times.append(math.fsum(weight * time for weight, time in zip(shares.tolist(), seconds, strict=True)))
    return times[1] - times[0]


def _kinds(stage: Stage) -> tuple[int, ...]:
    """By rank of a missing expert: brought, computed by the helper, asked for first, brought for later as well."""
    if not any(stage.there):
        return ()
    first = stage.there.index(True) + 1
    return tuple(
        3 if rank == stage.later else 2 if rank == first else int(there) for rank, there in enumerate(stage.there, 1)
    )


def _buffers(problem: Problem, choice: Choice) -> dict[str, int]:
    """Bytes that the placement keeps for streams, by tier."""
    return {t.name: dict(t.used).get("buffers", 0) for t in tier_use(problem, choice)}
