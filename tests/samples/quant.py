"""quant.*: weights and activations, widths that fill no byte, stacked matrices, zero rows, both roundings."""

from __future__ import annotations

import numpy as np

from ir.formats import F16, U8, GroupedIntFormat
from ir.types import KVCacheType
from tests.samples.base import BF16, F32, I1, I32, TOKENS, Sample, fault, ints, normal, packed, sample, t

Q8 = GroupedIntFormat(8, 32, scale=F32)
Q8_ROW = GroupedIntFormat(8, 0, scale=F32)
Q4 = GroupedIntFormat(4, 32)
Q4_ZP = GroupedIntFormat(4, 32, zero_point=True)
Q3 = GroupedIntFormat(3, 8, scale=BF16)

_ZERO_ROW = normal(3, 64) * np.array([[1.0], [0.0], [-2.0]], np.float32)


def codes(*shape: int, bits: int) -> np.ndarray:
    """All codes of a width, in turn."""
    return (np.arange(int(np.prod(shape))) * 7 % (1 << bits)).astype(np.uint8).reshape(shape)


def _assembled(label: str, format: GroupedIntFormat, *shape: int) -> Sample:
    """codes, scales and, with a zero point, zeros of `shape`."""
    groups = (*shape[:-1], format.groups(shape[-1]))
    scales = np.abs(normal(*groups, element=format.scale))
    zeros = (codes(*groups, bits=format.bits),) if format.zero_point else ()
    return sample("quant.assemble", label, codes(*shape, bits=format.bits), scales, *zeros, format=format)


SAMPLES = (
    sample("quant.quantize", "activations", normal(3, 64), types=(t(TOKENS, 64),), format=Q8),
    sample("quant.quantize", "per_token", normal(2, 7), types=(t(TOKENS, 7),), format=Q8_ROW),
    sample("quant.quantize", "bf16_weight", normal(5, 64, element=BF16), format=Q4),
    sample("quant.quantize", "zero_row", _ZERO_ROW, format=Q4_ZP),
    sample("quant.quantize", "experts", normal(2, 3, 16), format=Q3),
    _assembled("symmetric", Q4, 5, 64),
    _assembled("zero_points", Q4_ZP, 1, 96),
    _assembled("experts", GroupedIntFormat(3, 8, zero_point=True), 2, 3, 24),
    _assembled("per_channel", GroupedIntFormat(8, 0, scale=F32), 4, 7),
    sample("quant.dequantize", "q4", packed(normal(5, 64), Q4)),
    sample("quant.dequantize", "bf16", packed(normal(2, 3, 32), Q4_ZP), to=BF16),
    sample("quant.dequantize", "activations", packed(normal(3, 7), Q8_ROW), types=(t(TOKENS, 7, element=Q8_ROW),)),
    sample("quant.outlier_columns", "bf16", normal(5, 12, element=BF16), count=3),
    sample("quant.outlier_columns", "ties", np.ones((2, 4), np.float32), count=2),
    sample("quant.outlier_columns", "experts", normal(2, 3, 8), count=8),
    sample("quant.select_columns", "f32", normal(3, 8), ints(1, 5), types=(t(TOKENS, 8), t(2, element=I32))),
    sample("quant.select_columns", "stack", normal(2, 3, 8, element=BF16), ints(7, 0, 0)),
    sample("quant.clear_columns", "f32", normal(3, 8), ints(1, 5), types=(t(TOKENS, 8), t(2, element=I32))),
    sample("quant.clear_columns", "gain", normal(5), ints(0, 1, 2, 3, 4)),
    sample("quant.rotate", "f32", normal(3, 96), types=(t(TOKENS, 96),), block=32),
    sample("quant.rotate", "bf16_weight", normal(2, 3, 8, element=BF16), block=8),
    sample("quant.rotate", "block_of_one", normal(5), block=1),
    sample("quant.rotate", "pairs", normal(1, 6), block=2),
)  # fmt: skip
_ROWS = "expected a number of columns that is a multiple of the group of 32"
FAULTS = (
    fault("quant.quantize", "a low-bit format like q4_sym<group=32, scale=f16>, got bf16", t(3, 64), format=BF16),
    fault("quant.quantize", f"cannot hold rows of 65 elements; {_ROWS}", t(3, 65), format=Q4),
    fault("quant.quantize", "expected x of f32, bf16 or f16", t(3, 64, element=Q4), format=Q4),
    fault("quant.quantize", "a known last dimension of a low-bit tensor, got tokens", t(3, TOKENS), format=Q4),
    fault("quant.quantize", "nearest or mse, got 'up'", t(3, 64), format=Q4, rounding="up"),
    fault("quant.assemble", "expected codes of u8", t(5, 64), t(5, 2, element=F16), format=Q4),
    fault(
        "quant.assemble",
        "made of codes, scales, zeros; got 2 parts",
        t(5, 64, element=U8),
        t(5, 2, element=F16),
        format=Q4_ZP,
    ),
    fault(
        "quant.assemble",
        "scales to be tensor<5 x 2 x f16>, got tensor<5 x 2 x f32>",
        t(5, 64, element=U8),
        t(5, 2),
        format=Q4,
    ),
    fault("quant.assemble", "codes of known size", t(TOKENS, 64, element=U8), t(5, 2, element=F16), format=Q4),
    fault("quant.assemble", "a low-bit format", t(5, 64, element=U8), t(5, 2, element=F16), format=F32),
    fault("quant.dequantize", "expected w in a low-bit format, got tensor<5 x 64 x f32>", t(5, 64)),
    fault("quant.dequantize", "expected to = f32, bf16 or f16, got i1", t(5, 64, element=Q4), to=I1),
    fault("quant.dequantize", "expected w to be a tensor, got kv<2 x 4 x f32>", KVCacheType(2, 4, F32)),
    fault("quant.outlier_columns", "expected 1 <= count <= 8 columns, got count = 9", t(3, 8), count=9),
    fault("quant.select_columns", "expected columns of i32", t(3, 8), t(2)),
    fault("quant.select_columns", "expected 4 columns at most, got 5", t(3, 4), t(5, element=I32)),
    fault("quant.clear_columns", "expected x of f32, bf16 or f16", t(3, 8, element=I32), t(2, element=I32)),
    fault("quant.rotate", "a block that is a power of two, got 24", t(3, 48), block=24),
    fault("quant.rotate", "multiple of block = 32, got 48", t(3, 48), block=32),
    fault("quant.rotate", "expected x of f32, bf16 or f16", t(3, 64, element=Q4), block=32),
)
