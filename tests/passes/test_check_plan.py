"""The checker of plans: each fault by name, sound plans without one, and no barrier of a real plan too many."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from codegen.programs import Program
from ir.core import Op
from ir.ops import plan
from ir.ops.builtin import FuncOp
from ir.tile_memory_model import KernelFault
from passes.schedule.check_plan import check_plan
from tests.codegen.harness import Batch, Runner
from tests.passes.plan_samples import ARENA, PLAN, SHAPES, changed, lowered, model, program

BARRIER = "  plan.barrier : () -> ()\n"


def faults(text: str, arena: int = ARENA) -> list[str]:
    return [d.message for d in check_plan(program(text), arena)]


def test_a_sound_plan() -> None:
    """Two launches that read the same weights need no barrier; a buffer may begin where another has ended."""
    assert faults(PLAN) == []
    assert faults(PLAN, arena=192) == []


FAULTS = {
    "used after its release": (
        changed("  plan.release %a : (buffer<f32>) -> ()\n", "").replace(
            "  %b = plan", "  plan.release %a : (buffer<f32>) -> ()\n  %b = plan"
        ),
        ["launch of @second uses a buffer after its release"],
    ),
    "released twice": (
        changed("  plan.release %b", "  plan.release %a : (buffer<f32>) -> ()\n  plan.release %b"),
        ["'plan.release' of a buffer a second time"],
    ),
    "released without being reserved": (
        changed("  plan.release %b", "  plan.release %w : (buffer<f32>) -> ()\n  plan.release %b"),
        ["'plan.release' of a buffer that was never reserved"],
    ),
    "never released": (
        changed("  plan.release %c : (buffer<f32>) -> ()\n", ""),
        ["bytes 128..192 are never released"],
    ),
    "overlap of two that live": (
        changed("offset = 128", "offset = 100"),
        [
            "'plan.reserve' of bytes 100..164 overlaps 64..128, alive",
            "no barrier between launches of @second and @third, which both touch arena 100..128",
        ],
    ),
    "past the arena": (
        changed("offset = 128", "offset = 224"),
        ["'plan.reserve' of bytes 224..288 reaches past the arena of 256 bytes"],
    ),
    "written, then read": (
        changed(BARRIER, ""),
        ["no barrier between launches of @first and @second, which both touch arena 0..64"],
    ),
    "read, then written": (
        changed("offset = 128", "offset = 0"),
        ["no barrier between launches of @second and @third, which both touch arena 0..64"],
    ),
    "written twice": (
        changed("%w, %c {kernel = @third", "%w, %b {kernel = @third"),
        ["no barrier between launches of @second and @third, which both touch arena 64..128"],
    ),
    "cache written, then read": (
        changed("[0, 1]}\n    : (buffer<f32>, buffer<f32>, buffer<f32>, buffer<f32>) -> ()\n  plan.release %a", (
            "[0, 1]}\n    : (buffer<f32>, buffer<f32>, buffer<f32>, buffer<f32>) -> ()\n"
            "  plan.launch %kv, %out0 {kernel = @early, writes = [1], reads = [0]}"
            " : (buffer<f32>, buffer<f32>) -> ()\n  plan.release %a"
        )).replace("  %kv = plan", "  %out0 = plan.input {which = \"logits\"} : () -> buffer<f32>\n  %kv = plan"),
        ["no barrier between launches of @second and @early, which both touch kv cache 0..1"],
    ),
    "results not waited for": (
        PLAN.replace(BARRIER + "  return", "  return"),
        ["@decode ends without a barrier after its last launch"],
    ),
    "written and passed twice": (
        changed("%w, %c {kernel = @third", "%c, %c {kernel = @third"),
        ["launch of @third writes arena 128..192 as argument 1 and gets it as another one too"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_named(name: str) -> None:
    text, messages = FAULTS[name]
    assert faults(text) == messages


def test_several_faults_at_once() -> None:
    text = changed("offset = 128", "offset = 224").replace(BARRIER, "")
    assert len(faults(text)) == 5  # past the arena, three missing barriers, none at the end


def test_a_barrier_forgets_what_was_before() -> None:
    """Only launches since the last barrier are looked at: @first and @fourth share nothing that matters."""
    text = (
        changed("%b, %c, %kv, %out", "%b, %c, %kv, %again")
        .replace("  plan.release %a", "  plan.barrier : () -> ()\n  plan.release %a")
        .replace("  %out = plan.input", "  %again = plan.input")
    )
    assert faults(text) == []


# -- plans of real models


PROGRAMS = [(name, number) for name in SHAPES for number in (0, 1)]


def without(func: FuncOp, kind: type[Op]) -> Iterator[tuple[int, Op]]:
    """The program with one op of that kind missing, for each such op."""
    for index, op in enumerate(list(func.block.ops)):
        if isinstance(op, kind):
            func.block._remove(op)
            yield index, op
            func.block._insert(index, op)


def errors(chosen: Program) -> list[str]:
    return [d.message for d in check_plan(chosen.func, chosen.arena_bytes)]


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_real_plans_are_sound(name: str, number: int) -> None:
    chosen = lowered(name).programs[number]
    assert errors(chosen) == []
    largest = max(op.offset + op.bytes for op in chosen.func.block.ops if isinstance(op, plan.ReserveOp))
    assert check_plan(chosen.func, largest - 1).errors


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_no_barrier_can_go(name: str, number: int) -> None:
    chosen = lowered(name).programs[number]
    removed = 0
    for _, _ in without(chosen.func, plan.BarrierOp):
        removed += 1
        found = errors(chosen)
        assert found and all("barrier" in message for message in found)
    assert removed >= 5 and errors(chosen) == []


@pytest.mark.parametrize(("name", "number"), PROGRAMS)
def test_no_release_can_go_or_come_early(name: str, number: int) -> None:
    chosen = lowered(name).programs[number]
    for index, op in without(chosen.func, plan.ReleaseOp):
        assert any(message.endswith("are never released") for message in errors(chosen))
        last = max(i for i in range(index) if op.operands[0] in chosen.func.block.ops[i].operands)
        chosen.func.block._insert(last, op)  # before its last use
        assert any("uses a buffer after its release" in message for message in errors(chosen))
        chosen.func.block._remove(op)


def test_no_reserve_can_move_onto_another() -> None:
    """Every buffer moved to where each other one lies, while both live, is found."""
    chosen = lowered("dense").programs[1]
    reserves = [op for op in chosen.func.block.ops if isinstance(op, plan.ReserveOp)]
    assert len(reserves) > 5
    for op in reserves:
        own = op.attributes["offset"]
        for other in reserves:
            op.attributes["offset"] = other.offset
            met = alive_together(chosen.func, op, other)
            assert bool(errors(chosen)) >= (met and other is not op)
        op.attributes["offset"] = own
    assert errors(chosen) == []


def alive_together(func: FuncOp, a: Op, b: Op) -> bool:
    ops = func.block.ops
    spans = []
    for op in (a, b):
        ends = [i for i, user in enumerate(ops) if isinstance(user, plan.ReleaseOp) and op.results[0] in user.operands]
        spans.append((ops.index(op), ends[0]))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


# -- the same by running: what the checker calls a missing barrier is a race

# Kernels whose first phase gives each thread the rows that it wrote itself in the launch before.
ROWS_STAY = {("rope", "gemm"), ("gather", "gemm"), ("experts", "combine")}


def test_a_missing_barrier_is_a_fault_when_the_plan_runs() -> None:
    """Two threads, five tokens, a mixture of experts: without any one barrier the interpreter finds a race, or a kernel
    that reads what is not there yet. The plan as it is runs without a fault."""
    step = lowered("experts")
    runner = Runner(step, model("experts"), None, None)  # type: ignore[arg-type]  # nothing native is asked for
    chosen = step.programs[0]
    batch = Batch(np.arange(5), np.arange(5), np.zeros(5, int), np.arange(5))
    runner.interpreted(batch, chosen.name, 2)
    silent = set()
    for index, _ in without(chosen.func, plan.BarrierOp):
        launches = [(i, op) for i, op in enumerate(chosen.func.block.ops) if isinstance(op, plan.LaunchOp)]
        before = [op.kernel.name for i, op in launches if i < index]
        after = [op.kernel.name for i, op in launches if i >= index]
        if not after:
            continue
        try:
            runner.interpreted(batch, chosen.name, 2)
        except KernelFault as fault:
            assert "in this phase" in str(fault) or "outside of" in str(fault)
        else:
            silent.add((before[-1].split("_")[0], after[0].split("_")[0]))
    assert silent == ROWS_STAY
