"""Barriers of the plan: exactly where memory is handed over, memory that the arena uses again included."""

from __future__ import annotations

import ir
from codegen.compile_step import program_specs
from codegen.lower_to_plan import lower_program
from codegen.lowering import Lowering
from codegen.programs import Program, WeightsFile
from ir.ops import plan
from passes.schedule.check_plan import check_plan

# %c depends on nothing before it, but its memory is that of %a, which the launch before it still reads.
REUSE = """\
func @step(%x: tensor<tokens x 64 x f32>, %y: tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32> {
  %a = tensor.silu %x : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  %b = tensor.silu %a : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  %c = tensor.silu %y : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  %d = tensor.add %b, %c : (tensor<tokens x 64 x f32>, tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  return %d : tensor<tokens x 64 x f32>
}
"""
INDEPENDENT = """\
func @step(%x: tensor<tokens x 64 x f32>, %y: tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32> {
  %a = tensor.silu %x : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  %b = tensor.silu %y : (tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  %c = tensor.add %a, %b : (tensor<tokens x 64 x f32>, tensor<tokens x 64 x f32>) -> tensor<tokens x 64 x f32>
  return %c : tensor<tokens x 64 x f32>
}
"""


def lowered(text: str) -> Program:
    lowering = Lowering(ir.parse(text).function("step"))
    return lower_program(lowering, program_specs(frozenset())[0], WeightsFile.empty())


def shape(program: Program) -> str:
    """L for a launch, | for a barrier."""
    letters = {plan.LaunchOp: "L", plan.BarrierOp: "|"}
    return "".join(letters.get(type(op), "") for op in program.func.block.ops)


def test_memory_used_again_is_handed_over() -> None:
    program = lowered(REUSE)
    reserved = [op.offset for op in program.func.block.ops if isinstance(op, plan.ReserveOp)]
    assert len(reserved) == 3 and len(set(reserved)) == 2  # the case at hand: %c took the place of %a
    assert shape(program) == "L|L|L|L|"
    check_plan(program.func, program.arena_bytes).raise_if_errors()


def test_independent_launches_need_none() -> None:
    program = lowered(INDEPENDENT)
    assert shape(program) == "LL|L|"
    check_plan(program.func, program.arena_bytes).raise_if_errors()


def test_the_checker_misses_every_barrier() -> None:
    """Without any one of its barriers the plan is refused."""
    count = shape(lowered(REUSE)).count("|")
    for index in range(count):
        program = lowered(REUSE)
        barriers = [op for op in program.func.block.ops if isinstance(op, plan.BarrierOp)]
        program.func.block.ops.remove(barriers[index])
        faults = [d.message for d in check_plan(program.func, program.arena_bytes).errors]
        assert len(faults) >= 1 and "barrier" in faults[0]
