"""Grid level: products of four warps (a warpgroup) that go on by themselves: registers with a tile of shared memory.

The left factor is in registers. A tile of the right one has rows of 128 bytes, 64 numbers of 16 bits or 128 of 8; piece
p of 16 bytes of row r lies at piece p xor (r mod 8), and the first row on a multiple of 1024 bytes ("128-byte swizzle",
NVIDIA, "Parallel Thread Execution ISA", 9.7.15). Sums of a product that has not been waited for may go into the next
product and nowhere else, and the registers and bytes of its factors may not be written. What a thread wrote, or copied
by `grid.async_copy`, it makes known to products by `grid.fence_async`; bytes of `grid.bulk_copy` are known to them. For
sm_90a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ir.formats import BF16, F8E4M3, F16, F32, I8, I32, NumberFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops.tile_types import element_of, lanes_of
from ir.traits import Synchronizes
from ir.types import INDEX, BufferType, Type, VectorType

WARPGROUP = 128  # threads
ROWS = 64  # of the left factor
STEPS = 4  # instructions that a tile has columns for
STEP_BYTES = 32  # of a row, for one instruction; a thread has half as many of the left factor
SUMS = {BF16: F32, F16: F32, F8E4M3: F32, I8: I32}  # of products of these
_LANES = {F32: "4, 8, ..., 128 lanes of f32", I32: "4, 8, 12, 16 or a multiple of 8 lanes of i32"}


def step_lanes(element: NumberFormat) -> int:
    """Numbers of a thread in a step of the left factor; a step has twice as many columns."""
    assert element in SUMS
    return STEP_BYTES * 8 // element.bits // 2  # pyright: ignore[reportAttributeAccessIssue]


@register_op
class FenceAsyncOp(Op):
    """What this thread has written to shared memory is known to `grid.group_mma` after the next `tile.barrier`.

    grid.fence_async : () -> ()
    """

    name = "grid.fence_async"
    traits = (Synchronizes,)

    @staticmethod
    def infer_types() -> tuple[Type, ...]:
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.products.fence()
        return ()


@register_op
class GroupMmaOp(Op):
    """Starts c + a @ b.T for c [64, n], a [64, d], b [n, d]: a product of a warpgroup, which is here as a whole.

    d is 1 to 4 steps of 16 columns of bf16 or f16, with sums in f32, or of 32 columns of f8e4m3, with sums in f32, or
    of i8, with sums in i32. n is twice the lanes of c, d twice those of a. Lane l of warp w holds c at rows 16 w + l
    / 4 (+ 8 for i mod 4 >= 2) and columns 8 (i / 4) + 2 (l mod 4) + i mod 2; of a the 16 rows of its warp as the left
    factor of `grid.mma`, one step behind the other. b is the steps from `step` on of a tile. The registers of a are
    read while the product goes on: the op may not be met again before it was waited for. Sums over a step are exact
    here, and rounded as they are added; integers wrap. Hardware keeps fewer digits of sums of f8e4m3 while a product
    goes on (about 14 bits: DeepSeek-V3, arXiv:2412.19437, 3.3.2): take them over into other registers every 128
    columns. Where c is the constant 0 no register is set to it.

    %d = grid.group_mma %c, %a, %t, %j {step = 2}
        : (vector<16 x f32>, vector<16 x bf16>, buffer<bf16, shared>, index) -> vector<16 x f32>
    """

    name = "grid.group_mma"
    traits = (Synchronizes,)
    c = operand("f32 or i32, 4 to 128 lanes, a multiple of 4; of i32 above 16 lanes a multiple of 8")
    a = operand("bf16 or f16, 8 lanes for each step; f8e4m3 or i8, 16 lanes for each")
    b = operand("shared buffer of the same element")
    b_index = operand("first element of the tile of n rows")
    step = attr(int, "first of the tile's four steps", default=0)
    out = result("type of c; to be waited for")

    @staticmethod
    def infer_types(c: Type, a: Type, b: Type, b_index: Type, step: int) -> Type:
        element = element_of(a)
        fits = isinstance(a, VectorType) and element in SUMS and lanes_of(a) % step_lanes(element) == 0
        steps = lanes_of(a) // step_lanes(element) if fits else 0
        expected = "8, 16, 24 or 32 lanes of bf16 or f16, or twice as many of f8e4m3 or i8"
        expect(fits and steps <= STEPS, f"expected {expected}, got {a}")
        sums, lanes = SUMS[element], lanes_of(c)
        fits = isinstance(c, VectorType) and element_of(c) == sums and lanes % 4 == 0 and 4 <= lanes <= 128
        fits = fits and (sums == F32 or lanes <= 16 or lanes % 8 == 0)
        expect(fits, f"expected {_LANES[sums]} to add to, got {c}")
        shared = isinstance(b, BufferType) and b.space == "shared" and b.element == element
        expect(shared, f"expected a shared buffer of {element}, got {b}")
        expect(b_index == INDEX, f"expected an index, got {b_index}")
        expect(0 <= step <= STEPS - steps, f"expected {steps} of {STEPS} steps, got those from {step} on")
        return c

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_groups(self, WARPGROUP, "warpgroup")
        return (context.grid.products.start(self, *values, self.step),)


@register_op
class WaitMmaOp(Op):
    """c, after waiting until at most `pending` of the products that this warpgroup has started are not done.

    Sums of products that may still go on stay so. The products started first are done first.

    %r = grid.wait_mma %c {pending = 1} : (vector<16 x f32>) -> vector<16 x f32>
    """

    name = "grid.wait_mma"
    traits = (Synchronizes,)
    c = operand("f32 or i32, what `grid.group_mma` gave")
    pending = attr(int, "products that may still be under way")
    out = result("type of c")

    @staticmethod
    def infer_types(c: Type, pending: int) -> Type:
        fits = isinstance(c, VectorType) and element_of(c) in (F32, I32)
        expect(fits, f"expected a vector of f32 or i32, got {c}")
        expect(0 <= pending <= 7, f"expected 0 .. 7 products, got {pending}")
        return c

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_groups(self, WARPGROUP, "warpgroup")
        return (context.grid.products.wait(values[0], self.pending),)
