"""Experts on GPUs: what moe.route, moe.dispatch and moe.grouped_gemm mean, and tiles that cover every row once."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm_packed import PackedShape
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, row_tiles
from codegen.nvptx.kernels.int8 import ActivationScales
from codegen.nvptx.kernels.moe_products import Experts, grouped_blocks, grouped_decode_kernel, grouped_gemm_kernel
from codegen.nvptx.kernels.moe_route import dispatch_kernel, most_tiles, route_kernel
from codegen.nvptx.kernels.wide import wide_blocks, wide_kernel
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, F32, I8, FP8Format, GroupedIntFormat, NumberFormat, PackedArray, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.ops.gemm import MatmulOp
from ir.ops.low_bit import unpacked
from ir.ops.moe import DispatchOp, GroupedGemmOp, RouteOp
from ir.ops.tensor import SwigluOp
from tests.samples.base import normal


def route(logits: np.ndarray, top_k: int, normalize: bool, element: PlainFormat) -> tuple[np.ndarray, np.ndarray]:
    tokens, experts = logits.shape
    made = route_kernel(experts, top_k, normalize, element, "route")
    ids, weights = np.full((tokens, top_k), -1, np.int32), np.full((tokens, top_k), np.nan, np.float32)
    interpret_grid(made.func, [logits, ids, weights], blocks=tokens, threads=made.threads)
    return ids, weights


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 3), st.integers(1, 70), st.integers(1, 8), st.booleans(), st.sampled_from([F32, BF16]))
def test_routes(tokens: int, experts: int, top_k: int, normalize: bool, element: PlainFormat) -> None:
    """Whole numbers, so that many logits are equal."""
    top_k = min(top_k, experts)
    logits = np.rint(normal(tokens, experts, scale=2)).astype(element.dtype)
    ids, weights = route(logits, top_k, normalize, element)
    want_ids, want_weights = RouteOp.reference(logits, top_k=top_k, normalize=normalize)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(weights, want_weights, rtol=1e-6)


def test_routes_of_what_is_no_number_stay_inside() -> None:
    """Experts that exist, each once: what follows reads memory by these numbers."""
    logits = np.full((2, 5), np.nan, np.float32)
    logits[1] = [np.inf, -np.inf, 0, np.nan, np.inf]
    ids, _ = route(logits, 3, True, F32)
    assert ids.tolist() == [[0, 1, 2], [0, 4, 2]]


def dispatch(ids: np.ndarray, experts: int, tile: int) -> tuple[np.ndarray, ...]:
    pairs, most = ids.size, most_tiles(ids.size, experts, tile)
    made = dispatch_kernel(experts, tile, "dispatch")
    order, inverse = (np.full(pairs, -1, np.int32) for _ in range(2))
    offsets, tiles = np.full(experts + 1, -1, np.int32), np.full((most, 4), -1, np.int32)
    interpret_grid(made.func, [ids, order, offsets, inverse, tiles, pairs, most], blocks=1, threads=made.threads)
    return order, offsets, inverse, tiles


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 90), st.sampled_from([1, 2, 5, 16, 300]), st.sampled_from([1, 8, 16]), st.randoms())
def test_dispatches(pairs: int, experts: int, tile: int, random: Random) -> None:
    ids = np.array([random.randrange(experts) for _ in range(pairs)], np.int32)
    order, offsets, inverse, tiles = dispatch(ids, experts, tile)
    want_order, want_offsets = DispatchOp.reference(ids[:, None], num_experts=experts)
    np.testing.assert_array_equal(order, want_order)
    np.testing.assert_array_equal(offsets, want_offsets)
    np.testing.assert_array_equal(inverse[order], np.arange(pairs))
    covered = [(e, r) for e, first, rows, _ in tiles.tolist() for r in range(first, first + rows)]
    assert covered == [(int(ids[pair]), r) for r, pair in enumerate(order)]
    assert tiles[:, 2].max() <= tile and not tiles[:, 3].any()


@pytest.mark.parametrize(("pairs", "experts", "tile", "most"), [(3, 8, 8, 3), (64, 8, 8, 15), (8, 1, 8, 1)])
def test_no_routing_needs_more_tiles(pairs: int, experts: int, tile: int, most: int) -> None:
    assert most_tiles(pairs, experts, tile) == most
    uneven = np.minimum(np.arange(pairs), experts - 1).astype(np.int32)  # one row each, then all of the last
    tiles = dispatch(uneven, experts, tile)[3]
    assert tiles[:, 2].sum() == pairs


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 9), st.sampled_from([1, 4, 7]), st.sampled_from([4, 36, 300]), st.sampled_from([1, 8]))
def test_wide_products(m: int, n: int, k: int, rows: int) -> None:
    x, w = normal(m, k), normal(n, k, seed="w")
    made = wide_kernel(n, k, "wide", rows=rows)
    y = np.full((m, n), np.nan, np.float32)
    interpret_grid(made.func, [x, w, y, m], blocks=wide_blocks(m, n, rows), threads=made.threads)
    np.testing.assert_allclose(y, MatmulOp.reference(x, w), rtol=1e-6, atol=1e-5)


def test_sizes_without_a_kernel() -> None:
    for kernel in (lambda: route_kernel(1025, 1, True, F32, "r"), lambda: dispatch_kernel(1025, 8, "d")):
        with pytest.raises(DiagnosticError, match=r"1025 experts on GPUs\nexpected: at most 1024"):
            kernel()
    with pytest.raises(DiagnosticError, match="f32 weights of 6 columns"):
        wide_kernel(8, 6, "wide")


# -- products of experts

Q8, Q4, FP8 = GroupedIntFormat(8, 32), GroupedIntFormat(4, 64), FP8Format(F8E4M3)
SMALL = PackedShape(16, 2, 16, 1, 2)


def stack(
    experts: int, n: int, k: int, format: NumberFormat, gate_up: bool
) -> tuple[list[np.ndarray], np.ndarray, int]:
    """(codes and scales of all experts, the numbers [experts, n, k], bytes from one expert to the next)"""
    layout = Fragments.of(n, k, format)
    order = turns(n) if gate_up else np.arange(n)
    stored, numbers = [], []
    for e in range(experts):
        w = normal(n, k, seed=f"w{e}")
        low = isinstance(format, GroupedIntFormat | FP8Format)
        packed = format.pack(w[order]) if low else w[order].astype(BF16.dtype)
        scales = layout.scales(packed).view(np.uint8) if isinstance(packed, PackedArray) else np.zeros(0, np.uint8)
        stored.append(np.concatenate([layout.codes(packed).view(np.uint8), scales]))
        wide = unpacked(packed).astype(np.float32)
        back = np.empty_like(wide)
        back[order] = wide
        numbers.append(back)
    whole = np.concatenate(stored)
    arguments: list[np.ndarray] = [whole.view(np.int32)]
    if layout.group:
        arguments.append(whole[layout.code_bytes :].copy().view(layout.scale_element.dtype))
    return arguments, np.stack(numbers), layout.nbytes


def grouped(
    ids: np.ndarray, experts: int, n: int, k: int, format: NumberFormat, gather: bool, gate_up: bool, rows: int,
    x_scales: ActivationScales | None = None, shape: PackedShape = SMALL,
) -> None:  # fmt: skip
    """One of the kernels for tiles of 8 or 16 rows, or of `shape` where rows is 0, against moe.grouped_gemm."""
    tokens, top_k = ids.shape
    order, offsets, _, tiles = dispatch(ids.reshape(-1), experts, rows or shape.rows)
    weights, numbers, stride = stack(experts, n, k, format, gate_up)
    x = normal(tokens if gather else tokens * top_k, k, element=BF16)
    layout = Fragments.of(n, k, format)
    of = Experts(layout, stride, top_k if gather else 0, gate_up, BF16 if gate_up else F32, x_scales)
    scales: list[np.ndarray] = []
    if x_scales is not None:
        codes = np.rint(x.astype(np.float32) * 40).astype(I8.dtype) if not layout.fp8 else x.astype(F8E4M3.dtype)
        of_x = np.full((len(x), x_scales.row), np.nan, np.float32)  # those behind the last group are nobody's
        of_x[:, : x_scales.groups] = 1 + np.random.default_rng(1).random((len(x), x_scales.groups), np.float32)
        wide = np.repeat(of_x[:, : x_scales.groups], k // x_scales.groups, axis=1) / 40
        x, scales, held = codes, [of_x / 40], codes.astype(np.float32) * wide
        if isinstance(shape, BytesShape) and not rows:
            x = row_tiles(layout, x_scales).arranged(codes)
    else:
        held = x
    y = np.full((tokens * top_k, n // 2 if gate_up else n), -1).astype(of.out.dtype)
    made = grouped_decode_kernel(of, "few", rows=rows, warps=2) if rows else grouped_gemm_kernel(of, "many", shape)
    blocks = len(tiles) * of.layout.tiles if rows else grouped_blocks(of, shape, len(tiles))
    arguments = [*weights, x, order, tiles, *scales, y, len(tiles)]
    report = interpret_grid(made.func, arguments, blocks=blocks, threads=made.threads)
    assert report.bank_conflicts == 0
    meant = GroupedGemmOp.reference(held, numbers, order, offsets, gather=of.gather)
    if gate_up:
        meant = SwigluOp.reference(meant)
    near = 2.0**-8 if gate_up else 1e-5
    np.testing.assert_allclose(y.astype(np.float32), meant, rtol=near, atol=near * np.sqrt(k))


@settings(max_examples=9, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 3), st.sampled_from([1, 3, 7]), st.sampled_from([BF16, Q8, Q4]),
    st.booleans(), st.booleans(), st.sampled_from([8, 16, 0]), st.randoms(),
)  # fmt: skip
def test_grouped_products(
    tokens: int, top_k: int, experts: int, format: NumberFormat, gather: bool, gate_up: bool, rows: int, random: Random
) -> None:
    """Experts with many rows, with few and with none; scales behind the codes of their expert."""
    top_k = min(top_k, experts)
    ids = np.array([random.sample(range(experts), top_k) for _ in range(tokens)], np.int32)
    grouped(ids, experts, 48 if gate_up else 40, 96 if format != Q4 else 128, format, gather, gate_up, rows)


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 12), st.integers(1, 3), st.sampled_from([1, 3, 7]), st.sampled_from([Q8, Q4, FP8]),
    st.sampled_from([(128, 0), (128, 32), (320, 64), (256, 128)]), st.booleans(), st.booleans(),
    st.sampled_from([8, 16, 0]), st.randoms(),
)  # fmt: skip
def test_grouped_products_of_bytes(
    tokens: int, top_k: int, experts: int, format: NumberFormat, columns: tuple[int, int], gather: bool, gate_up: bool,
    rows: int, random: Random,
) -> None:  # fmt: skip
    """Activations of 8 bits: a row that is gathered meets its own scales, in each of its groups."""
    (k, group), top_k = columns, min(top_k, experts)
    ids = np.array([random.sample(range(experts), top_k) for _ in range(tokens)], np.int32)
    scales = ActivationScales(k, group, by_row=True)
    grouped(ids, experts, 48 if gate_up else 40, k, format, gather, gate_up, rows, scales)


@pytest.mark.parametrize(
    ("format", "k", "group", "gather", "gate_up"),
    [(Q8, 192, 64, True, True), (Q4, 320, 0, False, True), (FP8, 256, 128, True, False), (Q8, 96, 32, False, False)],
)
def test_grouped_products_of_bytes_by_warpgroups(
    format: NumberFormat, k: int, group: int, gather: bool, gate_up: bool
) -> None:
    """More rows than a tile has; a stage with four groups of x, with two, with one, with none of its own."""
    ids = (np.arange(40, dtype=np.int32).reshape(20, 2) + np.arange(20)[:, None]) % 3 % 2
    ids = np.stack([ids[:, 0], 2 + ids[:, 1]], axis=1).astype(np.int32)
    scales = ActivationScales(k, group, by_row=True)
    grouped(ids, 5, 48, k, format, gather, gate_up, 0, scales, BytesShape.with_rows(16, 1, 3))


def test_scales_of_every_row_are_its_own() -> None:
    """More rows than a tile has, groups that four scales do not hold, columns that end within a chunk."""
    ids = np.arange(40, dtype=np.int32)[:, None] % 3 % 2
    for rows, (k, group) in ((0, (384, 64)), (16, (384, 64)), (0, (224, 32)), (16, (224, 32))):
        grouped(ids, 2, 16, k, Q8, True, False, rows, ActivationScales(k, group, by_row=True))


def test_experts_that_lie_crooked() -> None:
    of = Experts(Fragments.of(16, 64, BF16), 2056)
    with pytest.raises(DiagnosticError, match="experts 2056 bytes apart"):
        grouped_decode_kernel(of, "few")
