"""Tile level: the same number in another format, and the same bits as another type."""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import BF16, F16, F32, I1, I32, PlainFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops.tile_types import element_of, lanes_of, with_element
from ir.traits import Pure
from ir.types import INDEX, ScalarType, Type, VectorType


@register_op
class CastOp(Op):
    """The same number in another format: floats to nearest even, floats to integers towards zero, integers cut off.

    bf16 and f16 are made of f32 and become f32 only. A number that an integer format does not hold gives any integer.
    i1 counts as 0 and 1; nothing is cast to i1, which `tile.compare` makes. A CPU with bf16 instructions makes zeros
    of subnormal f32 numbers on their way to bf16.

    %y = tile.cast %x {to = bf16} : (vector<16 x f32>) -> vector<16 x bf16>
    """

    name = "tile.cast"
    traits = (Pure,)
    x = operand("number")
    to = attr(PlainFormat, "the format wanted")
    out = result("as many lanes in the format `to`")

    @staticmethod
    def infer_types(x: Type, to: PlainFormat) -> Type:
        have = element_of(x)
        for narrow, other in ((have, to), (to, have)):
            expect(narrow not in (BF16, F16) or other in (F32, narrow), f"cannot cast {x} to {to}; {narrow} needs f32")
        expect(to != I1 or have == I1, f"cannot cast {x} to i1; compare it with 0")
        return with_element(x, to)

    @staticmethod
    def reference(x: Any, to: PlainFormat) -> Any:
        return np.asarray(x).astype(to.dtype)[()]


@register_op
class ToIndexOp(Op):
    """An i32 scalar as index, sign kept.

    %i = tile.to_index %x : (i32) -> index
    """

    name = "tile.to_index"
    traits = (Pure,)
    x = operand("i32")
    out = result("index")

    @staticmethod
    def infer_types(x: Type) -> Type:
        expect(x == ScalarType(I32), f"expected i32, got {x}")
        return INDEX

    @staticmethod
    def reference(x: Any) -> Any:
        return np.int64(x)


@register_op
class FromIndexOp(Op):
    """An index as i32; the value must fit.

    %x = tile.from_index %i : (index) -> i32
    """

    name = "tile.from_index"
    traits = (Pure,)
    x = operand("index")
    out = result("i32")

    @staticmethod
    def infer_types(x: Type) -> Type:
        expect(x == INDEX, f"expected index, got {x}")
        return ScalarType(I32)

    @staticmethod
    def reference(x: Any) -> Any:
        return np.int32(x)


@register_op
class BitcastOp(Op):
    """The same bits read as another type of as many bits in all.

    %y = tile.bitcast %x {to = vector<32 x bf16>} : (vector<16 x i32>) -> vector<32 x bf16>
    """

    name = "tile.bitcast"
    traits = (Pure,)
    x = operand("bits")
    to = attr(Type, "the type wanted")
    out = result("the type `to`")

    @staticmethod
    def infer_types(x: Type, to: Type) -> Type:
        expect(I1 not in (element_of(x), element_of(to)), f"i1 has no bits in memory: cannot read {x} as {to}")
        have, want = lanes_of(x) * element_of(x).bits, lanes_of(to) * element_of(to).bits
        expect(have == want, f"expected {have} bits, got {to} of {want}")
        return to

    @staticmethod
    def reference(x: Any, to: Type) -> Any:
        bits = np.ascontiguousarray(np.atleast_1d(x)).view(element_of(to).dtype)
        return bits if isinstance(to, VectorType) else bits[0]
