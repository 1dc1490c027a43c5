"""Tile level: what low-bit weights need. Codes of less than a byte travel in the i32 lanes of ordinary registers; they
are taken apart by and and shift, and become numbers by `tile.lookup` or by arithmetic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import BF16, F16, F32, I8, I32, U8
from ir.op_def import Op, expect, operand, register_op, result
from ir.ops.tile_types import element_of, lanes_of
from ir.traits import Pure
from ir.types import Type, VectorType


@register_op
class Dot4Op(Op):
    """acc[i] + the sum over j of a[4i+j] * b[4i+j]: four byte products added to each i32 lane; the sum wraps.

    Issued as `vpdpbusd` where the CPU has it (Intel SDM, VPDPBUSD, the form that does not saturate).

    %y = tile.dot4 %acc, %a, %b : (vector<16 x i32>, vector<64 x u8>, vector<64 x i8>) -> vector<16 x i32>
    """

    name = "tile.dot4"
    traits = (Pure,)
    acc = operand("i32, n lanes")
    a = operand("u8, 4n lanes")
    b = operand("i8, 4n lanes")
    out = result("i32, n lanes")

    @staticmethod
    def infer_types(acc: Type, a: Type, b: Type) -> Type:
        expect(element_of(acc) == I32, f"expected an i32 accumulator, got {acc}")
        expect(element_of(a) == U8, f"expected bytes without sign first, got {a}")
        expect(element_of(b) == I8, f"expected bytes with sign second, got {b}")
        for bytes_of in (a, b):
            expect(lanes_of(bytes_of) == 4 * lanes_of(acc), f"expected {4 * lanes_of(acc)} bytes, got {bytes_of}")
        return acc

    @staticmethod
    def reference(acc: Any, a: Any, b: Any) -> Any:
        products = (a.astype(np.int32) * b.astype(np.int32)).reshape(-1, 4)
        return (np.atleast_1d(acc).astype(np.int64) + products.sum(axis=1)).astype(np.int32).reshape(np.shape(acc))[()]


@register_op
class LookupOp(Op):
    """table[i] for every index i packed into the lanes of `index`.

    A lane of 32 bits holds 32 / w indices of w bits, the first in the lowest bits, where w is the width of a table
    entry: 4, 2 or 1. Indices count modulo the entries of the table. With 32-bit entries and a constant index this is
    a permutation of a register.

    %y = tile.lookup %table, %index : (vector<16 x bf16>, vector<16 x i32>) -> vector<32 x bf16>
    """

    name = "tile.lookup"
    traits = (Pure,)
    table = operand("vector of 8, 16 or 32 bit entries, a power of two of them")
    index = operand("i32 vector")
    out = result("an entry for each index")

    @staticmethod
    def infer_types(table: Type, index: Type) -> Type:
        expect(isinstance(table, VectorType), f"expected a vector for the table, got {table}")
        element = element_of(table)
        expect(element in (U8, I8, BF16, F16, F32, I32), f"expected entries of 8, 16 or 32 bits, got {table}")
        expect(lanes_of(table).bit_count() == 1, f"expected a power of two of entries, got {lanes_of(table)}")
        expect(lanes_of(table) <= 64, f"expected at most 64 entries, got {lanes_of(table)}")
        expect(isinstance(index, VectorType) and element_of(index) == I32, f"expected an i32 vector, got {index}")
        return VectorType(lanes_of(index) * 32 // element.bits, element)

    @staticmethod
    def reference(table: Any, index: Any) -> Any:
        width = np.dtype(table.dtype).itemsize
        packed = np.ascontiguousarray(index).view({1: np.uint8, 2: np.uint16, 4: np.uint32}[width])
        return table[packed % len(table)]
