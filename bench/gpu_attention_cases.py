"""Attention on GPUs as cases of `bench.gpu_cases`: a prompt, and single tokens split over positions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase, numbers
from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import split_kernel
from codegen.nvptx.kernels.attention_rows import LOG2_E, AttentionShape
from codegen.nvptx.kernels.kv_codes import code_place
from codegen.nvptx.kv_planes import KvPlanes
from ir.formats import BF16, F16, GroupedIntFormat
from ir.types import KVCacheType


def _cache(rng: np.random.Generator, slots: int, shape: AttentionShape, ctx: int) -> list[np.ndarray]:
    """Keys and values [slots, kv heads, ctx, d]."""
    return [numbers(rng, (slots, shape.kv_heads, ctx, shape.width), BF16) for _ in range(2)]


def _packed_cache(rng: np.random.Generator, slots: int, planes: KvPlanes, ctx: int) -> list[np.ndarray]:
    """Words of any codes, scales around those of normal numbers."""
    made: list[np.ndarray] = []
    for plane in planes.planes:
        shape = (slots, planes.heads, ctx, plane.row)
        if plane.element == F16:
            made.append((rng.random(shape, np.float32) / (1 << planes.bits) + 2.0**-planes.bits).astype(np.float16))
        else:
            made.append(rng.integers(-(2**31), 2**31, shape, dtype=np.int64).astype(np.int32))
    return made


def _numbers(words: np.ndarray, scales: np.ndarray, bits: int) -> np.ndarray:
    """What the codes of a plane stand for."""
    places = np.array([code_place(i, bits) for i in range(32 // bits)], np.uint32)
    codes = (words.view(np.uint32)[..., None] >> places & np.uint32((1 << bits) - 1)).reshape(*words.shape[:-1], -1)
    return (codes.astype(np.float32) - (1 << (bits - 1))) * scales.astype(np.float32)


def _weighted(q: np.ndarray, keys: np.ndarray, values: np.ndarray, scale: float) -> tuple[float, float, np.ndarray]:
    """(largest score in units of log2, sum of weights, weighted values) of one row over all of these positions."""
    scores = keys.astype(np.float32) @ q.astype(np.float32) * (scale * LOG2_E)
    weights = np.exp2(scores - scores.max())
    return float(scores.max()), float(weights.sum()), weights @ values.astype(np.float32)


def prompt_case(name: str, tokens: int, shape: AttentionShape, *, checked: int = 64) -> GpuCase:
    """A whole prompt of one slot. Only `checked` rows spread over it are compared."""
    scale, size = shape.width**-0.5, 64
    starts = np.arange(0, tokens, size)
    chosen = np.unique(np.linspace(0, tokens - 1, checked).astype(int))

    def make(rng: np.random.Generator) -> list[Any]:
        pieces = [[s, min(size, tokens - s), 0, s] for s in starts]
        y = np.full((tokens, shape.heads, shape.width), np.nan, np.float32)
        q = numbers(rng, y.shape, BF16)
        return [q, *_cache(rng, 1, shape, tokens), np.array(pieces, np.int32), y, tokens]

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        q, keys, values = arguments[:3]
        rows = np.zeros((len(chosen), shape.heads, shape.width), np.float32)
        for i, h in np.ndindex(rows.shape[:2]):
            kv, seen = h // shape.group, slice(0, chosen[i] + 1)
            _, total, sums = _weighted(q[chosen[i], h], keys[0, kv, seen], values[0, kv, seen], scale)
            rows[i, h] = sums / total
        return [rows]

    kernel = prefill_kernel(shape, scale, name)
    moved = 2 * tokens * shape.width * (3 * shape.heads + 2 * shape.kv_heads)
    flops = 2 * tokens * tokens * shape.width * shape.heads  # what is seen: half of all pairs, two products
    return GpuCase(
        name, kernel, len(starts) * shape.heads, make, meant, (4,), moved, flops, 2.0**-7, rows=chosen
    )  # fmt: skip


def tokens_case(name: str, tokens: int, ctx: int, shape: AttentionShape, splits: int, bits: int = 0) -> GpuCase:
    """One token of each slot at the end of `ctx` positions; what the parts of `split_kernel` are. With `bits` the cache
    is codes with a scale for each position."""
    scale = shape.width**-0.5
    element = GroupedIntFormat(bits, 0) if bits else BF16
    planes = KvPlanes.of(KVCacheType(shape.kv_heads, shape.width, element))

    def make(rng: np.random.Generator) -> list[Any]:
        q = numbers(rng, (tokens, shape.heads, shape.width), BF16)
        where = [np.full(tokens, ctx - 1, np.int32), np.arange(tokens, dtype=np.int32)]
        parts = np.full((tokens, shape.heads, splits, shape.width), np.nan, np.float32)
        return [
            q,
            *(_packed_cache(rng, tokens, planes, ctx) if bits else _cache(rng, tokens, shape, ctx)),
            *where,
            parts,
            np.full((*parts.shape[:3], 2), np.nan, np.float32),
            ctx,
            splits,
        ]

    def meant(arguments: Sequence[Any]) -> list[np.ndarray]:
        """Parts and sums are relative to the part's largest score: compared as they are."""
        q, keys, values = arguments[:3]
        if bits:
            keys, values = (_numbers(arguments[1 + i], arguments[3 + i], bits) for i in range(2))
        parts, sums = np.zeros_like(arguments[outputs[0]]), np.zeros_like(arguments[outputs[1]])
        count = -(-ctx // tile)
        for t, h, s in np.ndindex(parts.shape[:3]):
            seen = slice(count * s // splits * tile, min(ctx, count * (s + 1) // splits * tile))
            own = t, h // shape.group, seen
            top, total, weighted = _weighted(q[t, h], keys[own], values[own], scale)
            parts[t, h, s], sums[t, h, s] = weighted, (top, total)
        return [parts, sums]

    tile = 32 if shape.wide else 64  # positions by which a split is cut
    outputs = (7, 8) if bits else (5, 6)
    kernel = split_kernel(shape, scale, name, planes=planes)
    moved = 2 * tokens * ctx * shape.kv_heads * sum(p.row_bytes for p in planes.planes[::2])
    return GpuCase(
        name, kernel, tokens * shape.kv_heads * splits, make, meant, outputs, moved,
        4 * tokens * ctx * shape.heads * shape.width, 2.0**-7,
    )  # fmt: skip


def real_attention() -> list[GpuCase]:
    """A prompt of 8192 tokens; batches of 1 and 16 at 8192 positions; 32 query and 8 kv heads of 128, or 16 of 256."""
    shape, wide = AttentionShape(32, 8, 128), AttentionShape(16, 8, 256)
    return [
        prompt_case("prefill", 8192, shape),
        prompt_case("prefill_256", 8192, wide),
        tokens_case("split_256_m16", 16, 8192, wide, 8),
        tokens_case("split_m1", 1, 8192, shape, 32),
        tokens_case("split_m16", 16, 8192, shape, 8),
        tokens_case("split_kv8_m16", 16, 8192, shape, 8, 8),
        tokens_case("split_kv4_m16", 16, 8192, shape, 8, 4),
    ]


def small_attention() -> list[GpuCase]:
    """The same, a few blocks each."""
    shape, wide = AttentionShape(2, 1, 64), AttentionShape(1, 1, 256)
    return [
        prompt_case("prefill", 70, shape, checked=8), tokens_case("split", 2, 200, shape, 2),
        prompt_case("prefill_256", 20, wide, checked=8), tokens_case("split_256", 1, 80, wide, 2),
        tokens_case("split_kv8", 2, 104, shape, 2, 8), tokens_case("split_kv4", 1, 80, shape, 1, 4),
    ]  # fmt: skip
