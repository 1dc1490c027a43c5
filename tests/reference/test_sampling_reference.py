"""Sampling against the logits processors of Hugging Face transformers, applied in the order of `generate`."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

torch = pytest.importorskip("torch")
processors = pytest.importorskip("transformers.generation.logits_process")

from runtime.sampling import SamplingParams, candidates, penalize  # noqa: E402

# Steps of 1/8 with a random offset: ties happen, and near misses of a float32 softmax do not.
LOGITS = st.builds(
    lambda steps, offset: (steps / 8 + offset).astype(np.float32),
    stn.arrays(np.int32, st.integers(2, 60), elements=st.integers(-60, 60)),
    st.floats(-3, 3),
)


def reference(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    """Probabilities [vocab] after transformers' processors in the order that `generate` applies them."""
    scores = torch.tensor(logits)[None]
    chain = [processors.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)] if seen else []
    chain.append(processors.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        chain.append(processors.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        chain.append(processors.TopPLogitsWarper(params.top_p))
    if params.min_p:
        chain.append(processors.MinPLogitsWarper(params.min_p))
    for processor in chain:
        scores = processor(torch.tensor([seen], dtype=torch.long), scores)
    return torch.softmax(scores.double(), dim=-1)[0].numpy()


def ours(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> np.ndarray:
    if seen:
        logits = penalize(logits, np.array(sorted(set(seen))), params.repetition_penalty)
    ids, probabilities = candidates(logits, params)
    whole = np.zeros(len(logits))
    whole[ids] = probabilities
    return whole


def on_the_edge(logits: np.ndarray, params: SamplingParams, seen: list[int]) -> bool:
    """Whether a filter decides by less than float32 can tell, or top-p cuts among equal scores (there we take the
    lower ids, and transformers whichever its sort puts first)."""
    nudged = [
        SamplingParams(
            params.temperature,
            params.top_k,
            min(1.0, max(1e-6, params.top_p + sign * 1e-5)) if params.top_p < 1 else 1.0,
            min(1.0, max(1e-9, params.min_p * (1 + sign * 1e-5))) if params.min_p else 0.0,
            params.repetition_penalty,
        )
        for sign in (-1, 1)
    ]
    kept = [np.flatnonzero(ours(logits, p, seen)).tolist() for p in nudged]
    if kept[0] != kept[1]:
        return True
    scores = penalize(logits, np.array(sorted(set(seen)), dtype=np.int64), params.repetition_penalty)
    cut = set(kept[0])
    return any(float(scores[i]) in {float(scores[j]) for j in cut} for i in range(len(scores)) if i not in cut)


@given(
    LOGITS,
    st.floats(0.2, 3),
    st.sampled_from([0, 1, 3, 10, 100]),
    st.sampled_from([1.0, 0.95, 0.8, 0.5, 0.1]),
    st.sampled_from([0.0, 0.02, 0.1, 0.5]),
    st.sampled_from([0.8, 1.1, 2.0]),
    st.lists(st.integers(0, 59), max_size=10),
)
def test_probabilities_equal_transformers(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float, seen: list[int]
) -> None:
    params = SamplingParams(temperature, top_k, top_p, min_p, penalty)
    seen = [token for token in seen if token < len(logits)]
    if on_the_edge(logits, params, seen):
        return
    np.testing.assert_allclose(ours(logits, params, seen), reference(logits, params, seen), rtol=1e-4, atol=1e-9)


def test_ties_of_top_k_stay_as_in_transformers() -> None:
    logits = np.array([2.0, 1.0, 1.0, 0.0, 1.0], dtype=np.float32)
    params = SamplingParams(1.0, top_k=2)
    np.testing.assert_allclose(ours(logits, params, []), reference(logits, params, []), rtol=1e-6)
    assert np.count_nonzero(ours(logits, params, [])) == 4
