"""Grid level: what a kernel for a GPU says besides the tile ops: blocks, shared memory, lanes that exchange registers.

A kernel for a GPU is a `func.func` of tile ops that every thread of every block runs (`ir.grid_interpreter`). A block
is a team: `tile.thread_id`, `tile.num_threads` and `tile.barrier` mean its threads; 32 consecutive ones are a warp,
and thread t is lane t mod 32 of it. Blocks share global memory only, are in no order and never wait for each other.
A vector that is loaded or stored lies on a multiple of its size (of 16 bytes, where it is larger).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.diagnostics import DiagnosticSink
from ir.formats import BF16, F32, I1, I32, PlainFormat
from ir.op_def import InferenceError, Op, attr, expect, operand, register_op, result
from ir.ops.builtin import FuncOp
from ir.ops.tile_types import element_of, lanes_of
from ir.traits import Pure, ReadsMemory, Synchronizes
from ir.types import INDEX, BufferType, ScalarType, Type, VectorType

WARP = 32


@register_op
class BlockIdOp(Op):
    """The number of this thread's block in the grid, from 0.

    %b = grid.block_id : () -> index
    """

    name = "grid.block_id"
    traits = (Pure,)
    out = result("index")

    @staticmethod
    def infer_types() -> Type:
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.grid.block_of.astype(np.int64),)


@register_op
class NumBlocksOp(Op):
    """How many blocks the grid has.

    %n = grid.num_blocks : () -> index
    """

    name = "grid.num_blocks"
    traits = (Pure,)
    out = result("index")

    @staticmethod
    def infer_types() -> Type:
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.array([context.grid.blocks], np.int64),)


@register_op
class SharedOp(Op):
    """A buffer of this thread's block, undefined at first, gone when the block is done.

    %s = grid.shared {size = 64, element = f32} : () -> buffer<f32, shared>
    """

    name = "grid.shared"
    traits = (ReadsMemory,)  # two of them are never one
    size = attr(int, "elements")
    element = attr(PlainFormat, "format of the elements")
    out = result("shared buffer, aligned to 16 bytes")

    @staticmethod
    def infer_types(size: int, element: PlainFormat) -> Type:
        expect(size > 0, f"expected a size above 0, got {size}")
        expect(element != I1, "expected a buffer of machine numbers, got buffer<i1, shared>")
        return BufferType(element, "shared")

    def verify(self, diag: DiagnosticSink) -> None:
        outer = self.parent_op
        if outer is not None and not isinstance(outer, FuncOp):
            diag.error(
                self.location, f"'grid.shared' stands inside '{outer.name}'; expected it in the kernel's own body"
            )

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.grid.shared(self, self.size, self.element),)


@register_op
class ShuffleOp(Op):
    """x of the lane whose number is this lane's with the bits of `mask` flipped. Every lane of the warp is here.

    %y = grid.shuffle %x {mask = 16} : (f32) -> f32
    """

    name = "grid.shuffle"
    traits = (Synchronizes,)
    x = operand("f32 or i32")
    mask = attr(int, "1 .. 31")
    out = result("type of x")

    @staticmethod
    def infer_types(x: Type, mask: int) -> Type:
        expect(x in (ScalarType(F32), ScalarType(I32)), f"expected f32 or i32, got {x}")
        expect(0 < mask < WARP, f"expected a mask of 1 .. {WARP - 1}, got {mask}")
        return x

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_warps(self)
        lanes = np.arange(context.grid.total)
        return (context.grid.spread(values[0])[lanes ^ self.mask],)


@register_op
class Exp2Op(Op):
    """2**x to 2 units in the last place; subnormal results become 0.

    %y = grid.exp2 %x : (f32) -> f32
    """

    name = "grid.exp2"
    traits = (Pure,)
    x = operand("f32 scalar or vector")
    out = result("type of x")

    @staticmethod
    def infer_types(x: Type) -> Type:
        expect(element_of(x) == F32, f"expected f32, got {x}")
        return x

    @staticmethod
    def reference(x: Any) -> Any:
        y = np.exp2(np.asarray(x, np.float64)).astype(np.float32)
        return np.where(y < np.float32(2.0**-126), np.float32(0), y)[()]


@register_op
class FmaPairsOp(Op):
    """a * b + c on bf16, two lanes in one instruction, rounded once. Subnormal numbers are kept.

    %y = grid.fma_pairs %a, %b, %c : (vector<2 x bf16>, vector<2 x bf16>, vector<2 x bf16>) -> vector<2 x bf16>
    """

    name = "grid.fma_pairs"
    traits = (Pure,)
    a = operand("factor")
    b = operand("factor")
    c = operand("addend")
    out = result("type of the operands")

    @staticmethod
    def infer_types(a: Type, b: Type, c: Type) -> Type:
        expect(a == b == c, f"expected three operands of one type, got {a}, {b} and {c}")
        expect(element_of(a) == BF16 and lanes_of(a) % 2 == 0, f"expected pairs of bf16, got {a}")
        return a

    @staticmethod
    def reference(a: Any, b: Any, c: Any) -> Any:
        wide = [np.asarray(x, np.float64) for x in (a, b, c)]
        return (wide[0] * wide[1] + wide[2]).astype(BF16.dtype)


@register_op
class JoinOp(Op):
    """The lanes of several vectors, one after the other.

    %v = grid.join %a, %b : (vector<4 x bf16>, vector<4 x bf16>) -> vector<8 x bf16>
    """

    name = "grid.join"
    traits = (Pure,)
    parts = operand("scalars or vectors of one element", variadic=True)
    out = result("vector of all their lanes")

    @staticmethod
    def infer_types(*parts: Type) -> Type:
        if not parts:
            raise InferenceError("expected one vector or more, got none")
        elements = [element_of(p) for p in parts]
        expect(len(set(elements)) == 1, f"expected vectors of one element, got {', '.join(map(str, parts))}")
        return VectorType(sum(map(lanes_of, parts)), elements[0])

    @staticmethod
    def reference(*parts: Any) -> Any:
        return np.concatenate([np.atleast_1d(p) for p in parts])


@register_op
class PartOp(Op):
    """`lanes` consecutive lanes of a vector.

    %v = grid.part %a {first = 4, lanes = 4} : (vector<8 x bf16>) -> vector<4 x bf16>
    """

    name = "grid.part"
    traits = (Pure,)
    v = operand("vector")
    first = attr(int, "first lane taken")
    lanes = attr(int, "how many")
    out = result("vector")

    @staticmethod
    def infer_types(v: Type, first: int, lanes: int) -> Type:
        expect(isinstance(v, VectorType), f"expected a vector, got {v}")
        have = lanes_of(v)
        fits = first >= 0 and lanes >= 1 and first + lanes <= have
        expect(fits, f"expected lanes of {v}, got {lanes} from {first} on")
        return VectorType(lanes, element_of(v))

    @staticmethod
    def reference(v: Any, first: int, lanes: int) -> Any:
        return v[first : first + lanes]
