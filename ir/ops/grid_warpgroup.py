"""Grid level: products of four warps (a warpgroup) whose factors lie in shared memory and which go on by themselves.

A tile of factors has rows of 64 numbers of 16 bits, 128 bytes each; piece p of 16 bytes of row r lies at piece
p xor (r mod 8), and the first row on a multiple of 1024 bytes ("128-byte swizzle", NVIDIA, "Parallel Thread Execution
ISA", 9.7.15). Sums of a product that has not been waited for may go into the next product and nowhere else, and the
bytes of its factors may not be written. What a thread wrote, or copied by `grid.async_copy`, it makes known to products
by `grid.fence_async`; bytes of `grid.bulk_copy` are known to them. For sm_90a.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ir.formats import BF16, F16, F32
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops.tile_types import element_of, lanes_of
from ir.traits import Synchronizes
from ir.types import INDEX, BufferType, Type, VectorType

WARPGROUP = 128  # threads
ROWS, DEPTH = 64, 64  # of the left factor


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
    """Starts c + a @ b.T for c [64, n], a [64, 64], b [n, 64]: one product of a warpgroup, which is here as a whole.

    n is twice the lanes of c. Lane l of warp w holds c at rows 16 w + l / 4 (+ 8 for i mod 4 >= 2) and columns
    8 (i / 4) + 2 (l mod 4) + i mod 2. Sums over 16 columns are exact here, and rounded as they are added.

    %d = grid.group_mma %c, %s, %i, %t, %j
        : (vector<16 x f32>, buffer<bf16, shared>, index, buffer<bf16, shared>, index) -> vector<16 x f32>
    """

    name = "grid.group_mma"
    traits = (Synchronizes,)
    c = operand("f32, 4 to 128 lanes, a multiple of 4")
    a = operand("shared buffer of bf16 or f16")
    a_index = operand("first element of the tile of 64 rows")
    b = operand("shared buffer of the same element")
    b_index = operand("first element of the tile of n rows")
    out = result("type of c; to be waited for")

    @staticmethod
    def infer_types(c: Type, a: Type, a_index: Type, b: Type, b_index: Type) -> Type:
        lanes = lanes_of(c)
        fits = isinstance(c, VectorType) and element_of(c) == F32 and lanes % 4 == 0 and 4 <= lanes <= 128
        expect(fits, f"expected 4, 8, ..., 128 lanes of f32 to add to, got {c}")
        shared = isinstance(a, BufferType) and a.space == "shared" and a.element in (BF16, F16)
        expect(shared, f"expected a shared buffer of bf16 or f16, got {a}")
        expect(a == b, f"expected two buffers of one type, got {a} and {b}")
        expect(a_index == b_index == INDEX, f"expected an index, got {a_index} and {b_index}")
        return c

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_groups(self, WARPGROUP, "warpgroup")
        return (context.grid.products.start(*values),)


@register_op
class WaitMmaOp(Op):
    """c, after waiting until at most `pending` of the products that this warpgroup has started are not done.

    Sums of products that may still go on stay so. The products started first are done first.

    %r = grid.wait_mma %c {pending = 1} : (vector<16 x f32>) -> vector<16 x f32>
    """

    name = "grid.wait_mma"
    traits = (Synchronizes,)
    c = operand("f32, what `grid.group_mma` gave")
    pending = attr(int, "products that may still be under way")
    out = result("type of c")

    @staticmethod
    def infer_types(c: Type, pending: int) -> Type:
        expect(isinstance(c, VectorType) and element_of(c) == F32, f"expected a vector of f32, got {c}")
        expect(0 <= pending <= 7, f"expected 0 .. 7 products, got {pending}")
        return c

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_groups(self, WARPGROUP, "warpgroup")
        return (context.grid.products.wait(values[0], self.pending),)
