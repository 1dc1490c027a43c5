"""Products of warpgroups: what gemm.matmul means, for every format and around the tiles' sizes, on decoding's bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm_packed import PackedTile
from codegen.nvptx.kernels.gemm_wgmma import GroupGemm, WgmmaShape, gemm_wgmma_kernel
from codegen.nvptx.kernels.row_tiles import RowTiles
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, F32, I32, FP8Format, GroupedIntFormat, NumberFormat, PackedArray, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from ir.ops.tensor import SwigluOp
from tests.codegen.nvptx.test_grid_decode import FORMATS, weights
from tests.samples.base import normal

SHAPES = [WgmmaShape.with_rows(8, 1, 3), WgmmaShape.with_rows(16, 2, 4), WgmmaShape.with_rows(40, 1, 5)]


def product(
    x: np.ndarray, w: np.ndarray | PackedArray, format: NumberFormat, shape: WgmmaShape, out: PlainFormat = F32,
    tiled: bool = False,
) -> np.ndarray:  # fmt: skip
    """y [m, n] of the interpreted kernel, which takes the bytes that decoding takes."""
    (m, k), n = x.shape, w.shape[0]
    layout = Fragments.of(n, k, format)
    made = gemm_wgmma_kernel(layout, "product", shape, out, tiled=tiled)
    arguments = [layout.codes(w), *([layout.scales(w)] if isinstance(w, PackedArray) else [])]
    x = RowTiles(k, BF16).arranged(x) if tiled else x
    y = np.full((m, n), -1).astype(out.dtype)
    blocks = shape.blocks(m, layout)
    report = interpret_grid(made.func, [*arguments, x, y, m], blocks=blocks, threads=made.threads)
    assert report.bank_conflicts == 0
    return y


@example(17, 90, 72, BF16, SHAPES[2], F32)
@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from([1, 17, 41]), st.sampled_from([8, 64, 90]), st.sampled_from([32, 64, 72, 192, 320]),
    st.sampled_from(FORMATS), st.sampled_from(SHAPES), st.sampled_from([F32, BF16]),
)  # fmt: skip
def test_products(m: int, n: int, k: int, format: NumberFormat, shape: WgmmaShape, out: PlainFormat) -> None:
    if isinstance(format, GroupedIntFormat) and format.group:
        k = -(-k // format.group) * format.group
    x, w = normal(m, k, element=BF16), weights(n, k, format)
    rounding, meant = 2.0**-8 if out == BF16 else 1e-5, w
    if isinstance(format, GroupedIntFormat) and isinstance(w, PackedArray):
        meant = format.unpack(w).astype(BF16.dtype)  # weights under their scales are rounded to bf16
    want = MatmulOp.reference(x, meant)
    got = product(x, w, format, shape, out).astype(np.float32)
    np.testing.assert_allclose(got, want, rtol=rounding, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("format", FORMATS[:6], ids=str)
def test_whole_numbers_are_exact(format: NumberFormat) -> None:
    """Every weight meets its activation: scales are powers of two, so nothing is rounded."""
    rng = np.random.default_rng(5)
    m, n, k = 19, 72, 320 if not isinstance(format, GroupedIntFormat) or format.group < 128 else 256
    x = rng.integers(-4, 5, (m, k)).astype(BF16.dtype)
    if isinstance(format, GroupedIntFormat):
        codes = rng.integers(0, 1 << format.bits, (n, k)).astype(np.uint8)
        scales = 2.0 ** rng.integers(-2, 3, (n, format.groups(k)))
        w = PackedArray.assemble(format, (n, k), codes, scales.astype(np.float16))
    else:
        w = rng.integers(-8, 8, (n, k)).astype(BF16.dtype)
    np.testing.assert_array_equal(product(x, w, format, SHAPES[0]), MatmulOp.reference(x, w))


@pytest.mark.parametrize(("m", "n", "k", "format"), [(19, 72, 328, BF16), (17, 40, 256, FORMATS[2])], ids=str)
def test_rows_that_bulk_copies_bring(m: int, n: int, k: int, format: NumberFormat) -> None:
    """The bits of rows that threads copy: tiles, rows and columns behind the last ones."""
    x, w, shape = normal(m, k, element=BF16), weights(n, k, format), WgmmaShape.with_rows(16, 1, 3)
    got = product(x, w, format, shape, tiled=True)
    np.testing.assert_array_equal(got, product(x, w, format, shape))


def test_scaled_weights_are_rounded_once() -> None:
    """Scales have more digits than bf16 has: they are taken in two parts."""
    format = GroupedIntFormat(4, 64)
    codes = np.tile(np.arange(16, dtype=np.uint8), (16, 4))
    scales = (1 + np.arange(16) / 1024).astype(np.float16)[:, None]
    w = PackedArray.assemble(format, (16, 64), codes, scales)
    got = product(np.eye(64, dtype=BF16.dtype), w, format, SHAPES[1]).T
    exact = (codes.astype(np.float32) - 8) * scales.astype(np.float32)
    np.testing.assert_array_equal(got, exact.astype(BF16.dtype).astype(np.float32))


@pytest.mark.parametrize("format", [BF16, GroupedIntFormat(4, 32), FP8Format(F8E4M3)], ids=str)
def test_gate_and_up(format: NumberFormat) -> None:
    m, n, k = 18, 48, 128
    x, w = normal(m, k, element=BF16), normal(n, k, seed="w")
    if isinstance(format, GroupedIntFormat | FP8Format):
        packed, meant = format.pack(w[turns(n)]), format.pack(w)
    else:
        packed, meant = w[turns(n)].astype(BF16.dtype), w.astype(BF16.dtype)
    layout, shape = Fragments.of(n, k, format), SHAPES[1]
    made = gemm_wgmma_kernel(layout, "product", shape, gate_up=True)
    arguments = [layout.codes(packed), *([layout.scales(packed)] if isinstance(packed, PackedArray) else [])]
    y = np.full((m, n // 2), np.nan, np.float32)
    interpret_grid(made.func, [*arguments, x, y, m], blocks=shape.blocks(m, layout), threads=made.threads)
    wanted = SwigluOp.reference(MatmulOp.reference(x, meant))
    np.testing.assert_allclose(y, wanted, rtol=2.0**-7, atol=2.0**-8 * np.abs(wanted).max())


def test_rows_of_a_grouped_product() -> None:
    """Some rows of y from chosen rows of x, with one of several matrices."""
    n, k = 64, 128
    x, w = normal(24, k, element=BF16), normal(2 * n, k, seed="w", element=BF16)
    chosen = np.array([5, 0, 23, 7, 7, 11], np.int32)
    layout, shape = Fragments.of(n, k, BF16), SHAPES[0]
    b = GridBuilder("some", shape.threads)
    codes, order, numbers, y = (b.buffer(*a) for a in (("c", I32), ("o", I32), ("x", BF16), ("y", F32)))
    start = b.index_value(2)
    tile = PackedTile(start, start + 3, b.index(0), lambda row: order.load(row).to_index())
    second = codes.at(layout.tiles * layout.chunks * layout.loads * 128)
    GroupGemm(b, shape, layout, (second, None), (numbers, y), tile).build()
    got = np.zeros((6, n), np.float32)
    stack = np.concatenate([layout.codes(w[:n]), layout.codes(w[n:])])
    interpret_grid(b.grid_kernel().func, [stack, chosen, x, got], blocks=1, threads=shape.threads)
    np.testing.assert_allclose(got[2:5], MatmulOp.reference(x[chosen[2:5]], w[n:]), rtol=1e-5, atol=1e-4)
    assert not got[:2].any() and not got[5:].any()


def test_shapes_by_rows() -> None:
    """Few rows take small blocks; every shape is whole warpgroups and covers what it is for."""
    layout = Fragments(4096, 4096, 16)
    for rows in (17, 32, 33, 64, 65, 128, 129, 4096):
        shape = WgmmaShape.of(rows)
        assert shape.rows >= min(rows, 256) and shape.threads == (128 if rows <= 64 else 256)
        assert shape.blocks(rows, layout) == -(-rows // shape.rows) * (8192 // shape.threads)


def test_other_architectures_refuse() -> None:
    kernel = gemm_wgmma_kernel(Fragments.of(64, 64, BF16), "product", WgmmaShape.of(32))
    with pytest.raises(DiagnosticError, match="@product has instructions that sm_90 lacks") as caught:
        compile_ptx([kernel], "sm_90")
    assert "sm_90a" in str(caught.value)
