"""From how many tokens on prompts move weights: not below the closed form, and there it is faster as simulated."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import passes.schedule.placed_plan as placed_plan
from ir.diagnostics import DiagnosticError
from passes.place.build_plan import prefill_threshold
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.prefill_mode import PrefillMode, for_prompt, prefill_mode
from passes.place.problem import Pin, Problem, Session
from passes.place.solve import Solution, solve
from tests.passes.place.machines import MIB, dense, sparse, target

PINS = tuple(Pin(f"{group}=cores", group, "cores") for group in ("mlp", "experts"))
NOTHING = PrefillMode(None, None)


def by_the_cpu(link: float, kind: str = "dense", layers: int = 3) -> Solution:
    """A plan whose MLPs and experts are computed by the CPU in decode steps, beside a GPU."""
    shape = dense(layers) if kind == "dense" else sparse(layers)
    machine = machine_of(target(vram=32 * MIB, dram_rate=1e9, link=link))
    return solve(Problem(shape, machine, formats_of(""), Session(context=256, prompt=64, generate=64), pins=PINS))


@settings(max_examples=6, deadline=None)
@given(link=st.sampled_from([3e6, 1e8, 3e9]), kind=st.sampled_from(["dense", "sparse"]), layers=st.integers(2, 4))
def test_moving_is_faster_from_there_on_as_simulated(link: float, kind: str, layers: int) -> None:
    solution = by_the_cpu(link, kind, layers)
    bound = prefill_threshold(solution.problem, solution.choice)
    found = prefill_mode(solution.problem, solution.choice)
    assert found.bound == bound
    if found.tokens is None or bound is None:
        assert found == NOTHING or found.simulated
        return
    assert found.simulated and found.tokens >= bound and (found.tokens // bound).bit_count() == 1
    for tokens in {found.tokens, max(bound, found.tokens // 2)}:
        session = dataclasses.replace(solution.problem.session, prompt=tokens, chunk=tokens)
        trial = dataclasses.replace(solution.problem, session=session, pins=())
        moves, stays = (for_prompt(trial, solution.choice, moved) for moved in (True, False))
        assert moves is not None and stays is not None
        faster = placed_plan.prompt_time(trial, moves).seconds < placed_plan.prompt_time(trial, stays).seconds
        assert faster == (tokens == found.tokens)


def test_a_faster_link_moves_shorter_prompts() -> None:
    found = [prefill_mode(s.problem, s.choice) for s in map(by_the_cpu, (1e8, 1e9, 1e10))]
    tokens = [one.tokens or 1 << 20 for one in found]
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] < 1 << 20


def test_what_cannot_be_simulated_keeps_the_closed_form(monkeypatch: pytest.MonkeyPatch) -> None:
    solution = by_the_cpu(1e9)
    bound = prefill_threshold(solution.problem, solution.choice)
    assert bound is not None

    def refuses(problem: Problem, choice: object) -> None:
        raise DiagnosticError("two units need one tier's buffers at once")

    monkeypatch.setattr(placed_plan, "prompt_time", refuses)
    assert prefill_mode(solution.problem, solution.choice) == PrefillMode(bound, bound)
    alone = solve(Problem(dense(2), machine_of(target(gpu=False)), formats_of(""), Session(context=64, prompt=8)))
    assert prefill_mode(alone.problem, alone.choice) == NOTHING


def test_what_a_cache_lacks_has_a_threshold() -> None:
    """Missing experts are computed by the CPU for short prompts, and moved to the GPU for long ones."""
    machine = machine_of(target(vram=8 * MIB, dram_rate=1e9, link=1e9))
    pins = (Pin("experts=cached", "experts", "cached"),)
    use = Session(context=256, prompt=64, generate=64)
    solution = solve(Problem(sparse(2), machine, formats_of(""), use, pins=pins))
    assert any(option.helper for option, _ in solution.choice if option.part.experts)
    mode = prefill_mode(solution.problem, solution.choice)
    assert mode.bound is not None and mode.tokens is not None and mode.tokens >= mode.bound
    assert solution.placement.prefill_threshold == mode.bound and mode.simulated
