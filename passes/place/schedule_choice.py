"""How far ahead weights and experts are brought, and how many micro-batches take turns: as the simulator finds best.

    chosen = best_schedule(solution, prompt, step)      # ScheduleChoice(solution, prompt, step, tried)

Depth d keeps d pieces of every stream in memory, one in use and d - 1 on their way. A piece is brought once for all
micro-batches of a step, which take their turns with it before it goes (FlexGen's block schedule, arXiv:2303.06865), so
that m micro-batches bring weights no more often than one, read them from memory m times, and let units that share a
layer work at the same time. Of the experts that a cache lacks up to `ahead` are guessed and asked for a layer early
(`passes.schedule.placed_guesses`): a wrong guess is read all the same, and in the way of what is needed sooner. All
three are tried with the placement as it is: depth 2 and one micro-batch, then one step of their ladders up or down, as
long as the session gets shorter. Where there is no room for the next larger depth, weights
that are streamed make some: the placement is solved anew (without caches of experts, whose plans take long to solve).
What has no room, what the closed form already says is no faster, and what breaks a bound of time, is not taken.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from passes.place.another_session import in_session
from passes.place.option import CACHED, STREAMED
from passes.place.outcome import objective
from passes.place.placement import TriedSchedule
from passes.place.problem import Session
from passes.place.refine import simulated, simulated_prompt
from passes.place.solve import Solution

if TYPE_CHECKING:
    from passes.schedule.placed_plan import PromptTime

DEPTHS = (2, 3, 4, 8)
MICRO_BATCHES = (1, 2, 4, 8, 16)
AHEAD = (0, 1, 2, 4, 8)
_LESS = 1 - 1e-4  # of the session: what counts as faster


@dataclass(frozen=True)
class ScheduleChoice:
    """The plan with the best schedule, its prompt and decode step as simulated, and all that was simulated for it, the
    one that it began with first; nothing where there is nothing to choose."""

    solution: Solution
    prompt: PromptTime | None
    step_seconds: float | None
    tried: tuple[TriedSchedule, ...] = ()


def best_schedule(solution: Solution, prompt: PromptTime | None, step_seconds: float | None) -> ScheduleChoice:
    """The plan itself, or the same placement with another depth or number of micro-batches. `prompt` and
    `step_seconds` are its own, as simulated; None where that cannot be done, and then it stays as it is."""
    best = ScheduleChoice(solution, prompt, step_seconds)
    if prompt is None or step_seconds is None or not _streams(solution):
        return best
    first = solution.problem.session
    tried = [TriedSchedule(first.depth, first.micro_batches, first.ahead, step_seconds, prompt.seconds)]
    seen = {first}
    lowest = objective(solution.problem, step_seconds, prompt.seconds)
    waiting = deque((solution, session) for session in _plain(solution))
    waiting.extend((solution, session) for session in _beside(solution))
    while waiting:
        like, session = waiting.popleft()
        if session in seen:
            continue
        seen.add(session)
        found = _simulated(_with(like, session), lowest)
        if found is None:
            continue
        tried += found.tried
        if found.prompt is None or found.step_seconds is None:
            continue
        value = objective(found.solution.problem, found.step_seconds, found.prompt.seconds)
        if value < lowest * _LESS:
            best, lowest = found, value
            plain = [(like, session) for like, session in waiting if like is solution and session in _plain(solution)]
            waiting = deque((*plain, *((best.solution, session) for session in _beside(best.solution))))
    return dataclasses.replace(best, tried=tuple(tried))


def _streams(solution: Solution) -> bool:
    """Whether anything passes through buffers in either phase."""
    return any(option.buffer for option, count in solution.choice if count)


def _plain(solution: Solution) -> list[Session]:
    """Depth 2, one micro-batch, and both."""
    session = solution.problem.session
    two, one = dataclasses.replace(session, depth=2), dataclasses.replace(session, micro_batches=1)
    return [dataclasses.replace(one, depth=2), one, two]


def _beside(solution: Solution) -> list[Session]:
    """The next ones on the ladders; once experts are guessed, more of them or fewer. Programs of this machine take no
    turns."""
    session = solution.problem.session
    found: list[Session] = []
    if not session.ahead:
        found = [dataclasses.replace(session, depth=depth) for depth in _next(DEPTHS, session.depth)]
    if not session.ahead and solution.problem.machine.target.name != "host":
        turns = [n for n in _next(MICRO_BATCHES, session.micro_batches) if n <= session.batch]
        found += [dataclasses.replace(session, micro_batches=n) for n in turns]
    if session.micro_batches == 1 and any(o.mode == CACHED and not o.helper for o, count in solution.choice if count):
        asked = max(option.part.top_k for option, _ in solution.choice) * session.batch
        found += [dataclasses.replace(session, ahead=n) for n in _next(AHEAD, session.ahead) if n <= asked]
    return found


def _next(ladder: tuple[int, ...], value: int) -> list[int]:
    """The next larger and the next smaller one."""
    return [*[n for n in ladder if n > value][:1], *[n for n in ladder if n < value][-1:]]


def _with(solution: Solution, session: Session) -> Solution | None:
    """The same placement in another session, or with a larger depth one that has room for it; None where none has."""
    deeper = session.depth > solution.problem.session.depth
    modes = {option.mode for option, count in solution.choice if count}
    found = in_session(solution, session, anew=deeper and STREAMED in modes and CACHED not in modes)
    return found if found is not None and found.problem.session == session else None


def _simulated(found: Solution | None, lowest: float) -> ScheduleChoice | None:
    """What a plan takes; None where it cannot be simulated, or cannot be shorter than `lowest`."""
    if found is None or found.outcome.objective >= lowest * _LESS:
        return None
    problem, session = found.problem, found.problem.session
    step = simulated(found)
    if step is None:
        return None
    late = objective(problem, step, found.outcome.prefill.seconds) >= lowest * _LESS
    prompt = None if late else simulated_prompt(found)
    if prompt is not None and not problem.slo.kept(prompt.seconds, step):
        return None
    seconds = None if prompt is None else prompt.seconds
    tried = TriedSchedule(session.depth, session.micro_batches, session.ahead, step, seconds)
    return ScheduleChoice(found, prompt, step, (tried,))
