"""Number formats of every family, and arrays that they must hold."""

from __future__ import annotations

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from ir.formats import (
    BF16,
    F8E4M3,
    F8E5M2,
    F16,
    F32,
    I8,
    MXFP4,
    U8,
    FP8Format,
    GroupedIntFormat,
    LearnedFormat,
    NumberFormat,
    ProductFormat,
    TableFormat,
    TernaryFormat,
)

FLOAT_SCALES = (F16, BF16, F32)
GROUPS = (0, 1, 3, 8, 32)

_scales = st.one_of(
    st.sampled_from([(scale, None) for scale in FLOAT_SCALES]),
    st.sampled_from([(scale, channel) for scale in (U8, I8) for channel in FLOAT_SCALES]),
)


@st.composite
def grouped_formats(draw: st.DrawFn) -> GroupedIntFormat:
    """Integers of 1 to 8 bits, both levels of scales among them."""
    zero_point = draw(st.booleans())
    scale, channel = draw(_scales)
    if zero_point and scale == I8:
        scale = U8
    return GroupedIntFormat(draw(st.integers(1, 8)), draw(st.sampled_from(GROUPS)), zero_point, scale, channel)


@st.composite
def codebook_formats(draw: st.DrawFn) -> NumberFormat:
    """Ternary, fixed and learned tables."""
    group, (scale, channel) = draw(st.sampled_from(GROUPS)), draw(_scales)
    kind = draw(st.sampled_from(["ternary", "nf4", "nl4", 2, 3, 4]))
    if isinstance(kind, int):
        return LearnedFormat(kind, group, scale, channel)
    return TernaryFormat(group, scale, channel) if kind == "ternary" else TableFormat(kind, group, scale, channel)


product_formats = st.builds(ProductFormat, st.integers(2, 4), st.integers(1, 5), st.sampled_from(FLOAT_SCALES))
fp8_formats = st.builds(
    lambda element, block, scale: FP8Format(element, *block, scale),
    st.sampled_from([F8E4M3, F8E5M2]),
    st.sampled_from([(1, 0), (1, 8), (2, 16), (3, 5)]),
    st.sampled_from(FLOAT_SCALES),
)
low_bit_formats = st.one_of(grouped_formats(), codebook_formats(), product_formats, fp8_formats, st.just(MXFP4))


@st.composite
def arrays_for(draw: st.DrawFn, format: NumberFormat) -> np.ndarray:
    """[n, k] that the format takes: magnitudes from denormals to 6e4 and, where scales reach, beyond; rows and groups
    of zeros, of one sign, of one value, with outliers; f32, f64, bf16 and f16."""
    unit = getattr(format, "group", 0) or getattr(format, "dim", 0) or 1
    k = unit * draw(st.integers(1, 3 if unit > 1 else 40))
    n = draw(st.integers(0, 4))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    scale = getattr(format, "channel", None) or getattr(format, "scale", None)
    exponent = draw(st.integers(-40, 4) if scale == F16 else st.integers(-150, 100))
    values = rng.standard_normal((n, k)) * 2.0**exponent
    values *= 2.0 ** rng.integers(-6, 1, (n, k))
    match draw(st.integers(0, 7)):
        case 0:
            values = np.abs(values)
        case 1:
            values = -np.abs(values)
        case 2:
            values[:] = 0
        case 3:
            values[:, ::2] = 0
        case 4:
            values[:] = 2.0**exponent
        case 5:
            values[:, : k // 2] = 0
        case 6:
            values[:, ::7] *= 8
    if draw(st.integers(0, 9)) == 0:
        most = 3e4 if getattr(format, "zero_point", False) else 6e4  # a range of 6e4
        values = np.clip(rng.standard_normal((n, k)) * 2e4, -most, most)
    dtype = draw(st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16, np.float16]))
    limit = 6e4 if dtype == np.float16 else 1e38
    return np.clip(values, -limit, limit).astype(dtype)
