"""Tile level: one kernel as loops, vectors and memory. Values, arithmetic and conversions (memory and control flow
are in `ir.ops.tile_memory` and `ir.ops.tile_control`).

Operands are scalars (`f32`, `i32`, `index`) or vectors (`vector<16 x f32>`); both operands of an arithmetic op have
one type. Integers wrap; `index` is a signed 64-bit integer. Arithmetic is on f32, f64, i32, i64 and index only: bf16,
f16 and the bytes are storage formats and are converted by `tile.cast`; i1 is what `tile.compare` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, ClassVar

import numpy as np

from ir.diagnostics import DiagnosticSink
from ir.formats import BF16, F16, F32, F64, I1, I32, I64, PlainFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.traits import Commutative, ConstantLike, Pure
from ir.types import INDEX, IndexType, ScalarType, Type, VectorType


def element_of(type: Type) -> PlainFormat:
    """The number format of a scalar or vector; raises InferenceError for other types. `index` counts as i64."""
    if isinstance(type, IndexType):
        return I64
    expect(isinstance(type, ScalarType | VectorType), f"expected a scalar or vector, got {type}")
    element = type.element  # pyright: ignore[reportAttributeAccessIssue]
    expect(isinstance(element, PlainFormat), f"expected a plain element, got {element}")
    return element


def with_element(type: Type, element: PlainFormat) -> Type:
    """The type of the same shape (scalar or vector of as many lanes) with another element."""
    return VectorType(type.lanes, element) if isinstance(type, VectorType) else ScalarType(element)


def lanes_of(type: Type) -> int:
    """Lanes of a vector; 1 for scalars."""
    return type.lanes if isinstance(type, VectorType) else 1


def is_float(type: Type) -> bool:
    return element_of(type).is_float


ARITHMETIC = (F32, F64, I32, I64)  # what registers compute with; index counts as i64


def _check_arithmetic(type: Type, elements: tuple[PlainFormat, ...] = ARITHMETIC) -> None:
    words = ", ".join(map(str, elements))
    expect(element_of(type) in elements, f"works on {words}, got {type}")


def _check_lanes(lanes: int) -> None:
    expect(lanes >= 1, f"expected 1 lane or more, got {lanes}")


def _integer_range(element: PlainFormat) -> tuple[int, int]:
    if element.is_float or element == I1:
        return 0, 1
    limits = np.iinfo(element.dtype)
    return int(limits.min), int(limits.max)


@register_op
class ConstantOp(Op):
    """The same number in every lane, or one number for each lane.

    %zero = tile.constant {value = 0.0} : () -> vector<16 x f32>
    """

    name = "tile.constant"
    traits = (Pure, ConstantLike)
    value = attr((int, float, tuple), "the number, or a tuple of one for each lane")
    out = result("scalar or vector of f32, f64 or integers; the type is given")

    def verify(self, diag: DiagnosticSink) -> None:
        fault = self._fault()
        if fault:
            diag.error(self.location, f"'tile.constant' {fault}")

    def _fault(self) -> str:
        """What is wrong with number and type; "" when nothing is."""
        type = self.out.type
        if not isinstance(type, ScalarType | VectorType | IndexType):
            return f"expected a scalar or vector, got {type}"
        element = element_of(type)
        if element in (BF16, F16):
            return f"cannot be of {element}; cast one from f32"
        if isinstance(self.value, tuple) and not isinstance(type, VectorType):
            return f"expected one number for {type}, got {len(self.value)}"
        if isinstance(self.value, tuple) and len(self.value) != lanes_of(type):
            return f"expected {lanes_of(type)} numbers, got {len(self.value)}"
        lowest, highest = _integer_range(element)
        for number in self.value if isinstance(self.value, tuple) else (self.value,):
            if isinstance(number, float) != element.is_float or not isinstance(number, int | float):
                return f"expected {'floats' if element.is_float else 'integers'} for {type}, got {number!r}"
            if isinstance(number, int) and not lowest <= number <= highest:
                return f"expected numbers that {element} holds, got {number}"
        return ""

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        dtype = element_of(self.out.type).dtype
        if isinstance(self.out.type, VectorType):
            return (np.full(self.out.type.lanes, self.value, dtype),)
        return (dtype.type(self.value),)


class BinaryOp(Op):
    """Base of the lane by lane arithmetic on two operands of one type."""

    a = operand("left")
    b = operand("right")
    out = result("type of the operands")
    elements: ClassVar[tuple[PlainFormat, ...]] = ARITHMETIC

    @classmethod
    def inferred_types(cls, operand_types: Any, attributes: Any, regions: Any = ()) -> tuple[Type, ...]:
        left, right = operand_types
        expect(left == right, f"expected both operands of one type, got {left} and {right}")
        _check_arithmetic(left, cls.elements)
        return (left,)


def _divide(a: Any, b: Any) -> Any:
    if np.issubdtype(np.asarray(a).dtype, np.floating):
        return a / b
    quotient = a // b  # rounds down; one more where that is not towards zero
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def _smaller(a: Any, b: Any) -> Any:
    return np.where(a < b, a, b)[()]


def _larger(a: Any, b: Any) -> Any:
    return np.where(a > b, a, b)[()]


@register_op
class AddOp(BinaryOp):
    """a + b.

    %c = tile.add %a, %b : (f32, f32) -> f32
    """

    name = "tile.add"
    traits = (Pure, Commutative)
    reference = staticmethod(np.add)


@register_op
class SubOp(BinaryOp):
    """a - b.

    %c = tile.sub %a, %b : (f32, f32) -> f32
    """

    name = "tile.sub"
    traits = (Pure,)
    reference = staticmethod(np.subtract)


@register_op
class MulOp(BinaryOp):
    """a * b.

    %c = tile.mul %a, %b : (f32, f32) -> f32
    """

    name = "tile.mul"
    traits = (Pure, Commutative)
    reference = staticmethod(np.multiply)


@register_op
class DivOp(BinaryOp):
    """a / b; integers round towards zero, and b is neither 0 nor, where a is the smallest integer, -1.

    %c = tile.div %a, %b : (f32, f32) -> f32
    """

    name = "tile.div"
    traits = (Pure,)
    reference = staticmethod(_divide)


@register_op
class RemOp(BinaryOp):
    """The remainder of the division that rounds towards zero; b as for `tile.div`.

    %c = tile.rem %a, %b : (index, index) -> index
    """

    name = "tile.rem"
    traits = (Pure,)
    elements = (I32, I64)
    reference = staticmethod(np.fmod)


@register_op
class MinOp(BinaryOp):
    """a where a < b, else b: the smaller one, and b when either is NaN or both are zeros (as `minps` does).

    %c = tile.min %a, %b : (f32, f32) -> f32
    """

    name = "tile.min"
    traits = (Pure,)
    reference = staticmethod(_smaller)


@register_op
class MaxOp(BinaryOp):
    """a where a > b, else b: the larger one, and b when either is NaN or both are zeros (as `maxps` does).

    %c = tile.max %a, %b : (f32, f32) -> f32
    """

    name = "tile.max"
    traits = (Pure,)
    reference = staticmethod(_larger)


@register_op
class AndOp(BinaryOp):
    """Bitwise and, also of masks.

    %c = tile.and %a, %b : (i32, i32) -> i32
    """

    name = "tile.and"
    traits = (Pure, Commutative)
    elements = (I1, I32, I64)
    reference = staticmethod(np.bitwise_and)


@register_op
class OrOp(BinaryOp):
    """Bitwise or, also of masks.

    %c = tile.or %a, %b : (i32, i32) -> i32
    """

    name = "tile.or"
    traits = (Pure, Commutative)
    elements = (I1, I32, I64)
    reference = staticmethod(np.bitwise_or)


@register_op
class ShlOp(BinaryOp):
    """a shifted left by b bits, 0 <= b < the width of a.

    %c = tile.shl %a, %b : (i32, i32) -> i32
    """

    name = "tile.shl"
    traits = (Pure,)
    elements = (I32, I64)
    reference = staticmethod(np.left_shift)


@register_op
class ShrOp(BinaryOp):
    """a shifted right by b bits, 0 <= b < the width of a, the sign kept.

    %c = tile.shr %a, %b : (i32, i32) -> i32
    """

    name = "tile.shr"
    traits = (Pure,)
    elements = (I32, I64)
    reference = staticmethod(np.right_shift)


class UnaryFloatOp(Op):
    """Base of the lane by lane functions of one float operand."""

    x = operand("number")
    out = result("type of x")

    @classmethod
    def inferred_types(cls, operand_types: Any, attributes: Any, regions: Any = ()) -> tuple[Type, ...]:
        (x,) = operand_types
        _check_arithmetic(x, (F32, F64))
        return (x,)


@register_op
class SqrtOp(UnaryFloatOp):
    """Square root.

    %y = tile.sqrt %x : (f32) -> f32
    """

    name = "tile.sqrt"
    traits = (Pure,)
    reference = staticmethod(np.sqrt)


@register_op
class RoundOp(UnaryFloatOp):
    """Nearest whole number, ties to even.

    %y = tile.round %x : (vector<16 x f32>) -> vector<16 x f32>
    """

    name = "tile.round"
    traits = (Pure,)
    reference = staticmethod(np.rint)


@register_op
class FmaOp(Op):
    """a * b + c, rounded once. A CPU without fused multiply-add rounds the product too.

    %y = tile.fma %a, %b, %c : (vector<16 x f32>, vector<16 x f32>, vector<16 x f32>) -> vector<16 x f32>
    """

    name = "tile.fma"
    traits = (Pure, Commutative)
    a = operand("factor")
    b = operand("factor")
    c = operand("addend")
    out = result("type of the operands")

    @staticmethod
    def infer_types(a: Type, b: Type, c: Type) -> Type:
        expect(a == b == c, f"expected three operands of one type, got {a}, {b} and {c}")
        _check_arithmetic(a, (F32, F64))
        return a

    @staticmethod
    def reference(a: Any, b: Any, c: Any) -> Any:
        return (_fused32 if np.asarray(a).dtype == np.float32 else _fused64)(a, b, c)[()]


def _fused32(a: Any, b: Any, c: Any) -> Any:
    """f32 arrays. The product is exact in f64; the sum is rounded to odd there, so that the rounding to f32 is the
    only one (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57, 2008)."""
    product, addend = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact (Knuth's two-sum)
    if np.any(error):
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def _fused64(a: Any, b: Any, c: Any) -> Any:
    """f64 arrays: by rational numbers, lane by lane."""
    plain = np.asarray(a * b + c)
    out = plain.copy()
    for i, terms in enumerate(zip(np.atleast_1d(a), np.atleast_1d(b), np.atleast_1d(c), strict=True)):
        if np.isfinite(terms[0]) and np.isfinite(terms[1]) and np.isinf(terms[2]):
            out.reshape(-1)[i] = terms[2]  # the product is finite, also where f64 does not hold it
        elif all(np.isfinite(t) for t in terms):
            x, y, z = (Fraction(float(t)) for t in terms)
            exact = x * y + z
            if exact:  # of a zero, the sign is what the plain sum says
                out.reshape(-1)[i] = _nearest64(exact)
    return out


def _nearest64(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator  # Python rounds this division to nearest even
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


@register_op
class Dot2Op(Op):
    """acc[i] + a[2i+1] * b[2i+1] + a[2i] * b[2i]: pairs of bf16 products added to f32 lanes, each sum rounded.

    Issued as `vdpbf16ps` where the CPU has it (Intel SDM, VDPBF16PS), else as two fused multiply-adds in the order
    odd, even, which is the order of that instruction. The instruction takes subnormal numbers for zeros and gives
    none; the meaning given here keeps them.

    %y = tile.dot2 %acc, %a, %b : (vector<16 x f32>, vector<32 x bf16>, vector<32 x bf16>) -> vector<16 x f32>
    """

    name = "tile.dot2"
    traits = (Pure,)
    acc = operand("f32, n lanes")
    a = operand("bf16, 2n lanes")
    b = operand("bf16, 2n lanes")
    out = result("f32, n lanes")

    @staticmethod
    def infer_types(acc: Type, a: Type, b: Type) -> Type:
        expect(element_of(acc) == F32, f"expected an f32 accumulator, got {acc}")
        expect(a == b and element_of(a) == BF16, f"expected two bf16 vectors of one type, got {a} and {b}")
        expect(lanes_of(a) == 2 * lanes_of(acc), f"expected {2 * lanes_of(acc)} bf16 lanes, got {lanes_of(a)}")
        return acc

    @staticmethod
    def reference(acc: Any, a: Any, b: Any) -> Any:
        products = a.astype(np.float64) * b.astype(np.float64)
        # Exact products of 16 bits: where the f64 sum is rounded, the smaller term is too small to move the f32 sum.
        partial = (acc.astype(np.float64) + products[1::2]).astype(np.float32)
        return (partial.astype(np.float64) + products[0::2]).astype(np.float32)


_COMPARE = {
    "lt": np.less,
    "le": np.less_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
}


@register_op
class CompareOp(Op):
    """Lane by lane comparison, signed for integers. With NaN only `ne` holds.

    %m = tile.compare %a, %b {predicate = "lt"} : (index, index) -> i1
    """

    name = "tile.compare"
    traits = (Pure,)
    a = operand("left")
    b = operand("right")
    predicate = attr(str, "lt, le, eq, ne, gt or ge")
    out = result("i1, as many lanes")

    @staticmethod
    def infer_types(a: Type, b: Type, predicate: str) -> Type:
        expect(a == b, f"expected both operands of one type, got {a} and {b}")
        _check_arithmetic(a)
        expect(predicate in _COMPARE, f"expected predicate one of {', '.join(_COMPARE)}, got {predicate!r}")
        return with_element(a, I1)

    @staticmethod
    def reference(a: Any, b: Any, predicate: str) -> Any:
        return _COMPARE[predicate](a, b)


@register_op
class SelectOp(Op):
    """a where the condition holds, else b, lane by lane (a scalar condition chooses whole vectors).

    %y = tile.select %m, %a, %b : (i1, f32, f32) -> f32
    """

    name = "tile.select"
    traits = (Pure,)
    condition = operand("i1")
    a = operand("where it holds")
    b = operand("elsewhere")
    out = result("type of a and b")

    @staticmethod
    def infer_types(condition: Type, a: Type, b: Type) -> Type:
        expect(a == b, f"expected both values of one type, got {a} and {b}")
        element_of(a)
        expect(element_of(condition) == I1, f"expected an i1 condition, got {condition}")
        expect(lanes_of(condition) in (1, lanes_of(a)), f"condition {condition} does not fit {a}")
        return a

    @staticmethod
    def reference(condition: Any, a: Any, b: Any) -> Any:
        return np.where(condition, a, b).astype(np.asarray(a).dtype)[()]


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


@register_op
class SplatOp(Op):
    """A scalar in every lane.

    %v = tile.splat %x {lanes = 16} : (f32) -> vector<16 x f32>
    """

    name = "tile.splat"
    traits = (Pure,)
    x = operand("scalar")
    lanes = attr(int, "how many")
    out = result("vector")

    @staticmethod
    def infer_types(x: Type, lanes: int) -> Type:
        expect(not isinstance(x, VectorType), f"expected a scalar, got {x}")
        _check_lanes(lanes)
        return VectorType(lanes, element_of(x))

    @staticmethod
    def reference(x: Any, lanes: int) -> Any:
        return np.full(lanes, x, np.asarray(x).dtype)


@register_op
class IotaOp(Op):
    """0, 1, 2, ... as i32 lanes.

    %v = tile.iota {lanes = 16} : () -> vector<16 x i32>
    """

    name = "tile.iota"
    traits = (Pure,)
    lanes = attr(int, "how many")
    out = result("i32 vector")

    @staticmethod
    def infer_types(lanes: int) -> Type:
        _check_lanes(lanes)
        return VectorType(lanes, I32)

    @staticmethod
    def reference(lanes: int) -> Any:
        return np.arange(lanes, dtype=np.int32)


@register_op
class ExtractOp(Op):
    """One lane.

    %x = tile.extract %v {lane = 3} : (vector<16 x f32>) -> f32
    """

    name = "tile.extract"
    traits = (Pure,)
    v = operand("vector")
    lane = attr(int, "which, from 0")
    out = result("scalar")

    @staticmethod
    def infer_types(v: Type, lane: int) -> Type:
        expect(isinstance(v, VectorType), f"expected a vector, got {v}")
        expect(0 <= lane < lanes_of(v), f"expected a lane below {lanes_of(v)}, got {lane}")
        return ScalarType(element_of(v))

    @staticmethod
    def reference(v: Any, lane: int) -> Any:
        return v[lane]


@register_op
class ReduceOp(Op):
    """All lanes of an f32 vector combined by halving: lane i with lane i + n/2, and so on.

    The order is part of the meaning, so that a sum has the same bits on every target. max is `tile.max` of the two.

    %s = tile.reduce %v {kind = "add"} : (vector<16 x f32>) -> f32
    """

    name = "tile.reduce"
    traits = (Pure,)
    v = operand("f32 vector, a power of two of lanes")
    kind = attr(str, "add or max")
    out = result("f32")

    @staticmethod
    def infer_types(v: Type, kind: str) -> Type:
        expect(isinstance(v, VectorType) and element_of(v) == F32, f"expected an f32 vector, got {v}")
        expect(lanes_of(v).bit_count() == 1, f"expected a power of two of lanes, got {lanes_of(v)}")
        expect(kind in ("add", "max"), f"expected kind add or max, got {kind!r}")
        return ScalarType(F32)

    @staticmethod
    def reference(v: Any, kind: str) -> Any:
        combine = np.add if kind == "add" else _larger
        while len(v) > 1:
            v = combine(v[: len(v) // 2], v[len(v) // 2 :])
        return v[0]
