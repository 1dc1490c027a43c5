"""Products of warpgroups on bytes: exactly what codes and scales mean, on decoding's bytes, in every kind of groups."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.compile import runs_on
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, row_tiles, wgmma_bytes_kernel
from codegen.nvptx.kernels.int8 import ActivationScales
from codegen.nvptx.kernels.quantize_rows import arrange_rows_kernel, quantize_rows_kernel
from codegen.nvptx.kernels.row_tiles import RowTiles
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, I8, FP8Format, GroupedIntFormat, PackedArray, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.tensor import SwigluOp
from tests.codegen.nvptx.test_grid_int8 import FORMATS, fitting, operands
from tests.samples.base import normal

SHAPES = [BytesShape.with_rows(16, 1, 2), BytesShape.with_rows(32, 2, 3), BytesShape.with_rows(16, 1, 4)]
FP8 = [FP8Format(F8E4M3), FP8Format(F8E4M3, 1, 64), FP8Format(F8E4M3, 16, 128)]


def product(w: PackedArray, x: np.ndarray, of_x: np.ndarray, held: ActivationScales, shape: BytesShape) -> np.ndarray:
    """y of the interpreted kernel; `of_x` [groups, 4 rows at once], as other kernels have them."""
    (n, k), m = w.shape, len(x)
    layout, held = Fragments.of(n, k, w.format), replace(held, rows=8)
    scales = np.full((held.groups, -(-m // 8) * 8), np.nan, np.float32)
    scales[:, :m] = of_x[:, :m]
    scales[:, m:] = of_x[:, m - 1 : m]
    made = wgmma_bytes_kernel(layout, held, "product", shape)
    y = np.full((m, n), np.nan, np.float32)
    arguments = [layout.codes(w), layout.scales(w), row_tiles(layout, held).arranged(x), scales, y, m]
    report = interpret_grid(made.func, arguments, blocks=shape.blocks(m, layout), threads=made.threads)
    assert report.bank_conflicts == 0
    return y


@example(17, 24, 320, FORMATS[4], 64, SHAPES[0])
@settings(max_examples=2, deadline=None)
@given(
    st.sampled_from([1, 17, 33]), st.sampled_from([16, 72]), st.sampled_from([32, 96, 192, 224, 256, 384]),
    st.sampled_from(FORMATS), st.sampled_from([0, 32, 64, 128]), st.sampled_from(SHAPES),
)  # fmt: skip
def test_products(m: int, n: int, k: int, format: GroupedIntFormat, x_group: int, shape: BytesShape) -> None:
    format, x_group = replace(format, group=fitting(format.group, k)), fitting(x_group, k)
    w, x, of_x, held, meant = operands(m, n, k, format, x_group)
    np.testing.assert_array_equal(product(w, x, of_x, held, shape), meant)


@pytest.mark.parametrize(("number", "x_group"), [(0, 128), (3, 0), (4, 128)])
def test_every_code_meets_its_activation(number: int, x_group: int) -> None:
    """Scales of 32 columns and of whole rows; several turns of the stages."""
    w, x, of_x, held, meant = operands(19, 40, 384, FORMATS[number], x_group)
    np.testing.assert_array_equal(product(w, x, of_x, held, SHAPES[0]), meant)


@pytest.mark.parametrize("format", FP8[1:], ids=str)
def test_products_of_fp8(format: FP8Format) -> None:
    """Whole numbers that f8e4m3 holds, under scales that are powers of two: sums are exact."""
    rng = np.random.default_rng(3)
    m, n, k = 19, 48, 384
    w = PackedArray(
        format, (n, k), rng.integers(-8, 9, (n, k)).astype(F8E4M3.dtype).view(np.uint8),
        2.0 ** rng.integers(-1, 2, (n // format.block_rows, k // (format.block_cols or k))).astype(np.float32),
    )  # fmt: skip
    x = rng.integers(-8, 9, (m, k)).astype(F8E4M3.dtype)
    held = ActivationScales(k, 128)
    of_x = (2.0 ** rng.integers(-1, 2, (3, m))).astype(np.float32)
    wide = x.astype(np.float64) * np.repeat(of_x.T, 128, axis=1)
    np.testing.assert_array_equal(product(w, x, of_x, held, SHAPES[0]), wide @ format.unpack(w).astype(np.float64).T)


@pytest.mark.parametrize(
    ("m", "k", "group", "to", "gathered", "crossed"),
    [(3, 96, 32, I8, False, True), (9, 128, 0, I8, False, False), (2, 2080, 0, I8, True, True),
     (10, 192, 64, F8E4M3, False, False)],
)  # fmt: skip
def test_rows_are_rounded_into_their_places(
    m: int, k: int, group: int, to: PlainFormat, gathered: bool, crossed: bool
) -> None:
    """The codes of a kernel that leaves them where x has them, in their places; zeros behind the columns."""
    held = ActivationScales(k, group, gathered, rows=4 if gathered else 8)
    tiles, x = RowTiles(k, to, gathered, crossed), normal(m, k, element=BF16)
    plain = np.full((m, k), 1).astype(to.dtype)
    scales, again = (np.zeros(held.count(m + 7), np.float32) for _ in range(2))
    first = quantize_rows_kernel(held, "first", BF16, to)
    interpret_grid(first.func, [x, plain, scales, m], blocks=m, threads=first.threads)
    codes = np.full(tiles.count(m), 1).astype(to.dtype)
    made = quantize_rows_kernel(held, "rounded", BF16, to, tiles)
    interpret_grid(made.func, [x, codes, again, m], blocks=tiles.rows(m), threads=made.threads)
    np.testing.assert_array_equal(codes.astype(np.float32), tiles.arranged(plain).reshape(-1).astype(np.float32))
    kept = np.ones(held.count(m), bool)
    if not gathered:
        kept = np.arange(held.count(m)) % (-(-m // 8) * 8) < m  # behind the rows the last one is repeated
    np.testing.assert_array_equal(again[: held.count(m)][kept], scales[: held.count(m)][kept])


def test_rows_are_put_in_order() -> None:
    tiles, x = RowTiles(200, BF16), normal(11, 200, element=BF16)
    y = np.full(tiles.count(11), 1).astype(BF16.dtype)
    made = arrange_rows_kernel(tiles, "ordered")
    interpret_grid(made.func, [x, y, 11], blocks=tiles.rows(11), threads=made.threads)
    np.testing.assert_array_equal(y.view(np.uint16), tiles.arranged(x).reshape(-1).view(np.uint16))
    with pytest.raises(DiagnosticError, match="rows of 12 columns as tiles"):
        arrange_rows_kernel(RowTiles(12, BF16), "ordered")


@pytest.mark.parametrize("lanes", [1, 2, 4])
def test_parts_of_eight_columns_are_put_in_order(lanes: int) -> None:
    """As row by row kernels store them whose rows are cut finer."""
    tiles, x = RowTiles(128, BF16), normal(9, 128, element=BF16)
    k = GridBuilder("parts", 32)
    source, target, m = k.buffer("x", BF16), k.buffer("y", BF16), k.size("rows")
    with k.loop(k.thread_id() * lanes, 128, 32 * lanes) as loop:
        row = k.block_id()
        tiles.store(k, target, row, loop.i, source.load(row * 128 + loop.i, lanes), m)
    y = np.zeros(tiles.count(9), BF16.dtype)
    interpret_grid(k.grid_kernel().func, [x, y, 9], blocks=9, threads=32)
    wanted = tiles.arranged(np.concatenate([x, np.zeros((7, 128), BF16.dtype)]))  # behind the rows nothing is stored
    np.testing.assert_array_equal(y.view(np.uint16), wanted.reshape(-1).view(np.uint16))


def test_gate_and_up() -> None:
    n, k, m = 64, 128, 18
    w, x, of_x, held, meant = operands(m, n, k, FORMATS[5], 64)
    layout, held = Fragments.of(n, k, w.format), replace(held, rows=8)
    codes = PackedArray.assemble(w.format, (n, k), w.code_array()[turns(n)], w.scales[turns(n)])
    scales = np.ones((held.groups, 24), np.float32)
    scales[:, :m] = of_x[:, :m]
    shape = SHAPES[1]
    made = wgmma_bytes_kernel(layout, held, "product", shape, gate_up=True)
    y = np.full((m, n // 2), np.nan, np.float32)
    arguments = [layout.codes(codes), layout.scales(codes), row_tiles(layout, held).arranged(x), scales, y, m]
    interpret_grid(made.func, arguments, blocks=shape.blocks(m, layout), threads=made.threads)
    wanted = SwigluOp.reference(meant.astype(np.float32))
    np.testing.assert_allclose(y, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def test_shapes_and_refusals() -> None:
    for rows in (17, 32, 33, 64, 65, 128, 4096):
        shape = BytesShape.of(rows)
        assert shape.rows >= min(rows, 128) and shape.threads == (128 if rows <= 64 else 256)
    held = ActivationScales(64, rows=8)
    with pytest.raises(DiagnosticError, match="int8 activations meet weights in bf16"):
        wgmma_bytes_kernel(Fragments.of(64, 64, BF16), held, "product", SHAPES[0])
    kernel = wgmma_bytes_kernel(Fragments.of(64, 64, FORMATS[1]), held, "product", SHAPES[0])
    assert runs_on(kernel, "sm_90a") and not runs_on(kernel, "sm_90")
