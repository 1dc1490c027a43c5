"""Plans chosen by simulation: never faster than their bound, never slower than the solved plan as simulated."""

from __future__ import annotations

import dataclasses

import pytest

import passes.place.refine as refine_module
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.outcome import objective
from passes.place.problem import Problem, Session, Slo
from passes.place.refine import Refined, most_tokens, refine, simulated
from passes.place.solve import Solution, solve
from tests.passes.place.machines import MIB, dense, sparse, target

USE = Session(context=256, prompt=64, generate=64)


def solved(base: Problem) -> Solution:
    return solve(base)


def value(solution: Solution, seconds: float) -> float:
    return objective(solution.problem, seconds, solution.outcome.prefill.seconds)


def test_a_plan_that_streams_less_can_win() -> None:
    machine = machine_of(target(vram=8 * MIB, dram_rate=1e8, link=8e7))
    first = solved(Problem(dense(16), machine, formats_of(""), USE))
    assert any(o.mode == "streamed" for o, _ in first.choice)
    before, refined = simulated(first), refine(first)
    assert before is not None and refined.step_seconds is not None
    assert before >= first.outcome.decode.seconds
    assert refined.step_seconds >= refined.solution.outcome.decode.seconds
    assert value(refined.solution, refined.step_seconds) <= value(first, before) * (1 + 1e-9)
    assert refined.solution.outcome.fits and refined.solution.problem.pins == ()


def test_what_stays_is_not_touched() -> None:
    first = solved(Problem(dense(4), machine_of(target()), formats_of(""), USE))
    refined = refine(first)
    assert refined.solution is first and refined.step_seconds is not None
    assert abs(refined.step_seconds / first.outcome.decode.seconds - 1) < 0.05


def test_caches_are_simulated_with_their_misses() -> None:
    machine = machine_of(target(gpu=False, dram=24 * MIB))
    first = solved(Problem(sparse(4, experts=32), machine, formats_of(""), USE))
    refined = refine(first)
    assert refined.step_seconds is not None and refined.step_seconds >= refined.solution.outcome.decode.seconds
    assert refine(first).step_seconds == refined.step_seconds  # the same draws again


def test_what_cannot_be_simulated_stays() -> None:
    first = solved(Problem(dense(4), machine_of(target()), formats_of(""), dataclasses.replace(USE, batch=2)))
    talking = dataclasses.replace(first.problem, together_decode=(("nvlink", 1e-6),))
    other = dataclasses.replace(first, problem=talking)
    assert simulated(other) is None and refine(other).solution is other
    late = dataclasses.replace(first.problem, slo=Slo(tpot=1e-12))
    assert refine(dataclasses.replace(first, problem=late)).solution.choice == first.choice


def test_the_batch_is_chosen_by_what_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of 8, 6 and 3 tokens a second, of which the first reaches 2 and the second 5: the third is not tried."""
    base = solved(Problem(dense(4), machine_of(target()), formats_of(""), USE))
    promised = [with_batch(base, batch, batch / rate) for batch, rate in ((8, 8.0), (4, 6.0), (2, 3.0))]
    reached = {8: 4.0, 4: 0.8}
    monkeypatch.setattr(refine_module, "refine", lambda s: Refined(s, reached[s.problem.session.batch]))
    solution, refined = most_tokens(promised)
    assert solution is promised[1] is refined.solution and refined.step_seconds == 0.8


def with_batch(solution: Solution, batch: int, seconds: float) -> Solution:
    problem = dataclasses.replace(solution.problem, session=dataclasses.replace(USE, batch=batch))
    placement = solution.placement
    made = dataclasses.replace(
        placement,
        session=dataclasses.replace(placement.session, batch=batch),
        decode=dataclasses.replace(placement.decode, seconds=seconds),
    )
    return dataclasses.replace(solution, problem=problem, placement=made)
