"""Prompts of placements as plans: sound, never below their closed forms, read between as if simulated whole."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import ir
from hw_targets.plan_bound import plan_bound
from hw_targets.simulator import simulate
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp, ModuleOp
from ir.ops.plan_stream import ComputeOp, PrefetchOp, SegmentOp, StoreOp
from ir.stream_interpreter import interpret_stream
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.outcome import objective
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session, Slo
from passes.place.refine import refine, simulated, simulated_prompt
from passes.place.solve import NoFit, Solution, solve
from passes.schedule import placed_plan
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import prompt_plan, prompt_time
from tests.passes.place.machines import MIB, dense, sparse, target, tight_machines


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """A small model on a machine that it hardly fits, prompts in one chunk or several, caches by the unit or not."""
    experts = draw(st.sampled_from([0, 4, 16]))
    layers = draw(st.integers(1, 3))
    shape = sparse(layers, experts=experts) if experts else dense(layers)
    machine = draw(tight_machines())
    use = Session(256, draw(st.sampled_from([1, 2])), draw(st.sampled_from([32, 64, 160])), 64, chunk=32, depth=2)
    base = Problem(shape, machine_of(machine), formats_of(""), use)
    pin = draw(st.sampled_from(["", "", "kv=disk", "kv=dram"]))
    return dataclasses.replace(base, pins=(parse_pin(pin, shape, base.machine),) if pin else ())


@settings(max_examples=8, deadline=None)
@given(problems(), st.sampled_from(["units", "even"]))
def test_every_prompt_is_sound(problem: Problem, order: str) -> None:
    try:
        found = solve(problem)
        plan = prompt_plan(found.problem, found.choice, order=order)
    except NoFit:
        return
    except DiagnosticError as fault:
        assert "stream through it at once" in str(fault) or "has no such way" in str(fault)
        return
    ir.verify(ModuleOp.create(plan))
    machine = found.problem.machine
    assert [d.message for d in check_stream(plan, machine.target, dict(machine.room))] == []
    interpret_stream(plan)
    home = sum(op.bytes for op in plan.walk() if isinstance(op, SegmentOp))
    assert home == sum(n * size for o, n in found.choice for _, category, size in o.holds if category != "buffers")
    seconds = simulate(plan, machine.target).seconds
    assert seconds >= plan_bound(plan, machine.target).seconds * (1 - 1e-9)
    # The closed form adds up what one chunk does after another, waits for keys that go to a drive, and counts a
    # crossing for every change of unit, the slowest way. In a plan chunks overlap, the last one's keys are written
    # behind its token, and rows that lie where they are wanted do not cross.
    closed = found.outcome.prefill
    crossings = sum(busy for name, busy in closed.busy if "->" in name)
    if found.problem.session.passes == 1 and not any(name.endswith("write") for name, _ in closed.busy):
        assert seconds >= (closed.seconds - crossings) * 0.98
    timed = simulated_prompt(found)
    assert timed is not None and timed.seconds >= closed.seconds


def on_a_drive(prompt: int, chunk: int, *pins: str) -> Solution:
    """A dense model of which most comes from a drive."""
    machine = machine_of(target(gpu=False, dram=4 * MIB))
    base = Problem(dense(4), machine, formats_of(""), Session(1024, 1, prompt, 64, chunk=chunk))
    return solve(dataclasses.replace(base, pins=tuple(parse_pin(pin, base.shape, machine) for pin in pins)))


def moved(plan: FuncOp) -> int:
    """Bytes of layers that are brought, keys and values left out."""
    brought = [op for op in plan.walk() if isinstance(op, PrefetchOp) and "layers." in str(op.segment.name_hint)]
    return sum(op.slot.defining_op().bytes for op in brought if ".kv" not in str(op.segment.name_hint))


def test_what_is_streamed_comes_once_a_chunk() -> None:
    found = on_a_drive(256, 64)
    streamed = sum(o.part.nbytes * n for o, n in found.choice if o.mode == "streamed" and o.part.layers)
    assert streamed > 0 and found.problem.session.passes >= 4
    without_head = [moved(prompt_plan(found.problem, found.choice, range(n))) for n in (1, 2, 3)]
    assert without_head == [streamed, 2 * streamed, 3 * streamed]


def test_attention_grows_with_depth() -> None:
    found = on_a_drive(prompt=512, chunk=64)
    passes = found.problem.session.passes
    works = []
    for chunk in (0, 1, passes - 2):
        plan = prompt_plan(found.problem, found.choice, [chunk])
        works.append(sum(op.work for op in plan.walk() if isinstance(op, ComputeOp) and "kv" in op.kernel.name))
    assert works[0] < works[1] < works[2]
    assert works[1] - works[0] == pytest.approx((works[2] - works[0]) / (passes - 2), rel=0.05)


def test_earlier_keys_are_read_after_they_were_stored() -> None:
    found = on_a_drive(256, 64, "kv=disk")
    plan = prompt_plan(found.problem, found.choice)
    passes = found.problem.session.passes
    stored = [op.attributes["over"] for op in plan.walk() if isinstance(op, StoreOp)]
    read = [op for op in plan.walk() if isinstance(op, PrefetchOp) and ".kv." in str(op.segment.name_hint)]
    assert len(stored) == passes * 4 and len(read) == 4 * passes * (passes - 1) // 2
    later = prompt_plan(found.problem, found.choice, [2, 3])
    assert [d.message for d in check_stream(later, found.problem.machine.target)] == []


def test_long_prompts_are_read_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for pins in ((), ("kv=disk",)):
        found = on_a_drive(640, 32, *pins)
        assert found.problem.session.passes > placed_plan.MOST_CHUNKS
        quick = prompt_time(found.problem, found.choice)
        with monkeypatch.context() as patch:
            patch.setattr(placed_plan, "MOST_CHUNKS", 1000)
            whole = prompt_time(found.problem, found.choice)
        assert quick.seconds == pytest.approx(whole.seconds, rel=0.03) and quick.bound == whole.bound


def test_a_faster_drive_is_never_slower() -> None:
    found = on_a_drive(prompt=128, chunk=64)
    before = simulate(prompt_plan(found.problem, found.choice), found.problem.machine.target).seconds
    faster = machine_of(target(gpu=False, dram=4 * MIB, disk=9e6)).target
    assert simulate(prompt_plan(found.problem, found.choice), faster).seconds <= before * (1 + 1e-9)


def test_prompts_are_chosen_by_simulation() -> None:
    """Moving weights to a faster unit for a prompt is judged as simulated, and bounds of latency hold of that."""
    machine = machine_of(target(vram=9 * MIB, dram_rate=1e9, link=1e8))
    base = Problem(dense(8), machine, formats_of(""), Session(512, 1, 192, 200))
    base = dataclasses.replace(base, pins=(parse_pin("mlp=cores", base.shape, machine),))
    first = solve(base)
    assert any(o.prefill_unit == "gpu" and o.unit == "cores" for o, _ in first.choice)
    refined = refine(first)
    assert refined.prompt is not None and refined.prompt.bound
    assert refined.prompt.seconds >= refined.solution.outcome.prefill.seconds
    still = solve(dataclasses.replace(base, move_for_prompts=False))
    assert all(o.prefill_unit == o.unit for o, _ in still.choice)
    prompt, step = simulated_prompt(first), simulated(first)
    assert prompt is not None and step is not None and refined.step_seconds is not None
    whole = objective(base, refined.step_seconds, refined.prompt.seconds)
    assert whole <= objective(base, step, prompt.seconds) * (1 + 1e-9)
    late = dataclasses.replace(first, problem=dataclasses.replace(base, slo=Slo(ttft=1e-9)))
    assert refine(late).solution is late  # nothing is that fast: the closed form had its say
