"""Hit rates in closed form, synthetic routers, the fit to the recorded trace, the choice of a policy, and warnings."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_targets.expert_cache import (
    ON_LINE,
    cache_warnings,
    choose_policy,
    expected_hit_rate,
    fit_router,
    hit_curve,
    knee,
    popular_entries,
    replay,
)
from hw_targets.expert_cache.analytic import (
    inclusion_chances,
    lru_hit_rate,
    static_hit_rate,
    uniform_hit_rate,
    zipf_popularity,
)
from hw_targets.routing import MIXED, Router, synthetic_trace
from hw_targets.routing.router_weights import session_router_weights, topic_orders
from tests.hw_targets.routing_samples import MIB, qwen_trace, small_trace

# (experts, Zipf exponent, slots, most popular ones pinned, LRU by Che, LRU simulated), published
TABLE = [
    (8, 0.5, 4, 0.6370, 0.5421, 0.5435),
    (64, 1.0, 16, 0.7126, 0.5923, 0.5929),
    (128, 0.6, 32, 0.5237, 0.3849, 0.3844),
    (128, 1.0, 32, 0.7470, 0.6411, 0.6405),
    (128, 1.0, 51, 0.8317, 0.7591, 0.7579),
    (128, 1.4, 32, 0.9044, 0.8564, 0.8572),
    (256, 1.2, 64, 0.8670, 0.8053, 0.8057),
]


@pytest.mark.parametrize("row", TABLE)
def test_the_published_table(row: tuple[int, float, int, float, float, float]) -> None:
    experts, exponent, slots, static, che, simulated = row
    popularity = zipf_popularity(experts, exponent)
    assert static_hit_rate(popularity, slots) == pytest.approx(static, abs=1e-4)
    assert lru_hit_rate(popularity, slots) == pytest.approx(che, abs=1e-4)
    assert lru_hit_rate(popularity, slots) == pytest.approx(simulated, abs=2e-3)


@pytest.mark.parametrize("row", TABLE[:2])
def test_che_agrees_with_a_plain_lru(row: tuple[int, float, int, float, float, float]) -> None:
    experts, exponent, slots, *_ = row
    popularity = zipf_popularity(experts, exponent)
    drawn = np.random.Generator(np.random.PCG64(1)).choice(experts, 200_000, p=popularity).tolist()
    cache: OrderedDict[int, None] = OrderedDict()
    hits = 0
    for expert in drawn:
        hits += expert in cache
        cache[expert] = None
        cache.move_to_end(expert)
        if len(cache) > slots:
            cache.popitem(last=False)
    assert hits / len(drawn) == pytest.approx(lru_hit_rate(popularity, slots), abs=4e-3)


@pytest.mark.parametrize(("experts", "slots"), [(64, 16), (128, 100)])
def test_uniform_choice_hits_by_share_of_room(experts: int, slots: int) -> None:
    popularity = zipf_popularity(experts, 0.0)
    share = uniform_hit_rate(experts, slots)
    assert share == slots / experts
    assert static_hit_rate(popularity, slots) == pytest.approx(share)
    assert lru_hit_rate(popularity, slots) == pytest.approx(share)
    trace = synthetic_trace(MIXED, experts=experts, top_k=2, layers=4, tokens=300)
    for policy in ON_LINE:
        assert replay(trace, slots=4 * slots, policy=policy, first_step=150).decode_hit_rate == pytest.approx(
            share, abs=0.04
        )


@given(st.integers(2, 64), st.floats(0, 3), st.data())
def test_chances_to_be_among_the_chosen(experts: int, exponent: float, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    chances = inclusion_chances(zipf_popularity(experts, exponent), top_k)
    assert chances.sum() == pytest.approx(top_k, rel=1e-6)
    assert (chances <= 1 + 1e-12).all() and (np.diff(chances) <= 1e-12).all()


def test_the_same_arguments_give_the_same_trace() -> None:
    options = {"experts": 16, "top_k": 3, "layers": 2, "tokens": 9, "prompt": 4}
    one, two = (synthetic_trace(Router(1.0, 0.3, 0.2, 2), seed=5, **options) for _ in range(2))
    assert (one.experts == two.experts).all() and (one.weights == two.weights).all()
    assert (one.experts != synthetic_trace(Router(1.0, 0.3, 0.2, 2), seed=6, **options).experts).any()
    assert one.batch.tolist() == [0] * 4 + list(range(1, 10))
    assert one.turn.tolist() == [0] * 4 + [0, 1] * 4 + [0]
    assert all(len(set(ids)) == 3 for ids in one.experts.reshape(-1, 3).tolist())
    assert one.weights.sum(axis=2) == pytest.approx(1.0)


def test_stickiness_keeps_experts_and_drift_changes_the_order() -> None:
    options = {"experts": 64, "top_k": 4, "layers": 4, "tokens": 400}

    def overlap(router: Router, lag: int) -> float:
        ids = synthetic_trace(router, **options).experts
        return float((ids[:-lag, :, :, None] == ids[lag:, :, None, :]).any(-1).mean())

    assert overlap(Router(0.0), 1) == pytest.approx(4 / 64, abs=0.01)
    assert overlap(Router(0.0, stickiness=0.5), 1) == pytest.approx(0.5 + 0.5 * 4 / 64, abs=0.05)
    assert overlap(Router(1.5), 300) == pytest.approx(overlap(Router(1.5), 1), abs=0.05)
    assert overlap(Router(1.5, drift=0.5), 300) < 0.5 * overlap(Router(1.5), 300)


def test_sessions_mixed_are_nearly_uniform() -> None:
    options = {"experts": 64, "top_k": 4, "layers": 4, "tokens": 640}
    rates = [
        replay(synthetic_trace(Router(1.4, sessions=n), **options), slots=4 * 16, first_step=320).decode_hit_rate
        for n in (1, 16)
    ]
    assert rates[0] > 0.7
    assert rates[1] < 0.35  # uniform choice would give 0.25


def test_batches_hold_tokens_of_different_sessions() -> None:
    trace = synthetic_trace(Router(sessions=4), experts=16, top_k=2, layers=1, tokens=8, batch=4)
    assert trace.batch.tolist() == [0] * 4 + [1] * 4
    assert trace.turn.tolist() == [0, 1, 2, 3] * 2


@pytest.mark.parametrize("exponent", [0.0, 1.4])
def test_weights_of_a_router_that_routes_as_in_a_session(exponent: float) -> None:
    """Inputs drawn at random, marked with a topic, are routed with the hit rates of the synthetic router."""
    random = np.random.Generator(np.random.PCG64(3))
    deviations = random.uniform(0.5, 1.5, 254)
    inputs = np.concatenate([np.zeros((150, 4, 2)), deviations * random.standard_normal((150, 4, 254))], axis=2)
    inputs[:, :, 1] = 8.0
    choices = np.empty((150, 4, 6), int)
    for layer in range(4):
        weights = session_router_weights(64, 6, [3.0, 8.0], deviations, exponent=exponent, seed=layer)
        assert weights.shape == (64, 256) and weights.dtype == np.float32
        choices[:, layer] = np.argsort(-(inputs[:, layer] @ weights.T), axis=1)[:, :6]
    installed = small_trace(choices, experts=64)
    drawn = synthetic_trace(Router(exponent), experts=64, top_k=6, layers=4, tokens=150)
    for slots in (4 * 12, 4 * 24):
        for policy in ("lru", "lfu"):
            rates = [replay(t, slots=slots, policy=policy).decode_hit_rate for t in (installed, drawn)]
            assert rates[0] == pytest.approx(rates[1], abs=0.025)


def test_neighbouring_topics_have_nearly_the_same_order() -> None:
    orders = topic_orders(64, 8, np.random.Generator(np.random.PCG64(0)))
    moved = [int((a != b).sum()) for a, b in pairwise(orders)]
    assert all(sorted(order.tolist()) == list(range(64)) for order in orders)
    assert all(1 <= count <= 4 for count in moved)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"top_k": 4}, "more experts"),
        ({"marks": [1.0, 0.0]}, "marks other than 0"),
        ({"marks": []}, "marks other than 0"),
        ({"deviations": []}, "and elements"),
        ({"deviations": [1.0, 0.0]}, "inputs that vary"),
    ],
)
def test_routers_that_cannot_be_made(wrong: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"top_k": 2, "marks": [1.0], "deviations": [1.0, 1.0]}
    with pytest.raises(ValueError, match=message):
        session_router_weights(4, **(good | wrong), exponent=1.0)


def test_the_router_that_meets_the_recorded_trace() -> None:
    fit = fit_router(qwen_trace(), stickiness=(0.0, 0.2))
    assert 1.3 <= fit.router.exponent <= 1.4
    assert fit.router.stickiness == 0.0
    assert fit.mean_error < 0.024
    assert fit.recorded[0] == pytest.approx(0.377, abs=1e-3)


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("exponent", [0.0, 1.4])
def test_the_closed_form_meets_the_replay(scope: str, exponent: float) -> None:
    model = {"experts": 64, "top_k": 6, "layers": 8}
    trace = synthetic_trace(Router(exponent), tokens=120, prompt=8, **model)
    for slots in (8 * 3, 8 * 6, 8 * 18, 8 * 30):
        if scope == "layer" and slots < 8 * 6:
            continue  # such a share holds each batch whole: more than its budget
        rate = expected_hit_rate(slots=slots, scope=scope, router=Router(exponent), tokens=120, before=8, **model)
        assert rate == pytest.approx(replay(trace, slots=slots, scope=scope).decode_hit_rate, abs=0.025)


@pytest.mark.parametrize("exponent", [0.0, 1.4])
@pytest.mark.parametrize("before", [0, 100])
def test_the_closed_form_of_fading_counts_meets_the_replay(exponent: float, before: int) -> None:
    model = {"experts": 64, "top_k": 6, "layers": 8}
    trace = synthetic_trace(Router(exponent), tokens=before + 64, **model)
    for slots in (8 * 8, 8 * 18, 8 * 40):
        rate = expected_hit_rate(slots=slots, policy="lrfu", router=Router(exponent), tokens=64, before=before, **model)
        replayed = replay(trace, slots=slots, policy="lrfu", first_step=before).decode_hit_rate
        assert rate == pytest.approx(replayed, abs=0.03)


def test_expected_hit_rates_of_every_policy() -> None:
    model = {"experts": 64, "top_k": 8, "layers": 16}
    for policy in ON_LINE:
        rates = [expected_hit_rate(slots=slots, policy=policy, **model) for slots in (130, 400, 700, 1024)]
        assert rates == sorted(rates) and rates[-1] == 1.0 and rates[0] > 0.4
    assert expected_hit_rate(slots=127, **model) == 0.0  # below one token cycle
    assert expected_hit_rate(slots=400, batch=8, **model) < 0.1 < expected_hit_rate(slots=400, **model)
    assert expected_hit_rate(slots=1024, tokens=64, **model) < 1.0  # each expert is read once


@settings(max_examples=30)
@given(st.integers(2, 64), st.floats(0, 2), st.integers(0, 500), st.sampled_from(["global", "layer"]))
def test_more_slots_never_lower_the_expected_rate(experts: int, exponent: float, slots: int, scope: str) -> None:
    options = {"experts": experts, "top_k": 2, "layers": 4, "scope": scope, "router": Router(exponent)}
    assert expected_hit_rate(slots=slots, **options) <= expected_hit_rate(slots=slots + 7, **options) + 1e-9


def test_a_policy_is_chosen_by_replay() -> None:
    choice = choose_policy(qwen_trace(), 1000 * MIB)
    assert (choice.best.policy, choice.best.scope) == ("lfu", "layer")
    assert choice.best.decode_hit_rate == max(result.decode_hit_rate for _, result in choice.candidates)
    assert choice.bound.decode_hit_rate > choice.best.decode_hit_rate + 0.15
    assert all(result.peak_bytes <= 1000 * MIB for _, result in choice.candidates)
    assert choice.warnings == ()
    assert choose_policy(qwen_trace(), 500 * MIB, scopes=("global",)).best.policy in (
        "lfu",
        "lrfu",
    )  # and not LRU, at 0 %


def test_popular_experts_fit_and_are_the_most_used() -> None:
    trace = small_trace([[[1], [4]], [[1], [5]], [[2], [5]], [[1], [6]]], expert_bytes=(3, 1))
    assert popular_entries(trace, 5) == ((1, 5), (0, 1), (1, 4))
    assert popular_entries(trace, 2, last_step=1) == ((1, 4),)


def test_the_knee_of_a_curve() -> None:
    trace = synthetic_trace(Router(2.5), experts=64, top_k=2, layers=4, tokens=150)
    curve = hit_curve(trace, range(8, 257, 8))
    assert 0.05 < knee(curve).capacity_bytes / 256 < 0.4
    assert knee(curve).decode_hit_rate > 0.8


# (capacity, policy, scope, codes): two layers with experts of 100 and 50 bytes, eight each, of which a token uses two
@pytest.mark.parametrize(
    ("capacity", "policy", "scope", "codes"),
    [
        (299, "lru", "global", ["lru-cliff"]),
        (300, "lru", "global", []),
        (299, "lfu", "global", []),
        (150, "least_stale", "global", ["cache-below-layer"]),
        (399, "lru", "layer", ["share-below-token"]),
        (400, "lru", "layer", []),
        (1200, "lru", "global", ["holds-everything"]),
        (0, "lru", "global", []),
    ],
)
def test_warnings(capacity: int, policy: str, scope: str, codes: list[str]) -> None:
    found = cache_warnings((100, 50), 8, 2, capacity, policy=policy, scope=scope)
    assert [warning.code for warning in found] == codes
    for warning in found:
        assert " B" in warning.text
        assert not {
            w.code for w in cache_warnings((100, 50), 8, 2, warning.needed_bytes, policy=policy, scope=scope)
        } & ({warning.code} - {"holds-everything"})
