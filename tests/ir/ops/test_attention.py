"""attn.*, einsum.*, kv.*: the references against dense numpy attention and against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.attributes import Rope
from ir.core import Block, Region
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I32
from ir.interpreter import Environment
from ir.kv_state import KVState
from ir.ops.attention import AttentionOp, CombineOp, RopeOp, RopeTableOp, ScoresOp, SoftmaxOp
from ir.ops.cascades import build_deferred_division, build_online_softmax, build_softmax_cascade
from ir.ops.kv_cache import KVAppendOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from tests.samples.base import cache, ints, normal, t

# Two float32 evaluations of the same sums of at most 64 products of normal numbers.
TOLERANCE = {"rtol": 2e-5, "atol": 2e-6}
TOKENS = SymbolicDim("tokens")


@st.composite
def attention_cases(draw: st.DrawFn) -> tuple:
    """(q, state, positions, slots, window): GQA in every ratio, ragged slots, windows of any size."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 2)]))
    tokens, slots, ctx = draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 17))
    dim = draw(st.sampled_from([1, 2, 6]))
    positions = draw(st.lists(st.integers(0, ctx - 1), min_size=tokens, max_size=tokens))
    at = draw(st.lists(st.integers(0, slots - 1), min_size=tokens, max_size=tokens))
    window = draw(st.integers(0, ctx + 2))
    q = normal(tokens, kv_heads * group, dim, seed=str(draw(st.integers(0, 99))))
    return q, cache(slots, ctx, kv_heads, dim), ints(*positions), ints(*at), window


def dense_attention(q, state, positions, slots, window, scale) -> np.ndarray:
    """Attention with explicit [tokens, ctx] slices of the visible keys, no masks anywhere."""
    _, heads, _ = q.shape
    group = heads // state.keys.shape[2]
    out = np.zeros(q.shape)
    for t_, (slot, end) in enumerate(zip(slots, positions, strict=True)):
        begin = max(0, end - window + 1) if window else 0
        keys = np.repeat(state.keys[slot, begin : end + 1], group, axis=1).astype(np.float64)  # [seen, heads, d]
        values = np.repeat(state.values[slot, begin : end + 1], group, axis=1).astype(np.float64)
        weights = np.exp(np.einsum("hd,chd->hc", q[t_].astype(np.float64), keys) * scale)
        out[t_] = np.einsum("hc,chd->hd", weights / weights.sum(axis=1, keepdims=True), values)
    return out


def run_attention(region: Region, q, state, positions, slots, window, scale) -> np.ndarray:
    kv = KVCacheType(state.keys.shape[2], state.keys.shape[3], F32)
    rows = TensorType((TOKENS,), I32)
    block = Block((TensorType((TOKENS, *q.shape[1:]), F32), kv, rows, rows))
    op = AttentionOp(*block.arguments, scale=scale, window=window, regions=[region])
    (y,) = Environment({}, {}).run_op(op, (q, state, positions, slots))
    return y


@given(attention_cases())
def test_three_ops_are_dense_attention(case: tuple) -> None:
    q, state, positions, slots, window = case
    s = ScoresOp.reference(q, state, positions, slots, scale=0.3, window=window)
    y = CombineOp.reference(SoftmaxOp.reference(s), state, slots)
    np.testing.assert_allclose(y, dense_attention(*case, scale=0.3), **TOLERANCE)


@given(attention_cases(), st.sampled_from([1, 3, 4, 64]))
def test_every_cascade_is_dense_attention(case: tuple, block: int) -> None:
    width = case[0].shape[2]
    wanted = dense_attention(*case, scale=0.3)
    for region in (
        build_softmax_cascade(width),
        build_deferred_division(width),
        build_online_softmax(width, block=block),
    ):
        np.testing.assert_allclose(run_attention(region, *case, scale=0.3), wanted, **TOLERANCE)


def test_cascades_survive_scores_of_any_size() -> None:
    """Subtracting the maximum is what keeps exp from overflowing, in blocks as well."""
    state = cache(1, 9, 1, 4)
    big = KVState(state.keys * np.float32(1e4), state.values)
    case = (normal(1, 1, 4) * np.float32(1e3), big, ints(8), ints(0), 0)
    results = [
        run_attention(region, *case, scale=1.0)
        for region in (build_softmax_cascade(4), build_deferred_division(4), build_online_softmax(4, block=2))
    ]
    assert all(np.isfinite(y).all() for y in results)
    for y in results[1:]:
        np.testing.assert_allclose(y, results[0], **TOLERANCE)


@given(attention_cases())
def test_scores_are_masked_exactly_outside_of_the_window(case: tuple) -> None:
    q, state, positions, slots, window = case
    s = ScoresOp.reference(q, state, positions, slots, scale=1.0, window=window)
    for row, position in zip(s, positions.tolist(), strict=True):
        seen = [c for c in range(state.ctx) if c <= position and (not window or c > position - window)]
        assert [c for c in range(state.ctx) if np.isfinite(row[:, c]).all()] == seen
        assert np.isneginf(np.delete(row, seen, axis=1)).all()


def test_what_lies_behind_a_row_does_not_matter() -> None:
    state = cache(1, 8, 1, 4)
    changed = KVState(state.keys.copy(), state.values.copy())
    changed.keys[0, 4:] = 1e6
    changed.values[0, 4:] = 1e6
    q, positions, slots = normal(1, 2, 4), ints(3), ints(0)
    for region in (build_softmax_cascade, build_deferred_division, build_online_softmax):
        one, two = (run_attention(region(4), q, s, positions, slots, 0, 1.0) for s in (state, changed))
        np.testing.assert_array_equal(one, two)


# --- rope ---------------------------------------------------------------------------------------------------------


def rope_of(x: np.ndarray, positions: np.ndarray, rope: Rope) -> np.ndarray:
    return RopeOp.reference(x, *RopeTableOp.reference(positions, rope=rope))


def test_rope_at_position_zero_is_the_identity() -> None:
    x = normal(2, 3, 8)
    np.testing.assert_array_equal(rope_of(x, ints(0, 0), Rope(8)), x)


@given(st.integers(0, 5000), st.sampled_from([2, 8, 64]))
def test_rope_keeps_lengths(position: int, dim: int) -> None:
    x = normal(1, 2, dim)
    y = rope_of(x, ints(position), Rope(dim))
    np.testing.assert_allclose(np.linalg.norm(y, axis=-1), np.linalg.norm(x, axis=-1), rtol=1e-5)


@given(st.integers(0, 2000), st.integers(0, 2000), st.integers(0, 2000))
def test_rope_makes_scores_depend_on_distance(q_at: int, k_at: int, shift: int) -> None:
    q, k = normal(1, 1, 16), normal(1, 1, 16, seed="k")
    near, far = (
        float(np.vdot(rope_of(q, ints(q_at + s), Rope(16)), rope_of(k, ints(k_at + s), Rope(16)))) for s in (0, shift)
    )
    assert near == pytest.approx(far, abs=2e-3)  # cos and sin of angles up to 4000 are rounded to f32


def test_rope_is_rotate_half_of_hugging_face() -> None:
    x, angles = normal(3, 2, 8), normal(3, 4, seed="angle")
    cos, sin = np.cos(angles), np.sin(angles)
    doubled = [np.concatenate([table, table], axis=-1)[:, None, :] for table in (cos, sin)]
    rotated = np.concatenate([-x[..., 4:], x[..., :4]], axis=-1)
    np.testing.assert_allclose(
        RopeOp.reference(x, cos, sin), x * doubled[0] + rotated * doubled[1], rtol=1e-5, atol=1e-6
    )


def test_attention_factor_scales_the_table() -> None:
    plain = RopeTableOp.reference(ints(5), rope=Rope(4))
    scaled = RopeTableOp.reference(ints(5), rope=Rope(4, attention_factor=1.5))
    for one, other in zip(plain, scaled, strict=True):
        np.testing.assert_allclose(other, 1.5 * one, rtol=1e-6)


# --- kv cache -----------------------------------------------------------------------------------------------------


def test_append_writes_the_rows_and_nothing_else() -> None:
    old = cache(3, 5, 2, 4)
    k, v = normal(2, 2, 4, seed="k"), normal(2, 2, 4, seed="v")
    new = KVAppendOp.reference(old, k, v, ints(4, 0), ints(2, 0))
    np.testing.assert_array_equal(new.keys[2, 4], k[0])
    np.testing.assert_array_equal(new.values[0, 0], v[1])
    same = np.ones((3, 5), bool)
    same[2, 4] = same[0, 0] = False
    np.testing.assert_array_equal(new.keys[same], old.keys[same])
    np.testing.assert_array_equal(new.values[same], old.values[same])


def test_append_rounds_to_the_cache_element() -> None:
    k = normal(1, 1, 8, seed="k")
    new = KVAppendOp.reference(KVState.zeros(1, 2, 1, 8, BF16.dtype), k, k, ints(1), ints(0))
    assert new.dtype == BF16.dtype
    np.testing.assert_array_equal(new.keys[0, 1], k[0].astype(BF16.dtype))
    assert not np.array_equal(new.keys[0, 1].astype(np.float32), k[0])


@pytest.mark.parametrize(("position", "slot"), [(5, 0), (-1, 0), (0, 1), (0, -1)])
def test_append_outside_of_the_cache_is_refused(position: int, slot: int) -> None:
    block = Block((KVCacheType(1, 2, F32), t(1, 1, 2), t(1, 1, 2), t(1, element=I32), t(1, element=I32)))
    op = KVAppendOp(*block.arguments)
    k = normal(1, 1, 2)
    with pytest.raises(DiagnosticError, match=rf"slot {slot}, position {position}, but the cache has 1 slots of 5"):
        Environment({}, {}).run_op(op, (KVState.zeros(1, 5, 1, 2), k, k, ints(position), ints(slot)))


def test_a_state_of_unequal_halves_is_refused() -> None:
    with pytest.raises(ValueError, match="expected keys and values as equal arrays"):
        KVState(np.zeros((1, 2, 1, 4), np.float32), np.zeros((1, 3, 1, 4), np.float32))
