"""Replay of routing traces: the published curve, the LRU cliff, Belady's bound, and that the runtime decides alike."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_targets.expert_cache import ON_LINE, POLICIES, StandIns, replay
from hw_targets.routing import RoutingTrace
from ir.diagnostics import DiagnosticError
from runtime.expert_cache import ExpertCache
from runtime.stand_ins import largest_shares
from tests.hw_targets.routing_samples import MIB, published_curve, qwen_trace, small_trace, start_of

# The published names of caches with an equal share for each layer.
PARTITIONED = {"layer": "lru", "layerlfu": "lfu"}


@pytest.mark.parametrize("budget", sorted({row[0] for row in published_curve()}))
def test_the_published_curve(budget: int) -> None:
    """Every policy and size to 0.001 points of hit rate and 0.1 MiB of bytes read."""
    rows = [row for row in published_curve() if row[0] == budget]
    assert len(rows) == 6
    for _, name, hits, decode_hits, read in rows:
        scope = "layer" if name in PARTITIONED else "global"
        result = replay(qwen_trace(), budget * MIB, policy=PARTITIONED.get(name, name), scope=scope)
        assert 100 * result.hit_rate == pytest.approx(hits, abs=6e-4), name
        assert 100 * result.decode_hit_rate == pytest.approx(decode_hits, abs=6e-4), name
        assert result.read_bytes / MIB == pytest.approx(read, abs=0.06), name


def test_lru_below_one_token_cycle_never_hits() -> None:
    trace = qwen_trace()
    cycle = trace.cycle_bytes
    assert replay(trace, cycle * 9 // 10).hits == 0
    at, above = replay(trace, cycle).decode_hit_rate, replay(trace, cycle * 11 // 10).decode_hit_rate
    assert at == pytest.approx(0.3766, abs=5e-4)
    assert above == pytest.approx(at, abs=2e-3)  # flat: the next token's experts are still whole passes away
    assert replay(trace, cycle * 9 // 10, policy="least_stale").decode_hit_rate > 0.3


def test_shares_of_layers_hold_a_whole_batch_or_more_than_their_budget() -> None:
    """The published hit rate of 38.3 % at 250 MiB is that of one batch for each layer, which is 784.7 MiB."""
    small = replay(qwen_trace(), 250 * MIB, scope="layer")
    assert small.decode_hit_rate == pytest.approx(0.38344, abs=1e-5)
    assert small.peak_bytes > qwen_trace().cycle_bytes
    assert replay(qwen_trace(), 4000 * MIB).peak_bytes <= 4000 * MIB


def test_belady_bounds_every_policy() -> None:
    trace = start_of(qwen_trace(), 64)
    for slots in (300, 1500):
        best = replay(trace, slots=slots, policy="belady").hits
        assert all(replay(trace, slots=slots, policy=policy).hits <= best for policy in POLICIES)


def test_a_cache_for_everything_misses_each_expert_once() -> None:
    trace = qwen_trace()
    distinct = len({(b.layer, e) for b in trace.requests for e in b.experts})
    for policy, scope in itertools.product(POLICIES, ("global", "layer")):
        result = replay(trace, trace.all_expert_bytes, policy=policy, scope=scope)
        assert result.lookups - result.hits == distinct
    assert replay(trace, 0).hits == 0


def test_pinned_experts_always_hit() -> None:
    trace = qwen_trace()
    everything = [(layer, expert) for layer in range(48) for expert in range(128)]
    result = replay(trace, trace.all_expert_bytes, pinned=everything)
    assert (result.hit_rate, result.read_bytes, result.preload_bytes) == (1.0, 0, trace.all_expert_bytes)
    some = [(layer, expert) for layer in range(48) for expert in range(0, 128, 16)]
    result = replay(trace, 2000 * MIB, pinned=some, policy="belady")
    assert result.preload_bytes == 8 * sum(trace.expert_bytes)
    assert 0.4 < result.decode_hit_rate < replay(trace, 2000 * MIB, policy="belady").decode_hit_rate


def test_what_a_warm_cache_does_is_counted_alone() -> None:
    whole, half = replay(qwen_trace(), 3000 * MIB), replay(qwen_trace(), 3000 * MIB, first_step=65)
    assert half.decode_tokens == 64 and half.decode_lookups == whole.decode_lookups // 2
    assert 0.65 < half.decode_hit_rate != whole.decode_hit_rate
    assert sum(half.layer_hits) == half.hits
    assert half.misses.shape == (64, 48) and whole.misses.shape == (129, 48)
    assert (half.misses == whole.misses[65:]).all()
    assert whole.misses[1:].sum() == whole.decode_lookups - whole.decode_hits


def test_mistakes_are_refused() -> None:
    trace = small_trace([[[1, 2]]])
    for options, message in (
        ({"policy": "fifo"}, "no cache policy 'fifo'"),
        ({"scope": "group"}, "no cache scope 'group'"),
        ({"pinned": [(0, 99)]}, "does not exist"),
        ({"pinned": [(0, 1), (0, 2), (0, 3)]}, "the pinned experts take 3 bytes"),
    ):
        with pytest.raises(DiagnosticError, match=message):
            replay(trace, 2, **options)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="either capacity_bytes or slots"):
        replay(trace)


def _assert_runtime_agrees(trace: RoutingTrace, capacity: int, policy: str, scope: str, pinned: list) -> None:
    """The runtime's cache, asked batch by batch, has the same misses as the replay and the same bytes at its peak."""
    predicted = replay(trace, capacity, policy=policy, scope=scope, pinned=pinned)
    cache = ExpertCache(trace.expert_bytes, capacity, policy=policy, scope=scope, pinned=pinned)
    starts = np.flatnonzero(np.r_[True, np.diff(trace.batch) != 0])
    for start, end in itertools.pairwise([*starts.tolist(), trace.tokens]):
        for layer in range(trace.layer_count):
            chosen = trace.experts[start:end, layer]
            routed = chosen >= 0
            if not routed.any():
                continue
            ids, weights = chosen[routed].tolist(), trace.weights[start:end, layer][routed].tolist()
            _, misses = cache.lookup(layer, ids, weights)
            cache.admit(layer, misses)
    counters = cache.counters
    assert tuple(counters.layer_lookups) == predicted.layer_lookups
    assert tuple(counters.layer_hits) == predicted.layer_hits
    assert counters.admitted_bytes == predicted.read_bytes
    assert counters.peak_bytes == max(predicted.peak_bytes, predicted.preload_bytes)


@pytest.mark.parametrize("policy", ON_LINE)
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_runtime_decides_alike_on_the_recorded_trace(policy: str, scope: str) -> None:
    pinned = [(layer, 7) for layer in range(48)] if scope == "global" else []
    _assert_runtime_agrees(start_of(qwen_trace(), 64), 1500 * MIB, policy, scope, pinned)


def _assert_stand_ins_agree(trace: RoutingTrace, capacity: int, policy: str, scope: str, rule: StandIns) -> None:
    """As above, with missing experts of little weight replaced."""
    predicted = replay(trace, capacity, policy=policy, scope=scope, stand_ins=rule)
    cache = ExpertCache(trace.expert_bytes, capacity, policy=policy, scope=scope, stand_in_bytes=rule.expert_bytes)
    starts = np.flatnonzero(np.r_[True, np.diff(trace.batch) != 0])
    read = np.zeros((2, len(starts), trace.layer_count), int)
    for step, (start, end) in enumerate(itertools.pairwise([*starts.tolist(), trace.tokens])):
        for layer in range(trace.layer_count):
            routed = (trace.experts[start:end, layer] >= 0).all(axis=1)
            if not routed.any():
                continue
            ids = trace.experts[start:end, layer][routed].ravel().tolist()
            weights = trace.weights[start:end, layer][routed]
            light = frozenset(e for e, share in largest_shares(ids, weights).items() if share < rule.share)
            used = cache.with_stand_ins(layer, ids, light)
            _, misses = cache.lookup(layer, used, weights.ravel().tolist())
            cache.admit(layer, misses)
            read[:, step, layer] = sum(e >= 0 for e in misses), sum(e < 0 for e in misses)
    counters = cache.counters
    assert (read[0] == predicted.misses).all() and (read[1] == predicted.stand_in_misses).all()
    assert counters.stand_ins == predicted.stand_ins
    assert counters.stand_ins - counters.stand_in_hits == predicted.stand_in_misses.sum()
    assert (counters.lookups, counters.hits) == (predicted.lookups, predicted.hits)
    assert counters.admitted_bytes == predicted.read_bytes


@st.composite
def _traces(draw: st.DrawFn) -> RoutingTrace:
    layers, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    token = st.lists(st.permutations(range(6)).map(lambda p: p[:top_k]), min_size=layers, max_size=layers)
    choices = draw(st.lists(token, min_size=1, max_size=16))
    sizes = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    return small_trace(choices, expert_bytes=tuple(sizes), prompt=draw(st.integers(0, min(6, len(choices)))), experts=6)


@settings(max_examples=60)
@given(_traces(), st.integers(0, 40), st.sampled_from(ON_LINE), st.sampled_from(["global", "layer"]))
def test_the_runtime_decides_alike(trace: RoutingTrace, capacity: int, policy: str, scope: str) -> None:
    _assert_runtime_agrees(trace, capacity, policy, scope, [])


@settings(max_examples=60)
@given(_traces(), st.integers(0, 40), st.sampled_from(ON_LINE), st.sampled_from(["global", "layer"]),
       st.sampled_from([0.1, 0.4, 0.6, 1.0]), st.integers(0, 2**32 - 1))  # fmt: skip
def test_the_runtime_replaces_alike(
    trace: RoutingTrace, capacity: int, policy: str, scope: str, share: float, seed: int
) -> None:
    weights = np.random.default_rng(seed).uniform(0.01, 1, trace.experts.shape).astype(np.float32)
    trace = dataclasses.replace(trace, weights=weights)
    _assert_stand_ins_agree(trace, capacity, policy, scope, StandIns(share, (1,) * trace.layer_count))


def test_stand_ins_save_reads() -> None:
    """On the recorded trace: no stand-ins below no weight, fewer bytes with more of them, and never two answers."""
    trace = start_of(qwen_trace(), 64)
    plain = replay(trace, 1500 * MIB, policy="lrfu")
    low = tuple(nbytes // 2 for nbytes in trace.expert_bytes)
    found = [replay(trace, 1500 * MIB, policy="lrfu", stand_ins=StandIns(share, low)) for share in (0.0, 0.1, 0.2)]
    assert found[0] == plain and found[0].stand_ins == 0
    assert found[2].decode_read_bytes < found[1].decode_read_bytes < plain.decode_read_bytes
    assert all(f.lookups == plain.lookups and f.stand_ins >= f.stand_in_misses.sum() for f in found)
    with pytest.raises(DiagnosticError, match="a policy that can run"):
        replay(trace, 1500 * MIB, policy="belady", stand_ins=StandIns(0.1, low))
    _assert_stand_ins_agree(trace, 1500 * MIB, "lrfu", "global", StandIns(0.2, low))


@settings(max_examples=40)
@given(_traces(), st.integers(0, 20), st.sampled_from(ON_LINE))
def test_belady_bounds_any_trace_of_equal_entries(trace: RoutingTrace, slots: int, policy: str) -> None:
    """Of batches of one expert each; larger batches must stay whole, which Belady's rule does not know."""
    single = small_trace(trace.experts[:, :, :1], experts=6)
    assert replay(single, slots=slots, policy=policy).hits <= replay(single, slots=slots, policy="belady").hits


@settings(max_examples=40)
@given(_traces(), st.integers(0, 20))
def test_more_slots_never_hurt_lru_of_single_experts(trace: RoutingTrace, slots: int) -> None:
    single = small_trace(trace.experts[:, :, :1], experts=6)
    assert replay(single, slots=slots).hits <= replay(single, slots=slots + 1).hits
