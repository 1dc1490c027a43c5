"""Attention over low-bit caches on GPUs: what attn.attention means over the same cache (`ir.kv_low_bit`)."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import join_kernel, split_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from codegen.nvptx.kernels.kv_codes import code_place
from codegen.nvptx.kv_planes import KvPlanes
from ir.formats import BF16, GroupedIntFormat
from ir.grid_interpreter import interpret_grid
from ir.kv_low_bit import LowBitKVState, rotate
from ir.ops.attention import visible
from ir.types import KVCacheType
from tests.samples.base import normal

Q8, Q4 = GroupedIntFormat(8, 0), GroupedIntFormat(4, 0)
SLOTS, CTX = 2, 96
CACHES = [
    KVCacheType(1, 64, Q8), KVCacheType(1, 128, Q8), KVCacheType(1, 16, Q8, rotate=8), KVCacheType(2, 64, Q4),
    KVCacheType(1, 128, Q4, rotate=64), KVCacheType(1, 64, Q4, rotate=64, recent=16), KVCacheType(1, 32, Q8, recent=32),
]  # fmt: skip


def planes_of(type: KVCacheType, state: LowBitKVState, lengths: list[int]) -> list[np.ndarray]:
    """The planes of a cache. What has not been appended is no number, or any code."""
    kv = KvPlanes.of(type)
    made: list[np.ndarray] = []
    for codes in (state.key_codes, state.value_codes):
        each = 32 // kv.bits
        wide = np.moveaxis(codes, 2, 1).reshape(SLOTS, kv.heads, CTX, -1, each).astype(np.uint32)
        shifts = np.array([code_place(i, kv.bits) for i in range(each)], np.uint32)
        made.append(np.bitwise_or.reduce(wide << shifts, axis=-1).view(np.int32))
    for scales in (state.key_scales, state.value_scales):
        plane = np.moveaxis(scales, 2, 1)[..., None].copy()
        for slot, length in enumerate(lengths):
            plane[slot, :, length:] = np.nan
        made.append(plane)
    for kept in (state.recent_keys, state.recent_values) if kv.recent else ():
        ring = np.full((SLOTS, kv.heads, kv.ring, kv.stored), np.nan).astype(BF16.dtype)
        for slot, length in enumerate(lengths):
            ring[slot, :, :length] = np.moveaxis(kept[slot], 1, 0)[:, :length]
        made.append(ring)
    return made


def prepare(type: KVCacheType, tokens: int, group: int, lengths: list[int]) -> tuple[Any, ...]:
    """(state, planes of the cache, their arrays, shape without a window, queries as kernels take them)"""
    kv = KvPlanes.of(type)
    keys, values = (normal(SLOTS, CTX, kv.heads, kv.width, seed=seed) for seed in ("keys", "values"))
    state = LowBitKVState.of(type, keys, values)
    heads = group * kv.heads
    q = rotate(normal(tokens, heads, kv.width, seed="q"), type.rotate).astype(BF16.dtype)
    return state, kv, planes_of(type, state, lengths), heads, q


def meant(
    q: np.ndarray, state: LowBitKVState, positions: np.ndarray, slots: np.ndarray, window: int, scale: float
) -> np.ndarray:
    """f64 softmax attention over what each row reads."""
    y = np.zeros(q.shape)
    turned = rotate(q.astype(np.float32), state.type.rotate).astype(np.float64)
    group = q.shape[1] // state.heads
    for t, h in np.ndindex(q.shape[:2]):
        keys, values = state.rows(int(slots[t]), h // group, int(positions[t]))
        scores = keys.astype(np.float64) @ turned[t, h] * scale
        scores[~visible(int(positions[t]), window, CTX)] = -np.inf
        weights = np.exp(scores - scores.max())
        y[t, h] = weights / weights.sum() @ values.astype(np.float64)
    return y


@settings(max_examples=2, deadline=None)
@given(
    st.sampled_from([(0, 1), (0, 23), (17, 32), (64, 30)]), st.sampled_from([(0, 32), (5, 14)]),
    st.sampled_from(CACHES), st.sampled_from([0, 20]),
)  # fmt: skip
@example((17, 32), (0, 32), CACHES[5], 0)
@example((64, 30), (5, 14), CACHES[6], 20)
def test_prompts(one: tuple[int, int], other: tuple[int, int], type: KVCacheType, window: int) -> None:
    """Two pieces of two slots, each from a position on for so many tokens."""
    tokens = one[1] + other[1]
    pieces = np.array([[0, one[1], 1, one[0]], [one[1], other[1], 0, other[0]]], np.int32)
    positions = np.concatenate([start + np.arange(count) for start, count in (one, other)])
    slots = np.repeat([1, 0], [one[1], other[1]])
    state, kv, planes, heads, q = prepare(type, tokens, 2, [sum(other), sum(one)])
    shape = AttentionShape(heads, kv.heads, kv.width, window)
    made = prefill_kernel(shape, 0.125, "prefill", warps=2, tile=32, planes=kv)
    y = np.full(q.shape, np.nan, np.float32)
    blocks = len(pieces) * heads
    report = interpret_grid(made.func, [q, *planes, pieces, y, CTX], blocks=blocks, threads=made.threads)
    assert report.bank_conflicts == 0
    want = meant(q, state, positions, slots, window, 0.125)
    np.testing.assert_allclose(y, want, rtol=2.0**-6, atol=2.0**-6)  # weights times scales are rounded to bf16


@settings(max_examples=2, deadline=None)
@given(
    st.sampled_from([(0, 95), (63, 64), (15, 16), (40, 80)]), st.sampled_from([1, 2, 3]), st.sampled_from(CACHES),
    st.sampled_from([0, 20]), st.sampled_from([1, 5]),
)  # fmt: skip
@example((0, 95), 2, CACHES[5], 0, 1)
@example((63, 64), 1, CACHES[6], 20, 5)
def test_single_tokens(at: tuple[int, int], splits: int, type: KVCacheType, window: int, group: int) -> None:
    positions, slots = np.array([*at, at[1]], np.int32), np.array([0, 1, 1], np.int32)
    state, kv, planes, heads, q = prepare(type, 3, group, [at[0] + 1, at[1] + 1])
    shape = AttentionShape(heads, kv.heads, kv.width, window)
    split = split_kernel(shape, 0.125, "split", planes=kv)
    join = join_kernel(shape, "join", rotate=kv.rotate)
    parts = np.full((3, heads, splits, kv.width), np.nan, np.float32)
    sums = np.full((3, heads, splits, 2), np.nan, np.float32)
    y = np.full(q.shape, np.nan, np.float32)
    first = [q, *planes, positions, slots, parts, sums, CTX, splits]
    report = interpret_grid(split.func, first, blocks=3 * kv.heads * splits, threads=split.threads)
    assert report.bank_conflicts == 0
    interpret_grid(join.func, [parts, sums, y, splits], blocks=3 * heads, threads=join.threads)
    want = meant(q, state, positions, slots, window, 0.125)
    np.testing.assert_allclose(y, want, rtol=2.0**-6, atol=2.0**-6)
