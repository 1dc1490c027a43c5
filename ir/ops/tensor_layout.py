"""tensor.layout: where the elements of a weight lie, named in its type."""

from __future__ import annotations

import numpy as np

from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks
from ir.traits import Pure
from ir.types import Layout, TensorType, Type


@register_op
class LayoutOp(Op):
    """A weight laid out in memory for a kernel: the same matrix, its type names where each element lies.

    Example:
        %p = tensor.layout %w {layout = strips<rows=16, pack=2>}
            : (tensor<32 x 8 x bf16>) -> tensor<32 x 8 x bf16, strips<rows=16, pack=2>>
    """

    name = "tensor.layout"
    traits = (Pure,)
    w = operand("weight [n, k], or stacked weights [E, n, k]")
    layout = attr(Layout, "where the elements lie")
    laid_out = result("w, its type with the layout")

    @staticmethod
    def infer_types(w: Type, *, layout: Layout) -> TensorType:
        found = checks.tensor(w, "w")
        expect(found.rank in (2, 3), f"expected w of rank 2 or 3, got {found}")
        expect(found.layout is None, f"expected w without a layout, got {found}")
        expect(found.static, f"expected w of known size, got {found}")
        sane = layout.rows > 0 and layout.pack > 0 and layout.interleave > 0
        expect(sane, f"expected positive rows, pack and interleave, got {layout}")
        n = found.shape[-2]
        whole = isinstance(n, int) and n % layout.interleave == 0
        expect(whole, f"expected n of w to be a multiple of interleave = {layout.interleave}, got {n}")
        return TensorType(found.shape, found.element, layout)

    @staticmethod
    def reference(w: np.ndarray, *, layout: Layout) -> np.ndarray:
        return w
