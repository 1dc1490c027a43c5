"""Matrix products of many rows on GPUs: what gemm.matmul means, at sizes around the tiles, with 2 and 3 stages."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm import GemmShape, gemm_kernel
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from ir.ops.tensor import SwigluOp
from tests.samples.base import normal

SHAPES = [GemmShape(32, 32, 16, 16, 2), GemmShape(16, 48, 16, 16, 3), GemmShape(32, 32, 32, 16, 3)]


def product(x: np.ndarray, w: np.ndarray, shape: GemmShape, out: PlainFormat = F32) -> np.ndarray:
    """y [m, n] of the interpreted kernel."""
    (m, k), n = x.shape, len(w)
    made = gemm_kernel(n, k, "product", shape, out)
    y = np.full((m, n), -1).astype(out.dtype)
    report = interpret_grid(made.func, [x, w, y, m], blocks=shape.blocks(m, n), threads=made.threads)
    assert report.bank_conflicts == 0
    return y


@settings(max_examples=6, deadline=None)
@given(
    st.sampled_from([1, 15, 33, 50]), st.sampled_from([8, 32, 56]), st.sampled_from([8, 64, 72, 200]),
    st.sampled_from(SHAPES), st.sampled_from([F32, BF16]),
)  # fmt: skip
def test_products(m: int, n: int, k: int, shape: GemmShape, out: PlainFormat) -> None:
    x, w = normal(m, k, element=BF16), normal(n, k, seed="w", element=BF16)
    meant = MatmulOp.reference(x, w)
    rounding = 2.0**-8 if out == BF16 else 1e-5
    got = product(x, w, shape, out).astype(np.float32)
    np.testing.assert_allclose(got, meant, rtol=rounding, atol=rounding)


def test_whole_numbers_are_exact() -> None:
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-8, 9, shape).astype(BF16.dtype) for shape in ((40, 136), (24, 136)))
    np.testing.assert_array_equal(product(x, w, SHAPES[0]), MatmulOp.reference(x, w))


@pytest.mark.parametrize("shape", [SHAPES[0], GemmShape(16, 48, 16, 48, 2)])
def test_a_gate_in_the_product(shape: GemmShape) -> None:
    """Gate and up rows in turns: y is silu(gate) * up."""
    x, w = normal(20, 72, element=BF16), normal(2 * 40, 72, seed="w", element=BF16)
    made = gemm_kernel(80, 72, "product", shape, BF16, gate_up=True)
    y = np.full((20, 40), -1).astype(BF16.dtype)
    interpret_grid(made.func, [x, w[turns(80)], y, 20], blocks=shape.blocks(20, 80), threads=made.threads)
    meant = SwigluOp.reference(MatmulOp.reference(x, w))
    np.testing.assert_allclose(y.astype(np.float32), meant, rtol=2.0**-8, atol=2.0**-8)
    with pytest.raises(DiagnosticError, match="gate and up of 12 rows each"):
        gemm_kernel(24, 64, "product", gate_up=True)


@pytest.mark.parametrize(("n", "k"), [(12, 64), (16, 60), (16, 0)])
def test_sizes_without_a_kernel(n: int, k: int) -> None:
    with pytest.raises(DiagnosticError, match=f"a product of {n} x {k} weights on GPUs"):
        gemm_kernel(n, k, "product")
