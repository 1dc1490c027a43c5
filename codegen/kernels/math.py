"""Elementary functions on tile-level numbers, spelled out in adds, products and bit moves: no call leaves a kernel."""

from __future__ import annotations

from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import F32, I32
from ir.types import ScalarType, VectorType

LOG2_E = 1.4426950408889634
# 2**f on [-0.5, 0.5]: minimax polynomial, relative error below 3e-8 (Cody and Waite; coefficients by Remez exchange).
_EXP2 = (
    1.0,
    0.6931471805599453,
    0.2402265069591007,
    0.05550410866482158,
    0.009618129107628477,
    0.0013333558146428443,
    0.00015403530393381608,
)


def exp2(k: KernelBuilder, x: Expr) -> Expr:
    """2**x for f32 scalars or vectors; 0 below -126 (also for -inf), saturates at 2**127."""
    clamped = x.max(-127.0).min(127.0)
    whole = k.round(clamped)
    fraction = clamped - whole
    value = _like(k, x, _EXP2[-1])
    for coefficient in reversed(_EXP2[:-1]):
        value = k.fma(value, fraction, coefficient)
    integer = VectorType(x.lanes, I32) if isinstance(x.type, VectorType) else ScalarType(I32)
    bits = whole.cast(I32) + 127
    power = bits.shifted_left(23).bitcast(
        VectorType(x.lanes, F32) if isinstance(x.type, VectorType) else ScalarType(F32)
    )
    assert bits.type == integer
    return value * power  # at -127 the exponent field is 0, so the product is 0


def exp(k: KernelBuilder, x: Expr) -> Expr:
    """e**x."""
    return exp2(k, x * LOG2_E)


def sigmoid(k: KernelBuilder, x: Expr) -> Expr:
    """1 / (1 + e**-x)."""
    return 1.0 / (exp2(k, x * -LOG2_E) + 1.0)


def silu(k: KernelBuilder, x: Expr) -> Expr:
    """x * sigmoid(x)."""
    return x / (exp2(k, x * -LOG2_E) + 1.0)


def _like(k: KernelBuilder, x: Expr, value: float) -> Expr:
    return k.f32(value, x.lanes)
