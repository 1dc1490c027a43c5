"""One graph op as one kernel: built by its emitter, run natively or by the tile interpreter, meant by its reference.

kernel = OpKernel(op)                      # op stands in a block whose arguments are its operands
got = kernel.native(kernels, values)       # arrays like those of kernel.meant(values)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np

import codegen.lower_to_plan  # noqa: F401 - registers every emitter
from codegen.kernels.call import EMITTERS, EmitContext, SizeArgument, Temporary
from codegen.kernels.micro import TileShape
from codegen.packed_strips import PackedStrips
from codegen.packed_weights import matrix_pieces
from codegen.strips import pack_strips
from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.formats import BF16, PackedArray, PlainFormat
from ir.interpreter import Environment
from ir.kv_low_bit import LowBitKVState
from ir.kv_state import KVState
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp, YieldOp
from ir.tile_interpreter import interpret_kernel
from ir.types import KVCacheType, Layout, SymbolicDim, TensorType, Type
from tests.codegen.harness import aligned
from tests.codegen.kernel_library import NativeKernels
from tests.codegen.kv_memory import low_bit_memory, low_bit_parts

SMALL = TileShape(rows=2, vectors=2, unroll=2)  # full and partial register tiles with few rows
PREFILL, DECODE = EmitContext(SMALL, "prefill"), EmitContext(SMALL, "decode")
_numbers = count()

Body = Callable[..., Value | tuple[Value, ...]]  # (b, *arguments) -> results


def single(types: Sequence[Type], make: Callable[..., Op]) -> Op:
    """An op on the arguments of a block of its own."""
    block = Block(types)
    op = make(*block.arguments)
    Builder.at_end(block).insert(op)
    return op


def fused(kind: str, types: Sequence[Type], body: Body) -> Op:
    """tensor.fused whose region is what `body` builds on its arguments."""
    inner = Block(types)
    b = Builder.at_end(inner)
    made = body(b, *inner.arguments)
    b(YieldOp(*(made if isinstance(made, tuple) else (made,))))
    return single(types, lambda *operands: FusedOp(*operands, kind=kind, regions=[Region(inner)]))


@dataclass
class OpKernel:
    """An op and its kernel. Values go in and out by operand and result, in order."""

    op: Op
    context: EmitContext = PREFILL
    kernel: FuncOp = field(init=False)

    def __post_init__(self) -> None:
        self.spec = EMITTERS[type(self.op)](self.op, self.context)
        self.kernel = self.spec.build(f"k{next(_numbers)}_{self.spec.stem}")

    def meant(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """The results by the meaning of the op."""
        return Environment({}, {}).run_op(self.op, values)

    def native(self, kernels: NativeKernels, values: Sequence[Any], threads: int = 2) -> list[Any]:
        """The results by native code."""
        call = _Call(self, values)
        kernels.run(self.kernel.sym_name, *call.arguments, threads=threads)
        return call.results()

    def interpreted(self, values: Sequence[Any], threads: int = 3) -> list[Any]:
        """The results by the tile interpreter, which looks for races and accesses out of bounds."""
        call = _Call(self, values)
        interpret_kernel(self.kernel, call.arguments, threads)
        return call.results()


class _Call:
    """The arguments of one launch: what the arena, the weights and the cache would hold."""

    def __init__(self, kernel: OpKernel, values: Sequence[Any]) -> None:
        self.op = kernel.op
        self.sizes = sizes_of(kernel.op, values)
        self.memory: dict[Value, np.ndarray] = {}
        for operand, value in zip(self.op.operands, values, strict=True):
            self.memory[operand] = stored(operand.type, value)
        for result in self.op.results:
            if isinstance(result.type, KVCacheType):  # written in place
                cache = next(v for v in self.op.operands if isinstance(v.type, KVCacheType))
                self.memory[result] = self.memory[cache]
            else:
                self.memory[result] = self.undefined(result.type)
        self.arguments = [self.argument(a) for a in kernel.spec.arguments]

    def argument(self, argument: Any) -> np.ndarray | int:
        if isinstance(argument, SizeArgument):
            return self.size(argument.dim)
        return self.undefined(argument.type) if isinstance(argument, Temporary) else self.memory[argument]

    def size(self, dim: Any) -> int:
        return self.sizes[dim.name] * dim.scale if isinstance(dim, SymbolicDim) else dim

    def undefined(self, type: Type) -> np.ndarray:
        """Memory that nobody has written: all bits set, which is NaN, or -1."""
        assert isinstance(type, TensorType) and isinstance(type.element, PlainFormat)
        shape = [self.size(d) for d in type.shape]
        return aligned(type.element.nbytes(tuple(shape)), 0xFF).view(type.element.dtype).reshape(shape)

    def results(self) -> list[Any]:
        return [
            unpack_cache(self.memory[r], r.type, self.sizes) if isinstance(r.type, KVCacheType) else self.memory[r]
            for r in self.op.results
        ]


def sizes_of(op: Op, values: Sequence[Any]) -> dict[str, int]:
    """What the symbolic dimensions of the operands stand for, and slots and ctx of a cache."""
    sizes: dict[str, int] = {}
    for operand, value in zip(op.operands, values, strict=True):
        if isinstance(value, KVState):
            sizes |= {"slots": value.slots, "ctx": value.ctx}
        elif isinstance(operand.type, TensorType):
            for dim, size in zip(operand.type.shape, value.shape, strict=True):
                if isinstance(dim, SymbolicDim):
                    assert sizes.setdefault(dim.name, size // dim.scale) * dim.scale == size
    return sizes


def stored(type: Type, value: Any) -> np.ndarray:
    """A value as it lies in memory, in bytes of its own."""
    if isinstance(value, KVState):
        assert isinstance(type, KVCacheType)
        return pack_cache(value, type)
    assert isinstance(type, TensorType)
    if isinstance(value, PackedArray):
        return packed_strips(value, type)
    flat = packed(value, type.layout).reshape(-1) if type.layout else value.reshape(-1)
    memory = aligned(flat.nbytes).view(flat.dtype)
    memory[:] = flat
    return memory


def packed_strips(value: PackedArray, type: TensorType) -> np.ndarray:
    """A low-bit weight [n, k] or [E, n, k] in its strips."""
    n = value.shape[-2]
    strips = PackedStrips.of(type)
    count = value.codes.shape[0] // n
    pieces = [
        piece for e in range(count) for piece in matrix_pieces(value.rows(e * n, (e + 1) * n), strips, strips.strips)
    ]
    flat = np.concatenate([np.frombuffer(piece, np.uint8) for piece in pieces])
    memory = aligned(flat.nbytes)
    memory[:] = flat
    return memory


def check_same_bits(
    kernels: NativeKernels, made: OpKernel, values: list[Any], together: np.ndarray, row: int | None
) -> None:
    """`together`, computed on some threads, has the same bits on one; and its `row` the same alone."""
    np.testing.assert_array_equal(together, made.native(kernels, values, 1)[0])
    if row is not None:
        by_row = [isinstance(v.type, TensorType) and isinstance(v.type.shape[0], SymbolicDim) for v in made.op.operands]
        alone = [value[row : row + 1] if rows else value for rows, value in zip(by_row, values, strict=True)]
        np.testing.assert_array_equal(made.native(kernels, alone, 1)[0][0], together[row])


def packed(w: np.ndarray, layout: Layout) -> np.ndarray:
    return pack_strips(w, layout) if w.ndim == 2 else np.stack([pack_strips(one, layout) for one in w])


def _cache_places(type: KVCacheType, slots: int, ctx: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(element number of each key, of each value) [slots, ctx, heads, dim] and the number of elements in all.

    Written from the description in codegen/kernels/kv_layout.py, not from its code.
    """
    heads, pack = type.num_kv_heads, 2 if type.element == BF16 else 1
    width = -(-type.head_dim // 16) * 16
    s, c, h, d = np.indices((slots, ctx, heads, type.head_dim))
    block = ((s * heads + h) * (ctx // 16) + c // 16) * 2 * 16 * width
    keys = block + (d // pack * 16 + c % 16) * pack + d % pack
    values = block + 16 * width + ((d // 16 * (16 // pack) + c % 16 // pack) * 16 + d % 16) * pack + c % 16 % pack
    return keys, values, slots * heads * ctx * 2 * width


def pack_cache(state: KVState, type: KVCacheType) -> np.ndarray:
    """The cache memory of one layer that holds `state`; padding is zero."""
    if isinstance(state, LowBitKVState):
        return low_bit_memory(state)
    keys, values, total = _cache_places(type, state.slots, state.ctx)
    memory = aligned(total * state.dtype.itemsize).view(state.dtype)
    memory[keys], memory[values] = state.keys, state.values
    return memory


def unpack_cache(memory: np.ndarray, type: KVCacheType, sizes: dict[str, int]) -> Any:
    """The state that cache memory holds (of a low-bit cache its parts by name). Fails when padding is not zero."""
    if type.low_bit:
        return low_bit_parts(memory, type, sizes["slots"], sizes["ctx"])
    keys, values, total = _cache_places(type, sizes["slots"], sizes["ctx"])
    padding = np.ones(total, bool)
    padding[keys], padding[values] = False, False
    assert not memory[padding].astype(np.float32).any()
    return KVState(memory[keys], memory[values])
