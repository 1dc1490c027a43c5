"""Placements as streaming plans: all of them are sound within the room of the machine, and what the simulator says of
them is near the closed form that chose them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import ir
from frontends.shape_library import load_shape
from hw_targets import load
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import simulate
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import ModuleOp
from ir.ops.plan_stream import PrefetchOp, SegmentOp
from ir.stream_interpreter import interpret_stream
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, solve
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan, step_seconds
from tests.passes.place.machines import MIB, dense, sparse, target, tight_machines


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A small model on a machine that it hardly fits."""
    experts = draw(st.sampled_from([0, 4, 16]))
    layers = draw(st.integers(1, 4))
    shape = sparse(layers, experts=experts) if experts else dense(layers)
    machine = draw(tight_machines())
    use = Session(256, draw(st.sampled_from([1, 2, 5])), 64, 64, depth=draw(st.sampled_from([1, 2, 3])))
    return Problem(shape, machine_of(machine), formats_of(""), use)


@settings(max_examples=10, deadline=None)
@given(problems(), st.sampled_from(["units", "even"]))
def test_every_placement_that_the_solver_finds_is_sound(problem: Problem, order: str) -> None:
    """Proven within the room that the solver was given; its segments are the bytes of the model and its cache, once."""
    try:
        found = solve(problem)
    except NoFit:
        assume(False)
        return
    try:
        plan = placed_plan(found.problem, found.choice, 2, order=order)
    except DiagnosticError as fault:
        assert "stream through it at once" in str(fault)
        return
    ir.verify(ModuleOp.create(plan.program))
    machine = found.problem.machine
    assert [d.message for d in check_stream(plan.program, machine.target, dict(machine.room))] == []
    interpret_stream(plan.program)
    home = sum(op.bytes for op in plan.program.walk() if isinstance(op, SegmentOp))
    held = sum(n * nbytes for o, n in found.choice for _, category, nbytes in o.holds if category != "buffers")
    assert home == held
    timeline = simulate(plan.program, machine.target)
    assert timeline.seconds >= plan_bound(plan.program, machine.target).seconds * (1 - 1e-9)


GIB = 1 << 30


def solved(model: str, machine: str, batch: int = 1, **budgets: int) -> Solution:
    shape, where = load_shape(model), machine_of(load(machine), budgets=budgets)
    return solve(Problem(shape, where, formats_of("w4a8-g32"), Session(batch=batch, context=2048)))


@pytest.mark.parametrize(
    ("model", "machine", "budgets"),
    [
        ("Llama-3.1-8B", "rtx-4090", {}),  # all of it in one memory
        ("Llama-3.1-8B", "ddr5-laptop", {"dram": 3 * GIB}),  # half of it streamed from a drive
        ("Qwen3-30B-A3B", "rtx-4090", {"vram": 16 * GIB}),  # experts in a cache
    ],
)
def test_simulated_and_closed_form_agree(model: str, machine: str, budgets: dict[str, int]) -> None:
    found = solved(model, machine, **budgets)
    seconds = step_seconds(found.problem, found.choice, samples=8, order="even")
    assert seconds == pytest.approx(found.placement.decode.seconds, rel=0.05)


def test_streams_need_other_layers_to_hide_under() -> None:
    """A GPU that streams some of its layers while the CPU computes others: kept together, the link rests while the CPU
    works; dealt evenly, it does not."""
    found = solved("Llama-3.1-70B", "rtx-4090")
    assert {o.unit for o, _ in found.choice} == {"gpu", "cores"}
    closed = found.placement.decode.seconds
    together, even = (step_seconds(found.problem, found.choice, order=order) for order in ("units", "even"))
    assert closed <= even * (1 + 1e-6) and even < 1.25 * closed < 1.5 * closed < together


def test_orders_that_do_not_exist() -> None:
    found = solve(Problem(dense(1), machine_of(target()), formats_of(""), Session(256, 1, 64, 64)))
    with pytest.raises(ValueError, match="the order units or even"):
        placed_plan(found.problem, found.choice, order="odd")


def test_any_number_of_equal_layers_may_stay() -> None:
    """With room for one MLP more, one more of eight stays, and a step is shorter by what it took to bring."""
    machine = target(gpu=False, disk=5e6)
    found, times = [], []
    whole = Problem(dense(8), machine_of(machine), formats_of(""), Session(256, 1, 64, 64))
    mlp = next(p for p in whole.parts() if p.group == "mlp").nbytes
    for room in range(10):
        where = whole.machine.with_room("dram", int(7.2 * MIB) + room * mlp)
        base = dataclasses.replace(whole, machine=where)
        pins = ("attention=dram", "head=dram", "embedding=disk", "kv=dram")
        base = dataclasses.replace(base, pins=tuple(parse_pin(p, base.shape, base.machine) for p in pins))
        choice = solve(base)
        kept = {o.mode: n for o, n in choice.choice if o.part.group == "mlp"}
        plan = placed_plan(choice.problem, choice.choice).program
        assert [d.message for d in check_stream(plan, machine, dict(where.room))] == []
        brought = [op for op in plan.walk() if isinstance(op, PrefetchOp) and ".mlp" in str(op.segment.name_hint)]
        assert len(brought) == kept.get("streamed", 0) == 8 - kept.get("resident", 0)
        found.append(kept.get("resident", 0))
        times.append(step_seconds(choice.problem, choice.choice))
    assert found == sorted(found)
    assert found[0] < found[-1] == 8 and len(set(found)) >= 6
    assert times == sorted(times, reverse=True)
    for (a, first), (b, second) in itertools.pairwise(zip(found, times, strict=True)):
        if b == a + 1 and b < 8:
            assert first - second == pytest.approx(mlp / 5e6, rel=0.02)
