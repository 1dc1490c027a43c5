"""norm.*: normalisation over the last axis."""

from __future__ import annotations

import numpy as np

from ir.formats import F32
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks
from ir.sizes import num_elements
from ir.traits import Pure
from ir.types import TensorType, Type


@register_op
class RmsNormOp(Op):
    """y[.., i] = x[.., i] / sqrt(mean over i of x[.., i]^2 + eps) * gain[i]; arXiv:1910.07467.

    Example:
        %y = norm.rms %x, %gain {eps = 1e-06}
            : (tensor<tokens x 16 x f32>, tensor<16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "norm.rms"
    traits = (Pure,)
    x = operand("[..., n]")
    gain = operand("[n]")
    eps = attr(float, "added to the mean of squares")
    y = result("[..., n] in f32")

    @staticmethod
    def infer_types(x: Type, gain: Type, *, eps: float) -> TensorType:
        found = checks.float_tensor(x, "x", min_rank=1)
        scale = checks.float_tensor(gain, "gain", rank=1)
        checks.same("n of x and gain", found.shape[-1], scale.shape[0])
        expect(eps >= 0, f"expected eps >= 0, got {eps}")
        return found.with_element(F32)

    @staticmethod
    def reference(x: np.ndarray, gain: np.ndarray, *, eps: float) -> np.ndarray:
        wide = x.astype(np.float64)
        mean_of_squares = np.mean(wide * wide, axis=-1, keepdims=True)
        return (wide / np.sqrt(mean_of_squares + eps) * gain.astype(np.float64)).astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 4 * num_elements(self.y.type, sizes)  # square, sum, scale, gain
