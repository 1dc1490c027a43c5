"""Grid level: matrix products of a warp, and the loads that bring their operands into registers.

The 32 lanes hold a matrix together (a fragment). Lane l has g = l / 4 and q = l mod 4. Which element sits where is that
of `mma.m16n8k16`, `mma.m16n8k32` and `ldmatrix` (NVIDIA, "Parallel Thread Execution ISA", 9.7.15).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.formats import BF16, F8E4M3, F16, F32, I8, I32
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops.tile_types import element_of
from ir.traits import Synchronizes
from ir.types import INDEX, BufferType, Type, VectorType

_LANE = np.arange(32)
_G, _Q = _LANE // 4, _LANE % 4


def _columns(first: np.ndarray) -> np.ndarray:
    return np.stack([first, first + 1], axis=1)


# [lane, element] -> row and column of the matrix
_A_ROWS = np.concatenate([np.stack([_G + up] * 2, 1) for up in (0, 8, 0, 8)], 1)
_A_COLUMNS = np.concatenate([_columns(2 * _Q + right) for right in (0, 0, 8, 8)], 1)
_B_ROWS = np.concatenate([_columns(2 * _Q + down) for down in (0, 8)], 1)
_B_COLUMNS = np.stack([_G] * 4, 1)
_A8_ROWS = np.concatenate([np.stack([_G + up] * 4, 1) for up in (0, 8, 0, 8)], 1)
_A8_COLUMNS = np.concatenate(
    [np.concatenate([_columns(4 * _Q + at) for at in (r, r + 2)], 1) for r in (0, 0, 16, 16)], 1
)
_B8_ROWS = np.concatenate([_columns(4 * _Q + at) for at in (0, 2, 16, 18)], 1)
_B8_COLUMNS = np.stack([_G] * 8, 1)
_C_ROWS = np.concatenate([np.stack([_G + up] * 2, 1) for up in (0, 8)], 1)
_C_COLUMNS = np.concatenate([_columns(2 * _Q)] * 2, 1)


def from_fragments(values: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[warps, 32, n] -> the matrices [warps, rows, columns]."""
    made = np.zeros((len(values), int(rows.max()) + 1, int(columns.max()) + 1), values.dtype)
    made[:, rows, columns] = values
    return made


@register_op
class MmaOp(Op):
    """c + a @ b for c [16, 8], a [16, k], b [k, 8]: one product of a warp. Every lane of the warp is here.

    Factors of bf16 or f16 have k = 16 and sums in f32; of f8e4m3 (from sm_89 on) k = 32 and sums in f32; of i8 k = 32
    and sums in i32. Element i of a lane is, for c: row
    g (+ 8 for i >= 2), column 2q + i mod 2. Of 16 bits, for a: row g (+ 8 for i in 2, 3, 6, 7), column 2q + i mod 2
    (+ 8 for i >= 4); for b: row 2q + i mod 2 (+ 8 for i >= 2), column g. Of 8 bits, for a: row g (+ 8 for i in 4 .. 7,
    12 .. 15), column 4q + i mod 4 (+ 16 for i >= 8); for b: row 4q + i mod 4 (+ 16 for i >= 4), column g. The order of
    a sum in f32 is not said by the hardware's makers; here it is exact and rounded once. Integers wrap.

    %d = grid.mma %c, %a, %b : (vector<4 x f32>, vector<8 x bf16>, vector<4 x bf16>) -> vector<4 x f32>
    """

    name = "grid.mma"
    traits = (Synchronizes,)
    c = operand("4 x f32 or i32")
    a = operand("8 x bf16 or f16, 16 x i8 or f8e4m3")
    b = operand("half as many of the same")
    out = result("type of c")

    @staticmethod
    def infer_types(c: Type, a: Type, b: Type) -> Type:
        element = element_of(a)
        expect(element in (BF16, F16, I8, F8E4M3), f"expected bf16, f16, i8 or f8e4m3 factors, got {a}")
        sums = VectorType(4, I32 if element == I8 else F32)
        expect(c == sums, f"expected {sums} to add to, got {c}")
        lanes = 128 // element.bits
        fits = a == VectorType(lanes, element) and b == VectorType(lanes // 2, element)
        expect(fits, f"expected vectors of {lanes} and {lanes // 2} {element}, got {a} and {b}")
        return c

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_warps(self)
        c, a, b = (context.grid.spread(v).reshape(-1, 32, v.shape[-1]) for v in values)
        return (multiply_fragments(c, a, b).reshape(-1, 4),)


def multiply_fragments(c: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """c + a @ b [warps, 32, 4] of fragments [warps, 32, elements]; exact, rounded once."""
    wide, bytewise = (np.int64 if c.dtype.kind == "i" else np.float64), a.shape[-1] == 16
    left = from_fragments(a.astype(wide), *((_A8_ROWS, _A8_COLUMNS) if bytewise else (_A_ROWS, _A_COLUMNS)))
    right = from_fragments(b.astype(wide), *((_B8_ROWS, _B8_COLUMNS) if bytewise else (_B_ROWS, _B_COLUMNS)))
    total = from_fragments(c.astype(wide), _C_ROWS, _C_COLUMNS) + left @ right
    return total[:, _C_ROWS, _C_COLUMNS].astype(c.dtype)


@register_op
class LoadMatrixOp(Op):
    """Four 8 x 8 matrices of 16-bit numbers from shared memory. Every lane of the warp is here.

    Lane l says where row l mod 8 of matrix l / 8 begins. Elements 2m and 2m + 1 of a lane are those of matrix m at row
    g, columns 2q and 2q + 1; with `transposed`, at column g, rows 2q and 2q + 1.

    %a = grid.load_matrix %s, %i : (buffer<bf16, shared>, index) -> vector<8 x bf16>
    """

    name = "grid.load_matrix"
    traits = (Synchronizes,)
    buffer = operand("shared buffer of bf16 or f16")
    index = operand("first of the 8 elements of a row; its byte is a multiple of 16")
    transposed = attr(bool, "whether columns are taken for rows", default=False)
    out = result("8 elements")

    @staticmethod
    def infer_types(buffer: Type, index: Type, transposed: bool) -> Type:
        expect(isinstance(buffer, BufferType) and buffer.space == "shared", f"expected a shared buffer, got {buffer}")
        assert isinstance(buffer, BufferType)
        expect(buffer.element in (BF16, F16), f"expected a buffer of bf16 or f16, got {buffer}")
        expect(index == INDEX, f"expected an index, got {index}")
        return VectorType(8, buffer.element)

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.whole_warps(self)
        rows = values[0].load(values[1], 8, by_warps=True)
        matrices = context.grid.spread(rows).reshape(-1, 4, 8, 8)  # warp, matrix, row, column
        if self.transposed:
            matrices = matrices.swapaxes(2, 3)
        pairs = matrices.reshape(-1, 4, 32, 2)  # row g, columns 2q and 2q + 1, is pair l
        return (np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(-1, 8),)
