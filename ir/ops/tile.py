"""Tile level: one kernel as loops, vectors and memory. Here: numbers and lane by lane arithmetic.

Operands are scalars (`f32`, `i32`, `index`) or vectors (`vector<16 x f32>`); both operands of an arithmetic op have
one type. Integers wrap; `index` is a signed 64-bit integer. Arithmetic is on f32, f64, i32, i64 and index only: bf16,
f16 and the bytes are storage formats and are converted by `tile.cast`; i1 is what `tile.compare` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ir.diagnostics import DiagnosticSink
from ir.formats import BF16, F16, F32, F64, I1, I32, I64, PlainFormat
from ir.op_def import InferenceError, Op, attr, operand, register_op, result
from ir.ops.tile_types import ARITHMETIC, check_arithmetic, element_of, lanes_of
from ir.traits import Commutative, ConstantLike, Pure
from ir.types import IndexType, ScalarType, Type, VectorType


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
        if left != right:
            raise InferenceError(f"expected both operands of one type, got {left} and {right}")
        check_arithmetic(left, cls.elements)
        return (left,)


def _divide(a: Any, b: Any) -> Any:
    if np.asarray(a).dtype.kind == "f":
        return a / b
    quotient = a // b  # rounds down; one more where that is not towards zero
    return quotient + ((quotient * b != a) & ((a < 0) != (b < 0)))


def _smaller(a: Any, b: Any) -> Any:
    return np.where(a < b, a, b)[()]


def larger(a: Any, b: Any) -> Any:
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
    reference = staticmethod(larger)


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
        check_arithmetic(x, (F32, F64))
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
