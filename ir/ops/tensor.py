"""tensor.*: movement of data, casts, embedding and elementwise arithmetic.

Elementwise arithmetic is computed in float64 and rounded once to the element of the result.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from ir.formats import PackedArray, PlainFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks, low_bit
from ir.sizes import num_bytes, num_elements
from ir.traits import Commutative, Elementwise, Pure
from ir.types import Dim, SymbolicDim, TensorType, Type


@register_op
class ConcatOp(Op):
    """The operands one after another along `axis`; all other dimensions and the elements are equal.

    Low-bit tensors are joined by whole rows: any axis but the last.

    Example:
        %y = tensor.concat %a, %b {axis = 0} : (tensor<4 x 8 x f32>, tensor<2 x 8 x f32>) -> tensor<6 x 8 x f32>
    """

    name = "tensor.concat"
    traits = (Pure,)
    values = operand("tensors of equal rank", variadic=True)
    axis = attr(int, "dimension that grows, counted from the front")
    joined = result("the sizes along `axis` added")

    @staticmethod
    def infer_types(*values: Type, axis: int) -> TensorType:
        expect(len(values) > 0, "expected one operand or more, got none")
        first = checks.tensor(values[0], "operand 0", min_rank=1)
        checks.axis_of(first, axis)
        low_bit.expect_whole_rows(first, axis)
        total: Dim = 0
        for i, value in enumerate(values):
            found = checks.tensor(value, f"operand {i}", rank=first.rank)
            checks.same(f"elements of operands 0 and {i}", first.element, found.element)
            rest, other = (t.shape[:axis] + t.shape[axis + 1 :] for t in (first, found))
            expect(rest == other, f"expected operands 0 and {i} to agree off axis {axis}, got {first} and {found}")
            expect(found.layout is None, f"expected operand {i} without a layout, got {found}")
            low_bit.expect_whole_blocks(first, axis, total)
            total = checks.sum_of(total, found.shape[axis], i)
        return first.with_shape(*first.shape[:axis], total, *first.shape[axis + 1 :])

    @staticmethod
    def reference(*values: Any, axis: int) -> Any:
        if isinstance(values[0], PackedArray):
            return low_bit.concatenate_rows(values, axis)
        return np.concatenate(values, axis=axis)


@register_op
class SliceOp(Op):
    """Elements start .. start+size-1 along `axis`, which has a known size; whole rows of a low-bit tensor.

    Example:
        %y = tensor.slice %x {axis = 1, start = 8, size = 4} : (tensor<tokens x 16 x f32>) -> tensor<tokens x 4 x f32>
    """

    name = "tensor.slice"
    traits = (Pure,)
    x = operand("any tensor")
    axis = attr(int, "dimension that is cut, counted from the front")
    start = attr(int, "first element kept")
    size = attr(int, "number of elements kept")
    y = result("x with `axis` of `size` elements")

    @staticmethod
    def infer_types(x: Type, *, axis: int, start: int, size: int) -> TensorType:
        found = checks.tensor(x, "x", min_rank=1)
        checks.axis_of(found, axis)
        extent = checks.known(found.shape[axis], f"size along axis {axis}")
        expect(found.layout is None, f"expected x without a layout, got {found}")
        inside = start >= 0 and size >= 1 and start + size <= extent
        expect(inside, f"expected a slice inside of 0 .. {extent}, got start = {start}, size = {size}")
        low_bit.expect_whole_rows(found, axis)
        low_bit.expect_whole_blocks(found, axis, start)
        low_bit.expect_whole_blocks(found, axis, size if start + size < extent else 0)
        return found.with_shape(*found.shape[:axis], size, *found.shape[axis + 1 :])

    @staticmethod
    def reference(x: Any, *, axis: int, start: int, size: int) -> Any:
        if isinstance(x, PackedArray):
            return low_bit.slice_rows(x, axis, start, size)
        return x.take(range(start, start + size), axis=axis)


@register_op
class ReshapeOp(Op):
    """The same elements in row-major order under another shape, at most one dimension of which is symbolic.

    The last dimension of a low-bit tensor stays what it is.

    Example:
        %y = tensor.reshape %x {shape = [tokens, 2, 8]} : (tensor<tokens x 16 x f32>) -> tensor<tokens x 2 x 8 x f32>
    """

    name = "tensor.reshape"
    traits = (Pure,)
    x = operand("any tensor without a layout")
    shape = attr(tuple, "the new dimensions: numbers or symbols")
    y = result("as many elements as x")

    @staticmethod
    def infer_types(x: Type, *, shape: tuple[Dim, ...]) -> TensorType:
        found = checks.tensor(x, "x")
        expect(found.layout is None, f"expected x without a layout, got {found}")
        old, new = checks.count_of(found.shape), checks.count_of(shape)
        expect(len(new[1]) <= 1, f"expected one symbolic dimension at most, got {', '.join(new[1])}")
        wanted = found.with_shape(*shape)
        expect(old == new, f"expected as many elements before as after, got {found} and {wanted}")
        low_bit.expect_same_rows(found, wanted)
        return wanted

    @staticmethod
    def reference(x: Any, *, shape: tuple[Dim, ...]) -> Any:
        if isinstance(x, PackedArray):  # whose sizes are known
            return replace(x, shape=shape)
        return x.reshape([-1 if isinstance(d, SymbolicDim) else d for d in shape])


@register_op
class CastOp(Op):
    """Every element rounded to the format `to` (nearest, ties to even); floats only.

    Example:
        %y = tensor.cast %x {to = bf16} : (tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x bf16>
    """

    name = "tensor.cast"
    traits = (Pure, Elementwise)
    x = operand("f32, bf16 or f16")
    to = attr(PlainFormat, "format of the result: f32, bf16 or f16")
    y = result("x in format `to`")

    @staticmethod
    def infer_types(x: Type, *, to: PlainFormat) -> TensorType:
        found = checks.float_tensor(x, "x")
        expect(to in checks.FLOATS, f"expected a cast to f32, bf16 or f16, got to = {to}")
        return found.with_element(to)

    @staticmethod
    def reference(x: np.ndarray, *, to: PlainFormat) -> np.ndarray:
        return x.astype(to.dtype)


@register_op
class EmbedOp(Op):
    """Row ids[t] of the table for every token.

    Example:
        %y = tensor.embed %ids, %table : (tensor<tokens x i32>, tensor<100 x 16 x bf16>) -> tensor<tokens x 16 x bf16>
    """

    name = "tensor.embed"
    traits = (Pure,)
    ids = operand("i32 [tokens], each in 0 .. v-1")
    table = operand("[v, h]")
    y = result("[tokens, h] in the element of the table")

    @staticmethod
    def infer_types(ids: Type, table: Type) -> TensorType:
        rows, found = checks.i32_tensor(ids, "ids"), checks.tensor(table, "table", rank=2)
        return found.with_shape(rows.shape[0], found.shape[1])

    @staticmethod
    def reference(ids: np.ndarray, table: np.ndarray) -> np.ndarray:
        return _rows_of(table, ids, "ids")

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        return num_bytes(self.y.type, sizes) if index == 1 else super().operand_bytes(index, sizes)


@register_op
class GatherRowsOp(Op):
    """Row rows[i] of x for every i: the tokens whose logits are wanted.

    Example:
        %y = tensor.gather_rows %x, %rows : (tensor<tokens x 16 x f32>, tensor<rows x i32>) -> tensor<rows x 16 x f32>
    """

    name = "tensor.gather_rows"
    traits = (Pure,)
    x = operand("[tokens, h]")
    rows = operand("i32 [rows], each in 0 .. tokens-1")
    y = result("[rows, h]")

    @staticmethod
    def infer_types(x: Type, rows: Type) -> TensorType:
        found, index = checks.tensor(x, "x", rank=2), checks.i32_tensor(rows, "rows")
        return found.with_shape(index.shape[0], found.shape[1])

    @staticmethod
    def reference(x: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return _rows_of(x, rows, "rows")

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        return num_bytes(self.y.type, sizes) if index == 0 else super().operand_bytes(index, sizes)


def _rows_of(table: np.ndarray, index: np.ndarray, what: str) -> np.ndarray:
    for i in index.tolist():
        if not 0 <= i < table.shape[0]:
            raise IndexError(f"expected {what} in 0 .. {table.shape[0] - 1}, got {i}")
    return table[index]


class _BinaryOp(Op):
    """What add and mul share. Unregistered."""

    traits = (Pure, Elementwise, Commutative)

    @staticmethod
    def infer_types(a: Type, b: Type) -> TensorType:
        return checks.broadcast(a, b)

    def flops(self, sizes: dict[str, int]) -> int:
        return num_elements(self.results[0].type, sizes)


@register_op
class AddOp(_BinaryOp):
    """a + b. One of the two may have only the trailing dimensions of the other (a bias).

    Example:
        %y = tensor.add %a, %b : (tensor<tokens x 16 x f32>, tensor<16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.add"
    a = operand("float tensor")
    b = operand("float tensor of the same element")
    y = result("the larger shape of the two")

    @staticmethod
    def reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) + b.astype(np.float64)).astype(a.dtype)


@register_op
class MulOp(_BinaryOp):
    """a * b. One of the two may have only the trailing dimensions of the other.

    Example:
        %y = tensor.mul %a, %b : (tensor<tokens x 16 x f32>, tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.mul"
    a = operand("float tensor")
    b = operand("float tensor of the same element")
    y = result("the larger shape of the two")

    @staticmethod
    def reference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a.astype(np.float64) * b.astype(np.float64)).astype(a.dtype)


def silu(x: np.ndarray) -> np.ndarray:
    """x * sigmoid(x) in float64; arXiv:1702.03118. Written with tanh, which does not overflow."""
    wide = x.astype(np.float64)
    return wide * 0.5 * (1.0 + np.tanh(0.5 * wide))


@register_op
class SiluOp(Op):
    """x * sigmoid(x).

    Example:
        %y = tensor.silu %x : (tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.silu"
    traits = (Pure, Elementwise)
    x = operand("float tensor")
    y = result("like x")

    @staticmethod
    def infer_types(x: Type) -> TensorType:
        return checks.float_tensor(x, "x")

    @staticmethod
    def reference(x: np.ndarray) -> np.ndarray:
        return silu(x).astype(x.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 4 * num_elements(self.y.type, sizes)  # negate, exp, add, divide


@register_op
class ClipOp(Op):
    """x limited to low .. high.

    Example:
        %y = tensor.clip %x {low = -8.0, high = 8.0} : (tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.clip"
    traits = (Pure, Elementwise)
    x = operand("float tensor")
    low = attr(float, "smallest value that is left")
    high = attr(float, "largest value that is left")
    y = result("like x")

    @staticmethod
    def infer_types(x: Type, *, low: float, high: float) -> TensorType:
        expect(low <= high, f"expected low <= high, got low = {low}, high = {high}")
        return checks.float_tensor(x, "x")

    @staticmethod
    def reference(x: np.ndarray, *, low: float, high: float) -> np.ndarray:
        return np.clip(x.astype(np.float64), low, high).astype(x.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.y.type, sizes)


@register_op
class SwigluOp(Op):
    """silu(first half) * second half of the last axis: the gate | up pair of a gated MLP (arXiv:2002.05202).

    Example:
        %y = tensor.swiglu %x : (tensor<tokens x 32 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.swiglu"
    traits = (Pure,)
    x = operand("[..., 2n]: gate, then up")
    y = result("[..., n]")

    @staticmethod
    def infer_types(x: Type) -> TensorType:
        found = checks.float_tensor(x, "x", min_rank=1)
        return found.with_shape(*found.shape[:-1], checks.divided(found.shape[-1], 2, "the last dimension of x"))

    @staticmethod
    def reference(x: np.ndarray) -> np.ndarray:
        n = x.shape[-1] // 2
        return (silu(x[..., :n]) * x[..., n:].astype(np.float64)).astype(x.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 5 * num_elements(self.y.type, sizes)
