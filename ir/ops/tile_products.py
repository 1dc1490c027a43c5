"""Tile level: products with their sums, rounded as the instructions round them."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np

from ir.formats import BF16, F32, F64
from ir.op_def import Op, expect, operand, register_op, result
from ir.ops.tile_types import check_arithmetic, element_of, lanes_of
from ir.traits import Commutative, Pure
from ir.types import Type


@register_op
class FmaOp(Op):
    """a * b + c, rounded once. A CPU without fused multiply-add rounds the product too.

    %y = tile.fma %a, %b, %c : (vector<16 x f32>, vector<16 x f32>, vector<16 x f32>) -> vector<16 x f32>
    """

    name = "tile.fma"
    traits = (Pure, Commutative)
    a = operand("factor")
    b = operand("factor")
    c = operand("addend")
    out = result("type of the operands")

    @staticmethod
    def infer_types(a: Type, b: Type, c: Type) -> Type:
        expect(a == b == c, f"expected three operands of one type, got {a}, {b} and {c}")
        check_arithmetic(a, (F32, F64))
        return a

    @staticmethod
    def reference(a: Any, b: Any, c: Any) -> Any:
        return (_fused32 if np.asarray(a).dtype == np.float32 else _fused64)(a, b, c)[()]


def _fused32(a: Any, b: Any, c: Any) -> Any:
    """f32 arrays. The product is exact in f64; the sum is rounded to odd there, so that the rounding to f32 is the
    only one (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", IEEE Trans. Computers 57, 2008)."""
    product, addend = np.asarray(a, np.float64) * np.asarray(b, np.float64), np.asarray(c, np.float64)
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)  # exact (Knuth's two-sum)
    if error.any():
        even = (total.view(np.int64) & 1) == 0
        inexact = np.isfinite(total) & (error != 0) & even
        total = np.where(inexact, np.nextafter(total, np.copysign(np.inf, error)), total)
    return total.astype(np.float32)


def _fused64(a: Any, b: Any, c: Any) -> Any:
    """f64 arrays: by rational numbers, lane by lane."""
    plain = np.asarray(a * b + c)
    out = plain.copy()
    for i, terms in enumerate(zip(*map(np.ravel, np.broadcast_arrays(a, b, c)), strict=True)):
        if np.isfinite(terms[0]) and np.isfinite(terms[1]) and np.isinf(terms[2]):
            out.reshape(-1)[i] = terms[2]  # the product is finite, also where f64 does not hold it
        elif all(np.isfinite(t) for t in terms):
            x, y, z = (Fraction(float(t)) for t in terms)
            exact = x * y + z
            if exact:  # of a zero, the sign is what the plain sum says
                out.reshape(-1)[i] = _nearest64(exact)
    return out


def _nearest64(exact: Fraction) -> float:
    try:
        return exact.numerator / exact.denominator  # Python rounds this division to nearest even
    except OverflowError:
        return float("inf") if exact > 0 else float("-inf")


@register_op
class Dot2Op(Op):
    """acc[i] + a[2i+1] * b[2i+1] + a[2i] * b[2i]: pairs of bf16 products added to f32 lanes, each sum rounded.

    Issued as `vdpbf16ps` where the CPU has it (Intel SDM, VDPBF16PS), else as two fused multiply-adds in the order
    odd, even, which is the order of that instruction. The instruction takes subnormal numbers for zeros and gives
    none; the meaning given here keeps them.

    %y = tile.dot2 %acc, %a, %b : (vector<16 x f32>, vector<32 x bf16>, vector<32 x bf16>) -> vector<16 x f32>
    """

    name = "tile.dot2"
    traits = (Pure,)
    acc = operand("f32, n lanes")
    a = operand("bf16, 2n lanes")
    b = operand("bf16, 2n lanes")
    out = result("f32, n lanes")

    @staticmethod
    def infer_types(acc: Type, a: Type, b: Type) -> Type:
        expect(element_of(acc) == F32, f"expected an f32 accumulator, got {acc}")
        expect(a == b and element_of(a) == BF16, f"expected two bf16 vectors of one type, got {a} and {b}")
        expect(lanes_of(a) == 2 * lanes_of(acc), f"expected {2 * lanes_of(acc)} bf16 lanes, got {lanes_of(a)}")
        return acc

    @staticmethod
    def reference(acc: Any, a: Any, b: Any) -> Any:
        products = a.astype(np.float64) * b.astype(np.float64)
        # Exact products of 16 bits: where the f64 sum is rounded, the smaller term is too small to move the f32 sum.
        partial = (acc.astype(np.float64) + products[1::2]).astype(np.float32)
        return (partial.astype(np.float64) + products[0::2]).astype(np.float32)
