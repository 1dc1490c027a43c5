"""The expert cache of the runtime: what is a hit, what must go, and that entries in use never go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.errors import RuntimeDiagnostic
from runtime.eviction import POLICIES
from runtime.expert_cache import ExpertCache


def _use(cache: ExpertCache, layer: int, experts: list[int], weights: list[float] | None = None) -> tuple[int, list]:
    """One batch: (hits, entries given up)."""
    hits, misses = cache.lookup(layer, experts, weights)
    return len(hits), cache.admit(layer, misses)


def test_hits_and_misses_are_distinct_and_in_order() -> None:
    cache = ExpertCache([1], 10)
    assert cache.lookup(0, [5, 3, 5, 7]) == ([], [5, 3, 7])
    assert cache.admit(0, [5, 3, 7]) == []
    assert cache.lookup(0, [7, 1, 5]) == ([7, 5], [1])
    assert (cache.counters.lookups, cache.counters.hits) == (6, 2)


def test_lru_counts_the_newest_token_as_last() -> None:
    cache = ExpertCache([1], 3)
    _use(cache, 0, [1, 2, 3, 1])  # expert 1 was chosen again by the newest token
    assert _use(cache, 0, [4]) == (0, [(0, 2)])
    assert _use(cache, 0, [5]) == (0, [(0, 3)])


def test_lfu_remembers_uses_of_entries_that_were_away() -> None:
    cache = ExpertCache([1], 2, policy="lfu")
    for expert in (1, 1, 2, 2, 2, 3, 3):  # 1 gives way to 3, both then used twice
        _use(cache, 0, [expert])
    assert cache.resident() == [(0, 2), (0, 3)]
    assert _use(cache, 0, [1]) == (0, [(0, 3)])  # the third use of 1
    assert _use(cache, 0, [4]) == (0, [(0, 2)])  # three uses as well, and longer ago


def test_lrfu_forgets_uses_of_long_ago() -> None:
    for policy, gone in (("lfu", 2), ("lrfu", 1)):
        cache = ExpertCache([1], 3, policy=policy)
        for expert in [1] * 10 + [3] * 40 + [2] * 4:
            _use(cache, 0, [expert])
        assert _use(cache, 0, [4]) == (0, [(0, gone)])


def test_score_keeps_what_had_much_weight() -> None:
    cache = ExpertCache([1], 2, policy="score")
    _use(cache, 0, [1, 2], [0.9, 0.1])
    assert _use(cache, 0, [3], [1.0]) == (0, [(0, 2)])


def test_score_fades_with_each_pass() -> None:
    cache = ExpertCache([1], 2, policy="score")
    _use(cache, 0, [1], [1.0])
    for _ in range(3):
        _use(cache, 0, [2], [1.0])
    assert _use(cache, 0, [3], [1.0]) == (0, [(0, 1)])


def test_least_stale_gives_up_layers_that_have_been_visited() -> None:
    cache = ExpertCache([1, 1, 1], 6, policy="least_stale")
    for layer in range(3):
        _use(cache, layer, [0, 1])
    assert _use(cache, 0, [2, 0]) == (1, [(0, 1)])  # not used in this pass, and its layer's turn is over
    assert _use(cache, 1, [3, 4]) == (0, [(1, 0), (1, 1)])
    assert _use(cache, 2, [0, 1]) == (2, [])


def test_a_scan_longer_than_the_cache_defeats_lru_and_not_least_stale() -> None:
    for policy, hits in (("lru", 0), ("least_stale", 9 * 3)):
        cache = ExpertCache([1] * 4, 4, policy=policy)
        total = sum(_use(cache, layer, [0, 1])[0] for _ in range(10) for layer in range(4))
        assert (total > 0) == (hits > 0)
        assert cache.used_bytes <= 4


def test_an_own_share_for_each_layer() -> None:
    cache = ExpertCache([2, 3], 13, scope="layer")  # six bytes each: three entries, and two
    for layer, expect in ((0, []), (1, [])):
        assert _use(cache, layer, [0, 1])[1] == expect
    assert _use(cache, 1, [2]) == (0, [(1, 0)])
    assert _use(cache, 0, [2]) == (0, [])
    assert cache.used_bytes == 12


def test_a_batch_larger_than_the_budget_stays_whole_until_it_is_worked_off() -> None:
    cache = ExpertCache([1], 2)
    _use(cache, 0, [8, 9])
    _, misses = cache.lookup(0, [0, 1, 2, 3])
    assert cache.admit(0, misses[:2]) == [(0, 8), (0, 9)]
    assert cache.admit(0, misses[2:3]) == []  # both others are in use
    assert cache.used_bytes == 3
    assert cache.finish(0, [0, 1]) == [(0, 0)]
    assert cache.admit(0, misses[3:]) == [(0, 1)]
    assert cache.used_bytes == 2


def test_pinned_entries_hit_from_the_start_and_stay() -> None:
    cache = ExpertCache([1, 1], 3, pinned=[(0, 7), (1, 7)])
    assert cache.used_bytes == 2
    for expert in range(5):
        assert _use(cache, 0, [7, expert])[0] == 1
    assert cache.is_resident(1, 7)
    assert cache.resident() == [(0, 7), (1, 7), (0, 4)]


def test_more_pinned_than_fits_is_refused() -> None:
    with pytest.raises(RuntimeDiagnostic, match="pinned experts exceed the budget"):
        ExpertCache([4], 7, pinned=[(0, 0), (0, 1)])


@pytest.mark.parametrize("options", [{"policy": "fifo"}, {"scope": "group"}])
def test_unknown_names_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(RuntimeDiagnostic, match=r"fifo|group"):
        ExpertCache([1], 1, **options)


def test_a_failed_read_is_forgotten() -> None:
    cache = ExpertCache([5], 10)
    _use(cache, 0, [1, 2])
    cache.discard(0, 1)
    assert cache.used_bytes == 5
    assert cache.lookup(0, [1, 2]) == ([2], [1])


def test_reading_ahead_admits_an_expert_before_its_lookup() -> None:
    for policy in POLICIES:
        cache = ExpertCache([1, 1], 4, policy=policy)
        _use(cache, 0, [0])
        assert cache.admit(1, [3]) == []
        assert cache.lookup(1, [3, 4]) == ([3], [4])
        assert (cache.counters.lookups, cache.counters.hits) == (3, 0)  # it was read, if early


def test_what_was_read_ahead_stays_until_it_is_used_or_its_pass_is_over() -> None:
    for policy in POLICIES:
        cache = ExpertCache([1, 1, 1], 4, policy=policy)
        _use(cache, 2, [0, 1])
        _use(cache, 0, [5])
        assert len(cache.admit(1, [3, 4])) == 1
        assert cache.is_resident(1, 3) and cache.is_resident(1, 4)
        assert _use(cache, 1, [4, 6])[0] == 1  # 3 was read in vain
        cache.admit(2, [7])
        _use(cache, 0, [1, 2, 3, 4])  # the pass ended without layer 2
        assert cache.used_bytes == 4 and not cache.is_resident(2, 7)


@st.composite
def _passes(draw: st.DrawFn) -> tuple[list[int], list[list[list[int]]]]:
    layers = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 3), min_size=layers, max_size=layers))
    ids = st.lists(st.integers(0, 6), min_size=1, max_size=5)
    return sizes, draw(st.lists(st.lists(ids, min_size=layers, max_size=layers), min_size=1, max_size=12))


@given(_passes(), st.integers(0, 30), st.sampled_from(POLICIES), st.sampled_from(["global", "layer"]))
def test_budget_and_entries_in_use(
    case: tuple[list[int], list[list[list[int]]]], capacity: int, policy: str, scope: str
) -> None:
    """What is said to be resident is resident; the budget holds but for the batch itself; a batch keeps its entries."""
    sizes, passes = case
    cache = ExpertCache(sizes, capacity, policy=policy, scope=scope)
    model: set[tuple[int, int]] = set()
    for one in passes:
        for layer, experts in enumerate(one):
            hits, misses = cache.lookup(layer, experts)
            assert sorted(hits + misses) == sorted(set(experts))
            assert set(hits) == {e for e in experts if (layer, e) in model}
            gone = cache.admit(layer, misses)
            assert not {(layer, e) for e in experts} & set(gone)
            assert len(set(gone)) == len(gone)
            model = (model | {(layer, e) for e in experts}) - set(gone)
            assert model == set(cache.resident())
            assert cache.used_bytes == sum(sizes[entry[0]] for entry in model)
            own = len(set(experts)) * sizes[layer]
            share = capacity if scope == "global" else capacity // len(sizes)
            assert cache.used_bytes <= max(capacity, own) or scope == "layer"
            mine = sum(sizes[entry[0]] for entry in model if scope == "global" or entry[0] == layer)
            assert mine <= max(share, own)


def test_room_ahead_is_what_neither_this_batch_nor_reads_ahead_take() -> None:
    cache = ExpertCache([10, 10, 20], 100, pinned=[(2, 7)])
    cache.admit(0, cache.lookup(0, [0, 1])[1])
    assert cache.room_ahead(1) == 100 - 20 - 20
    cache.admit(1, [3, 4])
    assert cache.room_ahead(1) == 100 - 20 - 20 - 20
    cache.admit(1, cache.lookup(1, [3])[1])
    assert cache.room_ahead(2) == 100 - 20 - 10  # in vain: it may go
