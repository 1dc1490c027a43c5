"""Experts on GPUs as cases of `bench.gpu_cases`: routing, dispatching, products of few and of many tokens.

Sizes are those of a model with 128 experts of 768 columns, 8 to a token. Experts take turns with two matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase, numbers, packed_weights
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gate import turns
from codegen.nvptx.kernels.gemm_packed import PackedShape
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, row_tiles
from codegen.nvptx.kernels.int8 import ActivationScales
from codegen.nvptx.kernels.moe_products import Experts, grouped_blocks, grouped_decode_kernel, grouped_gemm_kernel
from codegen.nvptx.kernels.moe_route import dispatch_kernel, most_tiles, route_kernel
from codegen.nvptx.kernels.wide import wide_blocks, wide_kernel
from ir.formats import BF16, F32, GroupedIntFormat
from ir.ops.moe import DispatchOp, RouteOp

Q4, Q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)
MANY = PackedShape.of(64)
CHECKED = 64  # rows of a result that are compared


def real_experts() -> list[GpuCase]:
    """A token, a batch of 16, a prompt of 4096."""
    few = [
        experts_case(f"experts_{name}_m{m}", m, 128, 8, 1536, 2048, format, rows=8)
        for name, format in (("w16", BF16), ("w8", Q8), ("w4", Q4))
        for m in (1, 16)
    ] + [experts_case("experts_w4a8_m16", 16, 128, 8, 1536, 2048, Q4, rows=8, x_group=128)]
    many = [
        experts_case(f"experts_{name}_m4096", 4096, 128, 8, 1536, 2048, format)
        for name, format in (("w16", BF16), ("w4", Q4))
    ] + [experts_case("experts_w4a8_m4096", 4096, 128, 8, 1536, 2048, Q4, x_group=128)]
    routing = [router_case("router_m16", 16, 128, 2048, 1), route_case("route_m4096", 4096, 128, 8)]
    groups = [dispatch_case("dispatch_m16", 16, 128, 8, 8), dispatch_case("dispatch_m4096", 4096, 128, 8, 64)]
    return [*few, *many, *real_group_experts(), *routing, *groups]


def real_group_experts() -> list[GpuCase]:
    """A prompt by products of warpgroups, for sm_90a."""
    case = experts_case("experts_wgmma_w4_m4096", 4096, 128, 8, 1536, 2048, Q4, shape=WgmmaShape.of(128))
    shape = BytesShape.of(128)
    return [
        case,
        experts_case("experts_wgmma_w4a8_m4096", 4096, 128, 8, 1536, 2048, Q4, shape=shape, x_group=128),
        experts_case("experts_wgmma_w8a8_m4096", 4096, 128, 8, 1536, 2048, Q8, shape=shape, x_group=128),
    ]


def small_group_experts() -> list[GpuCase]:
    """The same, a few blocks each."""
    shape = BytesShape.with_rows(16, 1, 2)
    return [experts_case("experts_wgmma_w4a8", 20, 3, 1, 32, 192, Q4, shape=shape, x_group=64)]


def small_experts() -> list[GpuCase]:
    """The same, a few blocks each."""
    return [
        experts_case("experts_w16", 3, 3, 2, 32, 128, BF16, rows=8),
        experts_case("experts_w4", 5, 2, 1, 48, 64, Q4, rows=16),
        experts_case("experts_many_w8", 20, 3, 1, 32, 64, Q8, shape=PackedShape(16, 2, 16, 1, 2)),
        experts_case("experts_w4a8", 5, 2, 1, 48, 128, Q4, rows=16, x_group=64),
        experts_case("experts_many_w8a8", 20, 3, 1, 32, 64, Q8, shape=PackedShape(16, 2, 16, 1, 2), x_group=64),
        router_case("router", 3, 5, 36, 2),
        route_case("route", 2, 70, 3),
        dispatch_case("dispatch", 20, 5, 2, 8),
    ]


def routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """i32 [tokens, top_k]: different experts for each token."""
    return np.argsort(rng.random((tokens, experts)), axis=1)[:, :top_k].astype(np.int32)


def experts_case(
    name: str, tokens: int, experts: int, top_k: int, n: int, k: int, format: Any, *, rows: int = 0,
    shape: PackedShape = MANY, x_group: int = 0,
) -> GpuCase:  # fmt: skip
    """gate | up of n rows with the gate inside: few tokens in tiles of `rows`, or many in those of `shape`.

    With `x_group` x is int8 under scales of so many columns.
    """
    layout, pairs, tile = Fragments.of(n, k, format), tokens * top_k, rows or shape.rows
    of_x = ActivationScales(k, x_group, by_row=True) if x_group else None
    of = Experts(layout, layout.nbytes, top_k, True, BF16, of_x)
    most = most_tiles(pairs, experts, tile)
    held: list[np.ndarray] = []
    order, first = turns(n), 2 if layout.group else 1  # the number of x among the arguments
    chosen = np.unique(np.linspace(0, pairs - 1, CHECKED).astype(int))

    def make(rng: np.random.Generator) -> list[Any]:
        stored = []
        held.clear()
        for _ in range(2):
            parts, w = packed_weights(rng, layout, format)
            stored.append(np.concatenate([part.view(np.uint8) for part in parts]))
            held.append(w[np.argsort(order)].astype(np.float32))
        whole = np.concatenate([stored[e % 2] for e in range(experts)])
        weights: list[np.ndarray] = [whole.view(np.int32)]
        if layout.group:
            weights.append(whole[layout.code_bytes :].view(np.float16))
        ids = routing(rng, tokens, experts, top_k)
        grouped, offsets = DispatchOp.reference(ids, num_experts=experts)
        tiles = np.zeros((most, 4), np.int32)
        entries = [
            (e, start, min(tile, last - start), 0)
            for e, (begin, last) in enumerate(pairwise(offsets))
            for start in range(begin, last, tile)
        ]
        tiles[: len(entries)] = entries
        y = np.full((pairs, n // 2), -1).astype(BF16.dtype)
        if of_x is None:
            return [*weights, numbers(rng, (tokens, k)), grouped, tiles, y, most]
        x = rng.integers(-127, 128, (tokens, k)).astype(np.int8)
        scales = (rng.random((tokens, of_x.row), np.float32) + 1) / 128
        held.append(x)
        x = row_tiles(layout, of_x).arranged(x) if isinstance(shape, BytesShape) else x
        return [*weights, x, grouped, tiles, scales, y, most]

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        x, grouped, tiles = arguments[first : first + 3]
        if of_x is not None:
            each = arguments[first + 3][:, : of_x.groups]
            x = held[-1].astype(np.float32) * np.repeat(each, k // of_x.groups, axis=1)
        made = np.zeros((len(chosen), n // 2), np.float32)
        for i, row in enumerate(chosen):
            expert = next(e for e, start, count, _ in tiles.tolist() if start <= row < start + count)
            gate, up = np.split(held[expert % 2] @ x[grouped[row] // top_k].astype(np.float32), 2)
            made[i] = gate / (1 + np.exp(-gate)) * up
        return [made]

    few = rows > 0
    kernel = grouped_decode_kernel(of, name, rows=rows) if few else grouped_gemm_kernel(of, name, shape)
    blocks = most * layout.tiles if few else grouped_blocks(of, shape, most)
    moved = min(experts, pairs) * layout.nbytes + (1 if of_x else 2) * tokens * k + pairs * n
    last = first + (4 if of_x else 3)
    return GpuCase(name, kernel, blocks, make, meant, (last,), moved, 2 * pairs * n * k, 2.0**-7, chosen)


def router_case(name: str, tokens: int, experts: int, k: int, rows: int) -> GpuCase:
    """Logits in f32."""

    def make(rng: np.random.Generator) -> list[Any]:
        y = np.full((tokens, experts), np.nan, np.float32)
        return [numbers(rng, (tokens, k), F32), numbers(rng, (experts, k), F32), y, tokens]

    blocks, moved = wide_blocks(tokens, experts, rows), 4 * (tokens * k + experts * k + tokens * experts)
    kernel = wide_kernel(experts, k, name, rows=rows)
    return GpuCase(name, kernel, blocks, make, lambda a: [a[0] @ a[1].T], (2,), moved, 2 * tokens * experts * k, 1e-5)


def route_case(name: str, tokens: int, experts: int, top_k: int) -> GpuCase:
    """Choosing experts; all numbers are compared, their ids too."""

    def make(rng: np.random.Generator) -> list[Any]:
        ids, weights = np.full((tokens, top_k), -1, np.int32), np.full((tokens, top_k), np.nan, np.float32)
        return [numbers(rng, (tokens, experts), F32), ids, weights]

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        return list(RouteOp.reference(arguments[0], top_k=top_k, normalize=True))

    kernel = route_kernel(experts, top_k, True, F32, name)
    return GpuCase(name, kernel, tokens, make, meant, (1, 2), tokens * (4 * experts + 8 * top_k), 0, 1e-5)


def dispatch_case(name: str, tokens: int, experts: int, top_k: int, tile: int) -> GpuCase:
    """Grouping pairs by expert."""
    pairs, most = tokens * top_k, most_tiles(tokens * top_k, experts, tile)

    def make(rng: np.random.Generator) -> list[Any]:
        blank = [np.full(size, -1, np.int32) for size in (pairs, experts + 1, pairs, most * 4)]
        return [routing(rng, tokens, experts, top_k), *blank, pairs, most]

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        return list(DispatchOp.reference(arguments[0], num_experts=experts))

    kernel = dispatch_kernel(experts, tile, name)
    return GpuCase(name, kernel, 1, make, meant, (1, 2), 4 * (3 * pairs + 4 * most), 0, 0.0)
