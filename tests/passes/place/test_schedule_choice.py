"""Depth of streams and micro-batches: the simulated best, never slower than depth 2 or one micro-batch, and sound."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from ir.ops.plan_stream import ComputeOp, PrefetchOp
from passes.place.build_plan import from_placement
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.outcome import evaluate, objective
from passes.place.placement import Placement
from passes.place.problem import Pin, Problem, Session
from passes.place.refine import simulated, simulated_prompt
from passes.place.schedule_choice import best_schedule
from passes.place.solve import NoFit, Solution, replay, solve
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan
from stratum.plan_report import plan_text
from stratum.planning import PlanRequest, make_plan
from tests.passes.place.machines import MIB, dense, sparse, target, tight_machines


def value_of(solution: Solution) -> float | None:
    """The session as simulated."""
    step, prompt = simulated(solution), simulated_prompt(solution)
    return None if step is None or prompt is None else objective(solution.problem, step, prompt.seconds)


@settings(max_examples=6, deadline=None)
@given(tight_machines(), st.sampled_from([1, 2]), st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.booleans())
def test_never_slower_than_two_pieces_or_one_micro_batch(
    machine: Target, batch: int, depth: int, turns: int, experts: bool
) -> None:
    shape = sparse(2, experts=4) if experts else dense(2)
    session = Session(256, batch, 64, 64, depth=depth, micro_batches=min(batch, turns))
    try:
        solution = solve(Problem(shape, machine_of(machine), formats_of(""), session))
    except NoFit:
        assume(False)
        return
    first, prompt, step = value_of(solution), simulated_prompt(solution), simulated(solution)
    found = best_schedule(solution, prompt, step)
    if first is None or not found.tried:
        assert found.solution is solution
        return
    best = value_of(found.solution)
    assert best is not None and best <= first * (1 + 1e-9) and found.solution.outcome.fits
    used = solution.problem.session
    for plain in (
        dataclasses.replace(used, depth=2),
        dataclasses.replace(used, micro_batches=1),
        dataclasses.replace(used, depth=2, micro_batches=1),
    ):
        problem = dataclasses.replace(solution.problem, session=plain)
        choice = from_placement(problem, solution.placement)
        outcome = evaluate(problem, choice)
        other = value_of(dataclasses.replace(solution, problem=problem, choice=choice, outcome=outcome))
        assert not outcome.fits or other is None or best <= other * (1 + 2e-4)
    program = placed_plan(found.solution.problem, found.solution.choice, 2).program
    where = found.solution.problem.machine
    assert [fault.message for fault in check_stream(program, where.target, dict(where.room))] == []


def test_deeper_streams_hide_uneven_layers_as_far_as_there_is_room() -> None:
    """With room for more pieces than the solver counted on, more of them are on their way."""
    machine = machine_of(target(gpu=False, dram=9 * MIB // 2, disk=4e7))
    solution = solve(Problem(dense(6), machine, formats_of("w8a8"), Session(256, 1, 64, 64, depth=1)))
    found = best_schedule(solution, simulated_prompt(solution), simulated(solution))
    assert found.tried[0].depth == 1 and found.solution.problem.session.depth > 1
    assert found.solution.placement.session.depth == found.solution.problem.session.depth
    assert found.step_seconds is not None and found.step_seconds < found.tried[0].step_seconds
    assert len({(tried.depth, tried.micro_batches) for tried in found.tried}) == len(found.tried)


def test_nothing_streamed_leaves_nothing_to_choose() -> None:
    machine = machine_of(target(gpu=False))
    solution = solve(Problem(dense(2), machine, formats_of("w8a8"), Session(256, 1, 64, 64)))
    found = best_schedule(solution, simulated_prompt(solution), simulated(solution))
    assert found.solution is solution and found.tried == ()
    assert best_schedule(solution, None, None).solution is solution


def test_a_plan_says_what_it_tried() -> None:
    """In its text and in its file; the file may be edited and given back."""
    budget = (("vram", "1GiB"),)
    request = PlanRequest("TinyLlama-1.1B-Chat-v1.0", target="rtx-4090", budgets=budget, what_if=False)
    planned = make_plan(request)
    plan = planned.placement
    assert f"streams keep {plan.session.depth} pieces in memory" in plan_text(planned)
    assert plan.schedules and Placement.from_json(plan.to_json()) == plan
    assert plan.session.depth in [tried.depth for tried in plan.schedules]
    assert min(tried.step_seconds for tried in plan.schedules) >= plan.decode.seconds * (1 - 1e-9)


def test_a_piece_is_brought_once_for_all_micro_batches() -> None:
    """FlexGen's block schedule: the weights of a layer serve all micro-batches before they go."""
    machine = machine_of(target(gpu=False, dram=9 * MIB // 2))
    session, kv = Session(256, 4, 64, 64), Pin("kv=dram", "kv", "dram")
    solution = solve(Problem(dense(4), machine, formats_of("w8a8"), session, (kv,)))
    counts = []
    for turns in (1, 4):
        session = dataclasses.replace(solution.problem.session, micro_batches=turns)
        problem = dataclasses.replace(solution.problem, session=session)
        program = placed_plan(problem, from_placement(problem, solution.placement)).program
        kinds = [type(op) for op in program.walk()]
        counts.append((kinds.count(PrefetchOp), kinds.count(ComputeOp)))
    assert counts[0][0] == counts[1][0] > 0 and counts[1][1] == 4 * counts[0][1]


def test_a_depth_without_room_is_refused() -> None:
    """A plan that is given back with more pieces than there is room for."""
    machine = machine_of(target(gpu=False, dram=4 * MIB))
    solution = solve(Problem(dense(4), machine, formats_of("w8a8"), Session(256, 1, 64, 64)))
    session = dataclasses.replace(solution.placement.session, depth=64)
    with pytest.raises(DiagnosticError, match="the plan needs"):
        replay(solution.problem, dataclasses.replace(solution.placement, session=session))
