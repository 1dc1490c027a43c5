"""Locality of routing: the recorded trace's figures, and segment metrics beside their definitions written out."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_targets.routing import MIXED, Router, locality, popularity, synthetic_trace
from tests.hw_targets.routing_samples import qwen_trace, small_trace


def test_the_recorded_trace() -> None:
    found = locality(qwen_trace())
    assert found.tokens == 128
    assert found.overlap[1] == pytest.approx(0.38, abs=0.005)
    assert 0.26 <= found.overlap[8] <= 0.285 and 0.26 <= found.overlap[16] <= 0.285
    assert found.chance_overlap == pytest.approx(0.047, abs=5e-4)
    assert found.reuse_within_8 == pytest.approx(0.73, abs=0.01)
    assert found.reuse_median == 2
    assert [layer.layer for layer in found.layers] == list(range(48))
    assert found.layers[0].overlap < 0.1 < found.layers[40].overlap  # the first layer follows the token, not the text


def test_popularity_counts_every_use() -> None:
    trace = qwen_trace()
    counts = popularity(trace)
    assert counts.shape == (48, 128)
    assert counts.sum() == (trace.experts >= 0).sum()


def test_constant_routing_is_entirely_local() -> None:
    found = locality(small_trace([[[3, 5]]] * 40), lengths=(4, 8), lags=(1, 3))
    assert found.overlap == {1: 1.0, 3: 1.0}
    assert found.srp == {4: 1.0, 8: 1.0}
    assert all(rate == 1.0 for rate in found.sch.values())
    assert (found.reuse_median, found.reuse_within_8, found.distinct_share) == (1.0, 1.0, 2 / 16)


def test_uniform_routing_is_not() -> None:
    options = {"experts": 64, "top_k": 4, "layers": 2, "tokens": 300}
    uniform, session = (locality(synthetic_trace(router, **options)) for router in (MIXED, Router(1.4)))
    assert uniform.overlap[4] == pytest.approx(uniform.chance_overlap, abs=0.02)
    assert session.srp[16] > 2 * uniform.srp[16]
    assert session.sch[16, 2.0] > 1.4 * uniform.sch[16, 2.0]


def test_windows_and_gaps_end_with_a_turn() -> None:
    trace = small_trace([[[1]], [[1]], [[2]], [[2]]])
    trace = type(trace)(**{**trace.__dict__, "turn": np.array([0, 0, 1, 1])})
    found = locality(trace, lags=(1, 2), lengths=(2, 3), multiples=(1.0,))
    assert found.overlap == {1: 1.0}  # no turn has tokens two apart
    assert found.srp == {2: 1.0} and found.sch == {(2, 1.0): 1.0}


def test_traces_too_short_for_anything() -> None:
    found = locality(small_trace([[[1, 2]]]))
    assert (found.overlap, found.srp, found.sch, found.reuse_within_8) == ({}, {}, {}, 0.0)
    assert found.layers[0].distinct == 2


@settings(max_examples=60)
@given(
    st.lists(st.lists(st.permutations(range(5)).map(lambda p: p[:2]), min_size=2, max_size=2), min_size=4, max_size=12),
    st.integers(2, 4),
)
def test_segment_metrics_as_defined(choices: list[list[list[int]]], length: int) -> None:
    trace = small_trace(choices, experts=5)
    found = locality(trace, lengths=(length,), multiples=(1.0, 1.5))
    windows = [
        [sum(expert in choices[t][layer] for t in range(start, start + length)) for expert in range(5)]
        for layer in range(2)
        for start in range(len(choices) - length + 1)
    ]
    counts = [count for window in windows for count in window]
    scores = []
    for threshold in range(1, length + 1):
        declared = [count for count in counts if count >= threshold]
        if declared:
            precision, recall = sum(declared) / (length * len(declared)), sum(declared) / sum(counts)
            scores.append(2 * precision * recall / (precision + recall))
    assert found.srp[length] == pytest.approx(max(scores))
    for multiple, slots in ((1.0, 2), (1.5, 3)):
        covered = sum(sum(sorted(window)[-slots:]) for window in windows)
        assert found.sch[length, multiple] == pytest.approx(covered / sum(counts))
