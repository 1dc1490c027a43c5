"""Elementary functions on tile-level numbers, spelled out in adds, products and bit moves: no call leaves a kernel."""

from __future__ import annotations

from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import I32

LOG2_E = 1.4426950408889634
# 2**f on [-0.5, 0.5] as 1 + f * polynomial: minimax by Remez exchange, relative error below 3e-9 before rounding.
_EXP2 = (
    1.0,
    0.6931472149680411,
    0.2402265278287691,
    0.055503105509931205,
    0.009617692974792218,
    0.0013406643905899637,
    0.00015594677576190457,
)


# The same with four terms: relative error below 3e-6.
_EXP2_SHORT = (1.0, 0.6931241933678399, 0.24024098611259553, 0.055906425036457784, 0.0095828531689068)


def exp2(k: KernelBuilder, x: Expr) -> Expr:
    """2**x for f32 scalars or vectors, to 2 units in the last place; 0 below -126.5, inf from 127.5 on, NaN for NaN."""
    clamped = clip(k, x, -127.0, 128.0)
    whole = k.round(clamped)
    fraction = clamped - whole
    value = k.f32(_EXP2[-1], x.lanes)
    for coefficient in reversed(_EXP2[:-1]):
        value = k.fma(value, fraction, coefficient)
    bits = (whole.cast(I32) + 127).shifted_left(23)
    # At -127 the exponent field is 0, so the product is 0; at 128 it is that of infinity.
    return value * bits.bitcast(x.type)


def exp2_short(k: KernelBuilder, x: Expr) -> Expr:
    """2**x for x < 127.5, to a relative error of 2**-18; 0 below -126.5. For results that are rounded to 16 bits."""
    clamped = x.max(-127.0)
    whole = k.round(clamped)
    fraction = clamped - whole
    value = k.f32(_EXP2_SHORT[-1], x.lanes)
    for coefficient in reversed(_EXP2_SHORT[:-1]):
        value = k.fma(value, fraction, coefficient)
    bits = (whole.cast(I32) + 127).shifted_left(23)
    return value * bits.bitcast(x.type)


def clip(k: KernelBuilder, x: Expr, low: float, high: float) -> Expr:
    """x limited to low .. high; NaN stays NaN, because `tile.min` and `tile.max` then give their second operand."""
    return k.constant(x.type, high).min(k.constant(x.type, low).max(x))


def exp(k: KernelBuilder, x: Expr) -> Expr:
    """e**x to a relative error of 2**-22 + |x| * 2**-23: x * log2(e) is rounded before the power is taken."""
    return exp2(k, x * LOG2_E)


def sigmoid(k: KernelBuilder, x: Expr) -> Expr:
    """1 / (1 + e**-x), to the relative error of `exp` above -87 and to 2**-126 below."""
    return 1.0 / (exp2(k, x * -LOG2_E) + 1.0)


def silu(k: KernelBuilder, x: Expr) -> Expr:
    """x * sigmoid(x), to the relative error of `exp` above -87 and to 4e-37 below."""
    return x / (exp2(k, x * -LOG2_E) + 1.0)
