"""moe.*: the references against brute force: every token through every expert it chose, no grouping."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.ops.moe import CombineOp, DispatchOp, GroupedGemmOp, RouteOp
from tests.samples.base import normal

TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}  # sums of at most 12 products, rounded to f32 between two steps


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(ids [tokens, top_k] without repetition in a row, number of experts)."""
    experts = draw(st.integers(1, 7))
    top_k, tokens = draw(st.integers(1, experts)), draw(st.integers(1, 6))
    rows = [draw(st.permutations(range(experts)))[:top_k] for _ in range(tokens)]
    return np.array(rows, np.int32), experts


@given(
    st.lists(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 3.0]), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(1, 5),
    st.booleans(),
)
def test_route_is_a_sort_by_logit_then_id(rows: list[list[float]], top_k: int, normalize: bool) -> None:
    logits = np.array(rows, np.float32)
    ids, weights = RouteOp.reference(logits, top_k=top_k, normalize=normalize)
    for row, chosen, share in zip(rows, ids, weights, strict=True):
        assert chosen.tolist() == sorted(range(5), key=lambda e: (-row[e], e))[:top_k]
        total = sum(np.exp(row[e]) for e in (chosen if normalize else range(5)))
        np.testing.assert_allclose(share, [np.exp(row[e]) / total for e in chosen], rtol=1e-6)


@given(routings())
def test_dispatch_is_a_stable_sort_by_expert(routing: tuple[np.ndarray, int]) -> None:
    ids, experts = routing
    order, offsets = DispatchOp.reference(ids, num_experts=experts)
    flat = ids.reshape(-1).tolist()
    assert order.tolist() == sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))
    assert offsets[0] == 0 and offsets[-1] == len(flat)
    for e in range(experts):
        assert [flat[p] for p in order[offsets[e] : offsets[e + 1]]] == [e] * flat.count(e)


@given(routings())
def test_grouped_gemm_is_a_product_per_expert(routing: tuple[np.ndarray, int]) -> None:
    ids, experts = routing
    tokens, top_k = ids.shape
    x, w = normal(tokens, 6), normal(experts, 3, 6)
    order, offsets = DispatchOp.reference(ids, num_experts=experts)
    y = GroupedGemmOp.reference(x, w, order, offsets, gather=top_k)
    token_of = np.arange(tokens).repeat(top_k)[order]
    expert_of = ids.reshape(-1)[order]
    for e in range(experts):
        np.testing.assert_allclose(y[expert_of == e], x[token_of[expert_of == e]] @ w[e].T, **TOLERANCE)
    grouped = GroupedGemmOp.reference(x[token_of], w, order, offsets, gather=0)
    np.testing.assert_array_equal(grouped, y)


@given(routings())
def test_the_whole_layer_is_the_sum_over_chosen_experts(routing: tuple[np.ndarray, int]) -> None:
    ids, experts = routing
    tokens, top_k = ids.shape
    x, up, down = normal(tokens, 4), normal(experts, 3, 4), normal(experts, 4, 3, seed="down")
    weights = np.abs(normal(tokens, top_k, seed="weights"))
    order, offsets = DispatchOp.reference(ids, num_experts=experts)
    hidden = GroupedGemmOp.reference(x, up, order, offsets, gather=top_k)
    z = CombineOp.reference(GroupedGemmOp.reference(hidden, down, order, offsets, gather=0), weights, order)
    for t in range(tokens):
        wanted = sum(weights[t, s] * (down[e] @ (up[e] @ x[t])) for s, e in enumerate(ids[t].tolist()))
        np.testing.assert_allclose(z[t], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("expert", [0, 2])
def test_all_tokens_on_one_expert_leave_the_others_empty(expert: int) -> None:
    order, offsets = DispatchOp.reference(np.full((4, 1), expert, np.int32), num_experts=3)
    assert order.tolist() == [0, 1, 2, 3]
    assert np.diff(offsets).tolist() == [4 if e == expert else 0 for e in range(3)]
