"""Products of many rows with weights of decoding: what gemm.matmul means, for every format, around the tiles' sizes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm_packed import PackedGemm, PackedShape, PackedTile, gemm_packed_kernel
from ir.formats import BF16, F32, I32, GroupedIntFormat, NumberFormat, PackedArray, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from ir.ops.tensor import SwigluOp
from tests.codegen.nvptx.test_grid_decode import FORMATS, weights
from tests.samples.base import normal

SHAPES = [PackedShape(32, 2, 16, 1, 2), PackedShape(16, 3, 16, 1, 3), PackedShape(32, 2, 32, 2, 3)]


def product(
    x: np.ndarray, w: np.ndarray | PackedArray, format: NumberFormat, shape: PackedShape, out: PlainFormat = F32
) -> np.ndarray:
    """y [m, n] of the interpreted kernel, which takes the bytes that decoding takes."""
    (m, k), n = x.shape, w.shape[0]
    layout = Fragments.of(n, k, format)
    made = gemm_packed_kernel(layout, "product", shape, out)
    arguments = [layout.codes(w), *([layout.scales(w)] if isinstance(w, PackedArray) else [])]
    y = np.full((m, n), -1).astype(out.dtype)
    blocks = shape.blocks(m, layout)
    report = interpret_grid(made.func, [*arguments, x, y, m], blocks=blocks, threads=made.threads)
    assert report.bank_conflicts == 0
    return y


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([1, 17, 40]), st.sampled_from([1, 32, 50]), st.sampled_from([32, 64, 72, 160, 192, 256]),
    st.sampled_from(FORMATS), st.sampled_from(SHAPES), st.sampled_from([F32, BF16]),
)  # fmt: skip
def test_products(m: int, n: int, k: int, format: NumberFormat, shape: PackedShape, out: PlainFormat) -> None:
    if isinstance(format, GroupedIntFormat) and format.group:
        k = -(-k // format.group) * format.group
    x, w = normal(m, k, element=BF16), weights(n, k, format)
    meant = MatmulOp.reference(x, w)
    rounding = 2.0**-8 if out == BF16 else 1e-5
    scale = np.sqrt(k) * (np.abs(np.asarray(w.scales, np.float32)).max() * 8 if isinstance(w, PackedArray) else 1)
    got = product(x, w, format, shape, out).astype(np.float32)
    np.testing.assert_allclose(got, meant, rtol=rounding, atol=rounding * scale)


@pytest.mark.parametrize("format", FORMATS[:6], ids=str)
def test_whole_numbers_are_exact(format: NumberFormat) -> None:
    rng = np.random.default_rng(5)
    m, n, k = 19, 40, 192 if not isinstance(format, GroupedIntFormat) or format.group < 128 else 256
    x = rng.integers(-4, 5, (m, k)).astype(BF16.dtype)
    if isinstance(format, GroupedIntFormat):
        codes = rng.integers(0, 1 << format.bits, (n, k)).astype(np.uint8)
        scales = 2.0 ** rng.integers(-2, 3, (n, format.groups(k)))
        w = PackedArray.assemble(format, (n, k), codes, scales.astype(np.float16))
    else:
        w = rng.integers(-8, 8, (n, k)).astype(BF16.dtype)
    np.testing.assert_array_equal(product(x, w, format, SHAPES[0]), MatmulOp.reference(x, w))


@pytest.mark.parametrize("k", [32, 72])
def test_columns_that_end_within_a_chunk(k: int) -> None:
    """The row behind is not finite: nothing of it may be met."""
    x, w = normal(20, k, element=BF16), weights(24, k, BF16)
    x[1::2] = np.inf
    got = product(x, w, BF16, SHAPES[0])[::2]
    np.testing.assert_allclose(got, MatmulOp.reference(x[::2], w), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("format", [BF16, GroupedIntFormat(4, 32)], ids=str)
def test_gate_and_up(format: NumberFormat) -> None:
    m, n, k = 18, 48, 128
    x, w = normal(m, k, element=BF16), normal(n, k, seed="w")
    packed = format.pack(w[turns(n)]) if isinstance(format, GroupedIntFormat) else w[turns(n)].astype(BF16.dtype)
    layout, shape = Fragments.of(n, k, format), SHAPES[0]
    made = gemm_packed_kernel(layout, "product", shape, gate_up=True)
    arguments = [layout.codes(packed), *([layout.scales(packed)] if isinstance(packed, PackedArray) else [])]
    y = np.full((m, n // 2), np.nan, np.float32)
    interpret_grid(made.func, [*arguments, x, y, m], blocks=shape.blocks(m, layout), threads=made.threads)
    both = MatmulOp.reference(x, format.pack(w) if isinstance(format, GroupedIntFormat) else w.astype(BF16.dtype))
    np.testing.assert_allclose(y, SwigluOp.reference(both), rtol=1e-4, atol=1e-3)


def test_rows_of_a_grouped_product() -> None:
    """Some rows of y from chosen rows of x, with one of several matrices."""
    m, n, k = 24, 32, 128
    x, w = normal(m, k, element=BF16), normal(2 * n, k, seed="w", element=BF16)
    chosen = np.array([5, 0, 23, 7, 7, 11], np.int32)
    layout, shape = Fragments.of(n, k, BF16), SHAPES[1]
    b = GridBuilder("some", shape.threads)
    codes, order, numbers, y, first = (
        b.buffer(*a) for a in (("c", I32), ("o", I32), ("x", BF16), ("y", F32), ("f", I32))
    )
    start = first.load(0).to_index()
    tile = PackedTile(start, start + 3, b.index(0), lambda row: order.load(row).to_index())
    second = codes.at(layout.tiles * layout.chunks * layout.loads * 128)
    PackedGemm(b, shape, layout, (second, None), (numbers, y), tile).build()
    got = np.zeros((6, n), np.float32)
    stack = np.concatenate([layout.codes(w[:n]), layout.codes(w[n:])])
    arguments = [stack, chosen, x, got, np.array([2], np.int32)]
    interpret_grid(b.grid_kernel().func, arguments, blocks=1, threads=shape.threads)
    np.testing.assert_allclose(got[2:5], MatmulOp.reference(x[chosen[2:5]], w[n:]), rtol=1e-5, atol=1e-4)
    assert not got[:2].any() and not got[5:].any()


def test_shapes_by_rows() -> None:
    """Few rows take small tiles; every shape is whole warps and covers what it is for."""
    for rows in (17, 32, 33, 64, 65, 4096):
        shape = PackedShape.of(rows)
        assert shape.rows >= min(rows, 128) and shape.threads in (128, 256)
        assert shape.blocks(rows, Fragments(4096, 4096, 16)) == -(-rows // shape.rows) * 256 // shape.tiles
