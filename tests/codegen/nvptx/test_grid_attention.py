"""Attention for GPUs: what attn.attention means, over pieces of prompts, splits, windows and shared kv heads."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import join_kernel, split_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from ir.diagnostics import DiagnosticError
from ir.formats import F16, F32
from ir.grid_interpreter import interpret_grid
from ir.ops.attention import visible
from tests.samples.base import normal

CTX, SLOTS = 96, 2


def meant(
    q: np.ndarray, keys: np.ndarray, values: np.ndarray, positions: np.ndarray, slots: np.ndarray,
    shape: AttentionShape, scale: float,
) -> np.ndarray:  # fmt: skip
    """f64 softmax attention, row by row, as attn.attention says it."""
    y = np.zeros((*q.shape[:2], shape.width))
    for t, h in np.ndindex(q.shape[:2]):
        own = slots[t], h // shape.group
        scores = keys[own].astype(np.float64) @ q[t, h].astype(np.float64) * scale
        scores[~visible(int(positions[t]), shape.window, len(scores))] = -np.inf
        weights = np.exp(scores - scores.max())
        y[t, h] = (weights / weights.sum() @ np.nan_to_num(values[own].astype(np.float64)))[: shape.width]
    return y


def cache(shape: AttentionShape, lengths: list[int], seed: str) -> np.ndarray:
    """[slots, kv heads, ctx, stored d]; NaN where nothing has been appended."""
    made = normal(SLOTS, shape.kv_heads, CTX, shape.stored, seed=seed, element=shape.element)
    made[..., shape.width :] = 0
    for slot, length in enumerate(lengths):
        made[slot, :, length:] = np.nan
    return made


def queries(tokens: int, shape: AttentionShape) -> np.ndarray:
    made = normal(tokens, shape.heads, shape.stored, seed="q", element=shape.element)
    made[..., shape.width :] = 0
    return made


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([(0, 1), (0, 23), (17, 32), (63, 9), (64, 30)]), st.sampled_from([(0, 32), (5, 14)]),
    st.sampled_from([AttentionShape(2, 1, 64), AttentionShape(2, 2, 64, window=20), AttentionShape(1, 1, 128),
                     AttentionShape(2, 1, 8), AttentionShape(1, 1, 80, element=F16), AttentionShape(1, 1, 256),
                     AttentionShape(2, 1, 136)]),
)  # fmt: skip
def test_prompts(one: tuple[int, int], other: tuple[int, int], shape: AttentionShape) -> None:
    """Two pieces of two slots, each from a position on for so many tokens."""
    tokens = one[1] + other[1]
    pieces = np.array([[0, one[1], 1, one[0]], [one[1], other[1], 0, other[0]]], np.int32)
    positions = np.concatenate([start + np.arange(count) for start, count in (one, other)])
    slots = np.repeat([1, 0], [one[1], other[1]])
    lengths = [sum(other), sum(one)]
    q = queries(tokens, shape)
    keys, values = (cache(shape, lengths, seed) for seed in ("keys", "values"))
    made = prefill_kernel(shape, 0.125, "prefill", warps=2, tile=32)
    y = np.full((tokens, shape.heads, shape.width), np.nan, np.float32)
    blocks = len(pieces) * shape.heads
    report = interpret_grid(made.func, [q, keys, values, pieces, y, CTX], blocks=blocks, threads=made.threads)
    assert report.bank_conflicts == 0
    # Weights of values are rounded to bf16.
    want = meant(q, np.nan_to_num(keys.astype(np.float32)), values, positions, slots, shape, 0.125)
    np.testing.assert_allclose(y, want, rtol=2.0**-7, atol=2.0**-7)


@settings(max_examples=5, deadline=None)
@given(
    st.sampled_from([(0, 95), (63, 64), (15, 16), (40, 80)]), st.sampled_from([1, 2, 3]),
    st.sampled_from([AttentionShape(2, 1, 64), AttentionShape(3, 3, 64, window=20), AttentionShape(16, 1, 128),
                     AttentionShape(2, 2, 24), AttentionShape(2, 1, 32, element=F16), AttentionShape(1, 1, 96),
                     AttentionShape(5, 1, 256), AttentionShape(2, 1, 184, window=40)]),
)  # fmt: skip
def test_single_tokens(at: tuple[int, int], splits: int, shape: AttentionShape) -> None:
    """Three tokens: two slots, one of them twice. Splits may be empty."""
    positions, slots = np.array([*at, at[1]], np.int32), np.array([0, 1, 1], np.int32)
    q = queries(3, shape)
    keys, values = (cache(shape, [at[0] + 1, at[1] + 1], seed) for seed in ("keys", "values"))
    split, join = split_kernel(shape, 0.125, "split"), join_kernel(shape, "join")
    parts = np.full((3, shape.heads, splits, shape.width), np.nan, np.float32)
    sums = np.full((3, shape.heads, splits, 2), np.nan, np.float32)
    y = np.full((3, shape.heads, shape.width), np.nan, np.float32)
    first = [q, keys, values, positions, slots, parts, sums, CTX, splits]
    report = interpret_grid(split.func, first, blocks=3 * shape.kv_heads * splits, threads=split.threads)
    assert report.bank_conflicts == 0
    interpret_grid(join.func, [parts, sums, y, splits], blocks=3 * shape.heads, threads=join.threads)
    want = meant(q, np.nan_to_num(keys.astype(np.float32)), values, positions, slots, shape, 0.125)
    np.testing.assert_allclose(y, want, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize("width", [136, 256])
def test_wide_heads(width: int) -> None:
    """Every column meets its own: queries in shared memory, sums stored in two passes; tiles of 136 columns are no
    whole number of copies for each thread."""
    shape, at = AttentionShape(3, 1, width), (40, 70)
    positions, slots, q = np.array(at, np.int32), np.array([0, 1], np.int32), queries(2, shape)
    keys, values = (cache(shape, [at[0] + 1, at[1] + 1], seed) for seed in ("keys", "values"))
    want = meant(q, np.nan_to_num(keys.astype(np.float32)), values, positions, slots, shape, 0.0625)
    split = split_kernel(shape, 0.0625, "split")
    parts, sums = np.full((2, 3, 1, width), np.nan, np.float32), np.full((2, 3, 1, 2), np.nan, np.float32)
    given = [q, keys, values, positions, slots, parts, sums, CTX, 1]
    assert interpret_grid(split.func, given, blocks=2, threads=split.threads).bank_conflicts == 0
    np.testing.assert_allclose(parts[:, :, 0] / sums[:, :, 0, 1:], want, rtol=2.0**-7, atol=2.0**-7)
    one, many = AttentionShape(1, 1, width), np.arange(51, 71)  # rows of two warps
    q, y = queries(20, one), np.full((20, 1, width), np.nan, np.float32)
    want = meant(q, np.nan_to_num(keys.astype(np.float32)), values, many, np.ones(20, int), one, 0.0625)
    prefill = prefill_kernel(one, 0.0625, "prefill")
    given = [q, keys, values, np.array([[0, 20, 1, 51]], np.int32), y, CTX]
    assert interpret_grid(prefill.func, given, blocks=1, threads=prefill.threads).bank_conflicts == 0
    np.testing.assert_allclose(y, want, rtol=2.0**-7, atol=2.0**-7)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (AttentionShape(4, 2, 20), "heads of 20 have no attention on GPUs; expected a multiple of 8 up to 256"),
        (AttentionShape(4, 2, 264), "heads of 264 have no attention on GPUs; expected a multiple of 8 up to 256"),
        (AttentionShape(4, 2, 64, element=F32), "a cache of f32 has no attention on GPUs; expected bf16, f16"),
        (AttentionShape(5, 2, 64), "5 query heads do not share 2 kv heads evenly"),
    ],
)
def test_shapes_without_a_kernel(shape: AttentionShape, message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        prefill_kernel(shape, 1.0, "prefill")
    with pytest.raises(DiagnosticError, match="32 query heads share a kv head"):
        split_kernel(AttentionShape(32, 1, 64), 1.0, "split")
