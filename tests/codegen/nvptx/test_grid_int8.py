"""Products of int8 activations: exactly what their codes and scales mean, for few rows and many; rounding of rows."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gemm_packed import PackedShape
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    decode_int8_kernel,
    gemm_int8_kernel,
)
from codegen.nvptx.kernels.quantize_rows import quantize_rows_kernel
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, GroupedIntFormat, PackedArray, PlainFormat
from ir.grid_interpreter import interpret_grid
from tests.samples.base import normal

SHAPES = [PackedShape(32, 2, 16, 1, 2), PackedShape(16, 3, 16, 1, 3), PackedShape(32, 2, 32, 2, 3)]
FORMATS = [GroupedIntFormat(bits, group) for bits in (8, 4) for group in (32, 64, 128, 0)]


def operands(m: int, n: int, k: int, format: GroupedIntFormat, x_group: int):  # type: ignore[no-untyped-def]
    """(packed weights, codes and scales of x, their product): all scales are powers of two, so that sums are exact."""
    rng = np.random.default_rng(m + n + k)
    codes = rng.integers(0, 1 << format.bits, (n, k)).astype(np.uint8)
    of_w = (2.0 ** rng.integers(-1, 2, (n, format.groups(k)))).astype(np.float16)
    w = PackedArray.assemble(format, (n, k), codes, of_w)
    held = ActivationScales(k, x_group)
    x = rng.integers(-128, 128, (m, k)).astype(np.int8)
    of_x = (2.0 ** rng.integers(-1, 2, (m, held.groups))).astype(np.float32)
    stored = np.full((held.groups, held.count(m) // held.groups), np.nan, np.float32)
    stored[:, :m] = of_x.T
    wide = x * np.repeat(of_x, k // held.groups, axis=1)
    return w, x, stored, held, wide @ format.unpack(w).astype(np.float64).T


def fitting(group: int, k: int) -> int:
    """Groups of so many columns where they fill rows of k, else of 32, or whole rows."""
    return next(g for g in (group, 32, 0) if k % (g or 1) == 0)


COLUMNS = st.sampled_from([32, 48, 64, 96, 128, 192, 224, 256, 320])


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([1, 3, 8, 11, 16]), st.sampled_from([16, 40]), COLUMNS, st.sampled_from(FORMATS),
    st.sampled_from([0, 32, 64, 128]),
)  # fmt: skip
def test_few_rows(m: int, n: int, k: int, format: GroupedIntFormat, x_group: int) -> None:
    format, x_group = replace(format, group=fitting(format.group, k)), fitting(x_group, k)
    w, x, of_x, held, meant = operands(m, n, k, format, x_group)
    layout = Fragments.of(n, k, format)
    made = decode_int8_kernel(layout, held, "product", rows=8 if m <= 8 else 16, warps=2)
    y = np.full((m, n), np.nan, np.float32)
    arguments = [layout.codes(w), layout.scales(w), x, of_x, y, m]
    report = interpret_grid(made.func, arguments, blocks=layout.tiles, threads=made.threads)
    assert report.bank_conflicts == 0
    np.testing.assert_array_equal(y, meant)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([1, 17, 34]), st.sampled_from([16, 40]), COLUMNS, st.sampled_from(FORMATS),
    st.sampled_from([0, 32, 64, 128]), st.sampled_from(SHAPES),
)  # fmt: skip
def test_many_rows(m: int, n: int, k: int, format: GroupedIntFormat, x_group: int, shape: PackedShape) -> None:
    format, x_group = replace(format, group=fitting(format.group, k)), fitting(x_group, k)
    w, x, of_x, held, meant = operands(m, n, k, format, x_group)
    np.testing.assert_array_equal(product(w, x, of_x, held, shape), meant)


def product(w: PackedArray, x: np.ndarray, of_x: np.ndarray, held: ActivationScales, shape: PackedShape) -> np.ndarray:
    (n, k), m = w.shape, len(x)
    layout = Fragments.of(n, k, w.format)
    made = gemm_int8_kernel(layout, held, "product", shape)
    y = np.full((m, n), np.nan, np.float32)
    arguments = [layout.codes(w), layout.scales(w), x, of_x, y, m]
    blocks = shape.blocks(m, layout)
    assert interpret_grid(made.func, arguments, blocks=blocks, threads=made.threads).bank_conflicts == 0
    return y


@pytest.mark.parametrize("format", FORMATS[::2], ids=str)
def test_every_code_meets_its_activation(format: GroupedIntFormat) -> None:
    w, x, of_x, held, meant = operands(33, 24, 256, format, 128)
    np.testing.assert_array_equal(product(w, x, of_x, held, SHAPES[0]), meant)


def test_columns_that_end_within_a_chunk() -> None:
    """Scales of 32 activations; where the last chunk has no columns, x has the next row, or ends."""
    w, x, of_x, held, meant = operands(18, 24, 96, FORMATS[4], 32)
    np.testing.assert_array_equal(product(w, x, of_x, held, SHAPES[0]), meant)
    layout = Fragments.of(24, 96, w.format)
    made = decode_int8_kernel(layout, held, "product", rows=16, warps=2)
    few, y = np.ascontiguousarray(of_x[:, :12]), np.full((11, 24), np.nan, np.float32)
    arguments = [layout.codes(w), layout.scales(w), x[:11].copy(), few, y, 11]
    interpret_grid(made.func, arguments, blocks=layout.tiles, threads=made.threads)
    np.testing.assert_array_equal(y, meant[:11])


@settings(max_examples=5, deadline=None)
@given(
    st.integers(1, 3),
    st.sampled_from([64, 96, 256, 2176, 4224]),
    st.sampled_from([0, 32, 64, 128]),
    st.sampled_from([F32, BF16]),
    st.booleans(),
)
def test_rows_are_rounded(m: int, k: int, group: int, element: PlainFormat, by_row: bool) -> None:
    group = group if group and k % group == 0 else 0
    held = ActivationScales(k, group, by_row)
    x = normal(m, k, element=element)
    x[0, :32] = 0  # a group of zeros, or a part of one
    shape = (m, held.row) if by_row else (held.groups, held.count(m) // held.groups)
    codes, scales = np.full((m, k), 99, np.int8), np.full(shape, 7, np.float32)
    made = quantize_rows_kernel(held, "rounded", element)
    interpret_grid(made.func, [x, codes, scales, m], blocks=m, threads=made.threads)
    scales = scales[:, : held.groups].T if by_row else scales
    wide = x.astype(np.float64).reshape(m, held.groups, -1)
    largest = np.abs(wide).max(axis=-1)
    np.testing.assert_allclose(scales[:, :m].T, largest / 127, rtol=1e-6)
    grouped = codes.reshape(m, held.groups, -1).astype(np.float64)
    off = np.abs(grouped * scales[:, :m].T[..., None] - wide)
    assert (off <= 0.5001 * largest[..., None] / 127 + 1e-9).all()
    assert (np.abs(grouped).max(axis=-1) == np.where(largest > 0, 127, 0)).all()


def test_what_has_no_product() -> None:
    with pytest.raises(DiagnosticError, match="of 8 bits and 96 columns in groups of 96 have no product"):
        ActivationScales(96, 96)
    with pytest.raises(DiagnosticError, match="a multiple of 16 columns, in whole rows or groups of 32 or a multiple"):
        ActivationScales(192, 128)
    with pytest.raises(DiagnosticError, match="of 8 bits and 40 columns"):
        ActivationScales(40)
    with pytest.raises(DiagnosticError, match="int8 activations meet weights in bf16"):
        decode_int8_kernel(Fragments.of(16, 64, BF16), ActivationScales(64), "product")
    with pytest.raises(DiagnosticError, match="rounded in groups of 192 columns"):
        quantize_rows_kernel(ActivationScales(384, 192), "rounded")
