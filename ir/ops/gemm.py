"""gemm.*: dense matrix products."""

from __future__ import annotations

import numpy as np

from ir.formats import F32, PackedArray
from ir.op_def import Op, operand, register_op, result
from ir.ops import checks
from ir.ops.low_bit import unpacked
from ir.sizes import dim_size, num_elements
from ir.traits import Pure
from ir.types import TensorType, Type


@register_op
class MatmulOp(Op):
    """y[m, n] = sum over k of x[m, k] * w[n, k]: a linear layer with the weight stored as checkpoints do.

    The elements of x and w are f32, bf16, f16 or low-bit numbers in any mix; what is multiplied are the numbers that
    the elements stand for, and products are accumulated in f32 or wider.

    Example:
        %y = gemm.matmul %x, %w : (tensor<tokens x 16 x f32>, tensor<32 x 16 x bf16>) -> tensor<tokens x 32 x f32>
    """

    name = "gemm.matmul"
    traits = (Pure,)
    x = operand("activations [m, k]")
    w = operand("weights [n, k], with or without a layout")
    y = result("f32 [m, n]")

    @staticmethod
    def infer_types(x: Type, w: Type) -> TensorType:
        left, right = checks.factor(x, "x", rank=2), checks.factor(w, "w", rank=2)
        checks.same("k of x and w", left.shape[1], right.shape[1])
        return TensorType((left.shape[0], right.shape[0]), F32)

    @staticmethod
    def reference(x: np.ndarray | PackedArray, w: np.ndarray | PackedArray) -> np.ndarray:
        return (unpacked(x).astype(np.float64) @ unpacked(w).astype(np.float64).T).astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.y.type, sizes) * dim_size(self.x.type.shape[1], sizes)
