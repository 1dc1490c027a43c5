"""quant.*: columns of a matrix that stay floats while the others become low-bit numbers (LLM.int8, arXiv:2208.07339).

columns = outlier_columns(w)
y = clear(x, columns) @ quantize(clear(w, columns)).T + select(x, columns) @ select(w, columns).T
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import I32
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks
from ir.sizes import num_bytes, num_elements
from ir.traits import Pure
from ir.types import TensorType, Type


@register_op
class OutlierColumnsOp(Op):
    """The `count` columns of w whose sums of squares over all rows are largest, in ascending order.

    Of equal sums the lower column is taken. All matrices of a stack share their columns, for they share activations.

    Example:
        %c = quant.outlier_columns %w {count = 16} : (tensor<48 x 64 x bf16>) -> tensor<16 x i32>
    """

    name = "quant.outlier_columns"
    traits = (Pure,)
    w = operand("[..., n, k]")
    count = attr(int, "how many columns, 1 .. k")
    columns = result("i32 [count]")

    @staticmethod
    def infer_types(w: Type, *, count: int) -> TensorType:
        found = checks.float_tensor(w, "w", min_rank=2)
        k = checks.known(found.shape[-1], "number of columns")
        expect(1 <= count <= k, f"expected 1 <= count <= {k} columns, got count = {count}")
        return TensorType((count,), I32)

    @staticmethod
    def reference(w: np.ndarray, *, count: int) -> np.ndarray:
        rows = w.reshape(-1, w.shape[-1])
        squares = np.zeros(w.shape[-1])
        for row in rows:  # in order: a reader of pieces adds up the same sums
            squares += row.astype(np.float64) ** 2
        return largest_columns(squares, count)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.w.type, sizes)


def largest_columns(squares: np.ndarray, count: int) -> np.ndarray:
    """i32: the places of the `count` largest sums, ascending; of equal ones the lower place."""
    return np.sort(np.argsort(-squares, kind="stable")[:count]).astype(np.int32)


class ColumnsOp(Op):
    """Base of the ops that do something to some columns of a matrix of floats."""

    x = operand("[..., k]")
    columns = operand("i32 [count], each in 0 .. k-1")

    @classmethod
    def inferred_types(cls, operand_types: Any, attributes: Any, regions: Any = ()) -> tuple[Type, ...]:
        x, columns = operand_types
        found, chosen = checks.float_tensor(x, "x", min_rank=1), checks.i32_tensor(columns, "columns")
        expect(found.layout is None, f"expected x without a layout, got {found}")
        k, count = (checks.known(t.shape[-1], "number of columns") for t in (found, chosen))
        expect(count <= k, f"expected {k} columns at most, got {count}")
        return (cls.type_with(found, count),)

    @staticmethod
    def type_with(x: TensorType, count: int) -> TensorType:
        """The type of the result, for `count` columns."""
        return x


@register_op
class SelectColumnsOp(ColumnsOp):
    """y[.., i] = x[.., columns[i]].

    Example:
        %y = quant.select_columns %x, %c
            : (tensor<tokens x 64 x f32>, tensor<16 x i32>) -> tensor<tokens x 16 x f32>
    """

    name = "quant.select_columns"
    traits = (Pure,)
    y = result("[..., count]")

    @staticmethod
    def type_with(x: TensorType, count: int) -> TensorType:
        return x.with_shape(*x.shape[:-1], count)

    @staticmethod
    def reference(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        _check(x, columns)
        return np.take(x, columns, axis=-1)

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        return num_bytes(self.y.type, sizes) if index == 0 else super().operand_bytes(index, sizes)


@register_op
class ClearColumnsOp(ColumnsOp):
    """x with zeros in `columns`.

    Example:
        %y = quant.clear_columns %x, %c
            : (tensor<tokens x 64 x f32>, tensor<16 x i32>) -> tensor<tokens x 64 x f32>
    """

    name = "quant.clear_columns"
    traits = (Pure,)
    y = result("like x")

    @staticmethod
    def reference(x: np.ndarray, columns: np.ndarray) -> np.ndarray:
        _check(x, columns)
        y = x.copy()
        y[..., columns] = 0
        return y


def _check(x: np.ndarray, columns: np.ndarray) -> None:
    for column in columns.tolist():
        if not 0 <= column < x.shape[-1]:
            raise IndexError(f"expected columns in 0 .. {x.shape[-1] - 1}, got {column}")
