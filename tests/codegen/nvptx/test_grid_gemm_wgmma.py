"""Products of warpgroups: what gemm.matmul means, around the sizes of tiles; elsewhere they are refused."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape, gemm_wgmma_kernel, swizzled_tiles
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from tests.samples.base import normal

SHAPES = [WgmmaShape(1, 64, 3), WgmmaShape(2, 64, 4), WgmmaShape(1, 128, 4)]


def product(x: np.ndarray, w: np.ndarray, shape: WgmmaShape, out: PlainFormat = F32) -> np.ndarray:
    """y [m, n] of the interpreted kernel."""
    (m, k), n = x.shape, len(w)
    made = gemm_wgmma_kernel(n, k, "product", shape, out)
    y = np.full((m, n), -1).astype(out.dtype)
    arguments = [x, swizzled_tiles(w), y, m]
    report = interpret_grid(made.func, arguments, blocks=shape.blocks(m, n), threads=made.threads)
    assert report.bank_conflicts == 0
    return y


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([1, 64, 130]), st.sampled_from([8, 64, 136]), st.integers(1, 6), st.sampled_from(SHAPES),
    st.sampled_from([F32, BF16]),
)  # fmt: skip
def test_products(m: int, n: int, steps: int, shape: WgmmaShape, out: PlainFormat) -> None:
    x, w = normal(m, 64 * steps, element=BF16), normal(n, 64 * steps, seed="w", element=BF16)
    rounding = 2.0**-8 if out == BF16 else 1e-5
    got = product(x, w, shape, out).astype(np.float32)
    np.testing.assert_allclose(got, MatmulOp.reference(x, w), rtol=rounding, atol=4 * rounding)


def test_whole_numbers_are_exact() -> None:
    rng = np.random.default_rng(3)
    x, w = (rng.integers(-8, 9, shape).astype(BF16.dtype) for shape in ((70, 384), (72, 384)))
    np.testing.assert_array_equal(product(x, w, SHAPES[0]), MatmulOp.reference(x, w))


@pytest.mark.parametrize(("n", "k"), [(12, 64), (16, 96), (16, 0)])
def test_sizes_without_a_kernel(n: int, k: int) -> None:
    with pytest.raises(DiagnosticError, match=f"a product of {n} x {k} weights on sm_90a"):
        gemm_wgmma_kernel(n, k, "product")


def test_other_architectures_refuse() -> None:
    with pytest.raises(DiagnosticError, match="@product has instructions that sm_90 lacks") as caught:
        compile_ptx([gemm_wgmma_kernel(64, 64, "product")], "sm_90")
    assert "sm_90a" in str(caught.value)
