"""Experts that are brought on a guess: plans stay sound within the same room, and outcomes add up."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ir
from hw_targets.expert_guesses import with_guesses
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import Simulator
from ir.ops.builtin import ModuleOp
from ir.ops.plan_stream import SegmentOp
from ir.stream_interpreter import interpret_stream
from passes.place.build_plan import from_placement
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.outcome import Choice, evaluate
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.refine import simulated, simulated_prompt
from passes.place.schedule_choice import best_schedule
from passes.place.solve import NoFit, Solution, solve
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan, step_seconds
from tests.passes.place.machines import MIB, sparse, target


def cached(dram: float, disk: float = 3e7, top_k: int = 2, depth: int = 2) -> Solution:
    """A mixture whose experts come from the drive into a cache."""
    machine = machine_of(target(gpu=False, dram=int(dram * MIB), disk=disk))
    shape = sparse(4, experts=16, top_k=top_k)
    pin = parse_pin("experts=cached", shape, machine)
    return solve(Problem(shape, machine, formats_of("w8a8"), Session(256, 1, 64, 64, depth=depth), (pin,)))


def with_ahead(found: Solution, ahead: int) -> tuple[Problem, Choice]:
    session = dataclasses.replace(found.problem.session, ahead=ahead)
    problem = dataclasses.replace(found.problem, session=session, pins=())
    return problem, from_placement(problem, found.placement)


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([6, 7, 9, 12]), st.sampled_from([3e6, 3e7, 3e8]), st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 3]), st.integers(1, 4), st.data(),
)  # fmt: skip
def test_plans_that_guess_are_sound(
    dram: int, disk: float, top_k: int, depth: int, ahead: int, data: st.DataObject
) -> None:
    try:
        found = cached(dram, disk, top_k, depth)
    except NoFit:
        assume(False)
        return
    problem, choice = with_ahead(found, ahead)
    plan = placed_plan(problem, choice, 2)
    ir.verify(ModuleOp.create(plan.program))
    machine = problem.machine
    assert [d.message for d in check_stream(plan.program, machine.target, dict(machine.room))] == []
    interpret_stream(plan.program)
    assert all(0 <= count <= min(ahead, top_k) for count in plan.early.values())
    before = placed_plan(found.problem, found.choice, 2)
    homes = [sum(op.bytes for op in p.program.walk() if isinstance(op, SegmentOp)) for p in (plan, before)]
    assert homes[0] == homes[1]  # what is at home is the same
    simulator = Simulator(plan.program, machine.target)
    whole = simulator.run()
    assert whole.seconds >= plan_bound(plan.program, machine.target).seconds * (1 - 1e-9)
    some = {entry[0]: data.draw(st.integers(0, entry[1])) for entry in plan.caches}
    some |= {f"{name}.early": data.draw(st.integers(0, most)) for name, most in plan.early.items()}
    assert simulator.run(some).seconds <= whole.seconds * (1 + 1e-9)
    bound = evaluate(problem, choice).decode.seconds
    assert step_seconds(problem, choice, samples=2) >= bound * (1 - 1e-9)


def test_guesses_are_chosen_where_they_pay_and_told() -> None:
    found = cached(11.0)
    chosen = best_schedule(found, simulated_prompt(found), simulated(found))
    asked = {tried.ahead: tried.step_seconds for tried in chosen.tried if tried.depth == 2}
    assert 0 in asked and chosen.step_seconds is not None and chosen.step_seconds <= min(asked.values()) * (1 + 1e-9)
    assert chosen.solution.placement.session.ahead == chosen.solution.problem.session.ahead > 0
    assert asked[chosen.solution.problem.session.ahead] < asked[0]


@given(st.data(), st.integers(1, 8), st.integers(1, 4), st.floats(0, 1))
def test_what_is_missing_adds_up(data: st.DataObject, rows: int, layers: int, right: float) -> None:
    """What comes late and what was guessed rightly is what is missing; guesses come true as often as said, or less."""
    misses = np.array(data.draw(st.lists(st.lists(st.integers(0, 8), min_size=layers, max_size=layers), min_size=rows,
                                         max_size=rows)))  # fmt: skip
    weights = np.full(rows, 1.0 / rows)
    names = [f"layers.{i}" for i in range(layers)]
    early = {name: data.draw(st.integers(0, 4)) for name in names[1:]}
    steps = with_guesses(misses, weights, names, early, right)
    asked = sum(step.get(f"{name}.early", 0) for step in steps for name in names)
    come = sum(int(misses[n, i]) - step[f"{name}.late"] for n, step in enumerate(steps) for i, name in enumerate(names))
    assert abs(asked * right - come) <= 0.5 + 1e-6
    for step, row in zip(steps, misses.tolist(), strict=True):
        for name, missing in zip(names, row, strict=True):
            assert 0 <= step[f"{name}.late"] <= missing
            assert missing - step[f"{name}.late"] <= step.get(f"{name}.early", 0) <= min(missing, early.get(name, 0))
    assert all(f"{names[0]}.early" not in step for step in steps)


def test_what_is_no_outcome_is_refused() -> None:
    with pytest.raises(ValueError, match="expected misses of shape"):
        with_guesses(np.zeros((2, 1), int), np.ones(1), ["a"], {}, 1.0)
    with pytest.raises(ValueError, match="share of right guesses"):
        with_guesses(np.zeros((1, 1), int), np.ones(1), ["a"], {}, 1.5)
