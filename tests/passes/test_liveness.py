"""Liveness of values in a block, and the lifetimes that the arena is made from."""

from __future__ import annotations

import pytest

import ir
from ir.core import Value
from passes.schedule.arena import assign_arena, check_arena
from passes.schedule.liveness import Liveness

TEXT = """
func @main(%x: tensor<4 x f32>) -> tensor<2 x 2 x f32> {
  %a = tensor.silu %x : (tensor<4 x f32>) -> tensor<4 x f32>
  %b = tensor.reshape %a {shape = [2, 2]} : (tensor<4 x f32>) -> tensor<2 x 2 x f32>
  %dead = tensor.silu %a : (tensor<4 x f32>) -> tensor<4 x f32>
  %c = tensor.fused %b {kind = "elementwise"} ({
    ^(%p: tensor<2 x 2 x f32>):
      %q = tensor.silu %p : (tensor<2 x 2 x f32>) -> tensor<2 x 2 x f32>
      tensor.yield %q : (tensor<2 x 2 x f32>) -> ()
  }) : (tensor<2 x 2 x f32>) -> tensor<2 x 2 x f32>
  return %c : tensor<2 x 2 x f32>
}
"""


def shares_with(value: Value) -> Value | None:
    """A reshape has the bytes of its operand."""
    op = value.defining_op()
    return op.operands[0] if op is not None and op.name == "tensor.reshape" else None


def lives(**options: object) -> dict[str, tuple[int, int]]:
    func = ir.parse(TEXT).functions[0]
    liveness = Liveness(func.block, **options)  # type: ignore[arg-type]
    return {x.buffer.name_hint: (x.first, x.last) for x in liveness.lifetimes(lambda v: 16)}  # type: ignore[attr-defined]


def test_values_live_from_their_op_to_their_last_reader():
    assert lives() == {"x": (-1, 0), "a": (0, 2), "b": (1, 3), "dead": (2, 2), "c": (3, 4)}


def test_values_that_share_bytes_are_one_buffer():
    assert lives(same_memory=shares_with) == {"x": (-1, 0), "a": (0, 3), "dead": (2, 2), "c": (3, 4)}


def test_only_sized_values_need_room():
    func = ir.parse(TEXT).functions[0]
    liveness = Liveness(func.block, shares_with)
    found = liveness.lifetimes(lambda v: None if v.defining_op() is None else 16)
    assert [x.buffer.name_hint for x in found] == ["a", "dead", "c"]  # type: ignore[attr-defined]
    arena = assign_arena(found)
    assert check_arena(found, arena) == []
    assert arena.total_bytes == 128  # two lines: nothing here needs three at once


def test_readers_in_regions_count_for_the_op_of_the_block():
    func = ir.parse(TEXT).functions[0]
    liveness = Liveness(func.block)
    inner = next(op for op in func.walk() if op.name == "tensor.yield")
    assert liveness.step_of(inner) == 3
    assert liveness.buffer_of(func.arguments[0]) is func.arguments[0]
    other = ir.parse(TEXT).functions[0]
    with pytest.raises(ValueError, match=r"tensor\.silu .* is not inside the block"):
        liveness.step_of(next(other.ops))
