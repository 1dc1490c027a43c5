"""Decode products for GPUs: what gemm.matmul means, for every format, around the sizes of tiles, chunks and rounds."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import decode_kernel
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, GroupedIntFormat, NumberFormat, PackedArray
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from tests.samples.base import normal


def weights(n: int, k: int, format: NumberFormat) -> np.ndarray | PackedArray:
    values = normal(n, k, seed="w")
    return format.pack(values) if isinstance(format, GroupedIntFormat) else values.astype(BF16.dtype)


def product(x: np.ndarray, w: np.ndarray | PackedArray, format: NumberFormat, warps: int, ahead: int) -> np.ndarray:
    """y [m, n] of the interpreted kernel."""
    n, k = w.shape
    layout = Fragments.of(n, k, format)
    made = decode_kernel(layout, "product", rows=8 if len(x) <= 8 else 16, warps=warps, ahead=ahead)
    arguments = [layout.codes(w)]
    if isinstance(w, PackedArray):
        arguments.append(layout.scales(w))
    assert sum(a.nbytes for a in arguments) == layout.nbytes
    y = np.full((len(x), n), np.nan, np.float32)
    report = interpret_grid(made.func, [*arguments, x, y, len(x)], blocks=layout.tiles, threads=made.threads)
    assert report.bank_conflicts == 0
    return y


FORMATS = [BF16, *(GroupedIntFormat(bits, group) for bits in (4, 8) for group in (32, 64, 128, 0))]


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 16), st.sampled_from([1, 16, 40]), st.sampled_from([32, 64, 96, 128, 192, 328, 576]),
    st.sampled_from(FORMATS), st.sampled_from([1, 2]), st.integers(1, 3),
)  # fmt: skip
def test_decode_products(m: int, n: int, k: int, format: NumberFormat, warps: int, ahead: int) -> None:
    if isinstance(format, GroupedIntFormat) and format.group:
        k = -(-k // format.group) * format.group
    x, w = normal(m, k, element=BF16), weights(n, k, format)
    meant = MatmulOp.reference(x, w)
    scale = np.sqrt(k) * (np.abs(np.asarray(w.scales, np.float32)).max() * 8 if isinstance(w, PackedArray) else 1)
    np.testing.assert_allclose(product(x, w, format, warps, ahead), meant, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.parametrize("format", FORMATS[:6], ids=str)
def test_every_weight_meets_its_activation(format: NumberFormat) -> None:
    """Whole numbers, so that every product and sum is exact: nothing may be off by anything."""
    rng = np.random.default_rng(5)
    n, k = 24, 128
    x = rng.integers(-4, 5, (3, k)).astype(BF16.dtype)
    if isinstance(format, GroupedIntFormat):
        groups = format.groups(k)
        codes = rng.integers(0, 1 << format.bits, (n, k)).astype(np.uint8)
        scales = 2.0 ** rng.integers(-2, 3, (n, groups))
        w = PackedArray.assemble(format, (n, k), codes, scales.astype(np.float16))
    else:
        w = rng.integers(-8, 8, (n, k)).astype(BF16.dtype)
    np.testing.assert_array_equal(product(x, w, format, 2, 1), MatmulOp.reference(x, w))


@pytest.mark.parametrize(
    ("k", "format", "message"),
    [
        (92, BF16, "a matrix of 92 columns has no product on GPUs; expected a multiple of 8"),
        (64, F32, "weights in f32 have no product on GPUs; expected bf16, f8e4m3, or q2_sym to q8_sym"),
        (64, GroupedIntFormat(1, 32), "q1_sym<group=32, scale=f16> has no product on GPUs"),
        (64, GroupedIntFormat(4, 16), "groups of 32, a multiple of 64 columns that divides 64, or whole rows"),
        (192, GroupedIntFormat(4, 128), "a multiple of 64 columns that divides 192"),
        (64, GroupedIntFormat(4, 32, True), "expected q2_sym to q8_sym with scale=f16"),
        (64, GroupedIntFormat(8, 32, scale=BF16), "expected q2_sym to q8_sym with scale=f16"),
    ],
)
def test_matrices_without_a_product(k: int, format: NumberFormat, message: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        Fragments.of(32, k, format)
    assert message in str(caught.value)


def test_bytes_of_a_layout() -> None:
    """What decoding reads: 4.5 bits a weight with a scale for 32, nothing beside bf16."""
    assert Fragments.of(4096, 4096, GroupedIntFormat(4, 32)).nbytes == 4096 * 4096 * 9 // 16
    assert Fragments.of(4096, 4096, BF16).nbytes == 4096 * 4096 * 2
    assert Fragments.of(17, 64, GroupedIntFormat(8, 0)).nbytes == 32 * 64 + 32 * 2
    assert Fragments.of(17, 40, GroupedIntFormat(8, 0)).nbytes == 32 * 64 + 32 * 2
