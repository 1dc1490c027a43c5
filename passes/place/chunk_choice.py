"""How many tokens of a prompt pass at once: the chunk with which a session is simulated to be shortest.

    chosen = best_chunk(solution, prompt, step)      # ChunkChoice(solution, prompt, step, tried)

What a plan moves for a prompt it moves once a chunk, so that longer chunks move less and take more room for
activations, which weights then lack. Shorter ones than were asked for are the solver's own choice
(`passes.place.solve`). Here plans with chunks twice as long, and again, are simulated, as long as they fit and make the
session shorter: the same placement where it has the room, else one solved anew. Plans for this machine keep to what its
programs take. What cannot be simulated stays.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.place.another_session import in_session
from passes.place.outcome import objective
from passes.place.refine import simulated, simulated_prompt
from passes.place.solve import Solution

if TYPE_CHECKING:
    from passes.schedule.placed_plan import PromptTime

MOST_DOUBLINGS = 4


@dataclass(frozen=True)
class ChunkChoice:
    """The plan with the best chunk, its prompt and decode step as simulated, and of all chunks tried the seconds of
    a prompt and of a step."""

    solution: Solution
    prompt: PromptTime | None
    step_seconds: float | None
    tried: tuple[tuple[int, float, float], ...] = ()


def best_chunk(solution: Solution, prompt: PromptTime | None, step_seconds: float | None) -> ChunkChoice:
    """The plan itself, or one with a longer chunk."""
    best = ChunkChoice(solution, prompt, step_seconds)
    session = solution.problem.session
    if prompt is None or step_seconds is None or session.passes == 1 or solution.problem.machine.target.name == "host":
        return best
    tried = [(session.chunk, prompt.seconds, step_seconds)]
    lowest = objective(solution.problem, step_seconds, prompt.seconds)
    for doubling in range(1, MOST_DOUBLINGS + 1):
        chunk = min(session.chunk << doubling, session.prompt)
        longer = _with_chunk(best.solution, chunk)
        step = simulated(longer) if longer is not None else None
        found = simulated_prompt(longer) if longer is not None else None
        if longer is None or found is None or step is None:
            break
        tried.append((chunk, found.seconds, step))
        value, slo = objective(longer.problem, step, found.seconds), longer.problem.slo
        if value >= lowest * (1 - 1e-6) or step > (slo.tpot or step) or found.seconds > (slo.ttft or found.seconds):
            break
        best, lowest = ChunkChoice(longer, found, step), value
        if chunk == session.prompt:
            break
    return dataclasses.replace(best, tried=tuple(tried))


def _with_chunk(solution: Solution, chunk: int) -> Solution | None:
    """The same placement with another chunk, or one with less in the memory that activations take; None where nothing
    fits."""
    found = in_session(solution, dataclasses.replace(solution.problem.session, chunk=chunk))
    return found if found is not None and found.problem.session.chunk == chunk else None
