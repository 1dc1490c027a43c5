"""gemm.*: one row, sizes that fill no tile, all mixes of elements, weights with a layout."""

from __future__ import annotations

from ir.types import KVCacheType, Layout, TensorType
from tests.samples.base import BF16, F16, F32, I32, TOKENS, fault, normal, packed, sample, t
from tests.samples.quant import Q3, Q4, Q4_ZP, Q8, Q8_ROW

SAMPLES = (
    sample("gemm.matmul", "f32", normal(3, 16), normal(32, 16), types=(t(TOKENS, 16), t(32, 16))),
    sample("gemm.matmul", "one_token", normal(1, 64), normal(48, 64)),
    sample("gemm.matmul", "odd", normal(5, 7), normal(3, 7)),
    sample("gemm.matmul", "one_by_one", normal(1, 1), normal(1, 1, seed="w")),
    sample("gemm.matmul", "bf16", normal(4, 10, element=BF16), normal(6, 10, element=BF16)),
    sample("gemm.matmul", "f32_bf16", normal(2, 9), normal(6, 9, element=BF16)),
    sample("gemm.matmul", "bf16_f16", normal(2, 9, element=BF16), normal(6, 9, element=F16)),
    sample(
        "gemm.matmul", "layout", normal(2, 6), normal(40, 6, element=BF16),
        types=(t(TOKENS, 6), TensorType((40, 6), BF16, Layout(16, 2))),
    ),
    sample(
        "gemm.matmul", "q8_q4", packed(normal(3, 64), Q8), packed(normal(6, 64), Q4),
        types=(t(TOKENS, 64, element=Q8), t(6, 64, element=Q4)),
    ),
    sample("gemm.matmul", "bf16_q4_zp", normal(1, 64, element=BF16), packed(normal(5, 64), Q4_ZP)),
    sample(
        "gemm.matmul", "per_token_layout", packed(normal(2, 8), Q8_ROW), packed(normal(40, 8), Q3),
        types=(t(TOKENS, 8, element=Q8_ROW), TensorType((40, 8), Q3, Layout(16, 4))),
    ),
)  # fmt: skip
FAULTS = (
    fault("gemm.matmul", "k of x and w to match, got 64 and 128", t(TOKENS, 64), t(32, 128)),
    fault("gemm.matmul", "expected x of rank 2, got tensor<2 x 3 x 4 x f32>", t(2, 3, 4), t(5, 4)),
    fault("gemm.matmul", "expected w of f32, bf16 or f16", t(3, 4), t(5, 4, element=I32)),
    fault("gemm.matmul", "k of x and w to match, got 64 and 32", t(3, 64, element=Q8), t(5, 32, element=Q4)),
    fault("gemm.matmul", "cannot hold rows of 33 elements", t(3, 33), t(5, 33, element=Q4)),
    fault("gemm.matmul", "expected w to be a tensor, got kv<2 x 4 x f32>", t(3, 4), KVCacheType(2, 4, F32)),
)
