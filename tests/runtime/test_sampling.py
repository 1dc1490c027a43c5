"""Sampling: each filter's invariant against a plain formulation, greedy, seeds, distribution, bad numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from runtime import RuntimeDiagnostic, Sampler, SamplingParams
from runtime import sampling as sampling_module
from runtime.sampling import candidates, penalize

LOGITS = stn.arrays(
    np.float32,
    st.integers(1, 40),
    elements=st.one_of(st.floats(-20, 20, width=32), st.sampled_from([0.0, 1.0, -1.0]), st.just(-np.inf)),
).filter(lambda logits: bool(np.isfinite(logits).any()))
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
)


def softmax(logits: np.ndarray, temperature: float) -> np.ndarray:
    scores = (logits.astype(np.float64) - logits.max()) / temperature
    return np.exp(scores) / np.exp(scores).sum()


@given(LOGITS, PARAMS)
def test_candidates_are_a_distribution_over_likely_tokens(logits: np.ndarray, params: SamplingParams) -> None:
    ids, probabilities = candidates(logits, params)
    assert len(ids) >= 1 and np.all(np.diff(ids) > 0)
    assert np.all(np.isfinite(logits[ids]))
    assert abs(probabilities.sum() - 1) < 1e-12
    assert logits[ids].max() == logits.max()  # the most probable token always stays
    whole = softmax(logits, params.temperature)
    # what stays keeps its proportions
    np.testing.assert_allclose(probabilities, whole[ids] / whole[ids].sum(), rtol=1e-9, atol=1e-300)


@given(LOGITS, st.integers(1, 45), st.floats(0.1, 3))
def test_top_k(logits: np.ndarray, k: int, temperature: float) -> None:
    ids, _ = candidates(logits, SamplingParams(temperature=temperature, top_k=k))
    finite = np.flatnonzero(np.isfinite(logits))
    expected = [i for i in finite if np.count_nonzero(logits > logits[i]) < k]  # ties with the k-th stay
    assert ids.tolist() == expected


@given(LOGITS, st.floats(0.01, 0.999), st.floats(0.1, 3))
def test_top_p(logits: np.ndarray, p: float, temperature: float) -> None:
    ids, _ = candidates(logits, SamplingParams(temperature=temperature, top_p=p))
    whole = softmax(logits, temperature)
    order = sorted(np.flatnonzero(np.isfinite(logits)), key=lambda i: (-logits[i], i))
    kept = order[: len(ids)]
    assert sorted(kept) == ids.tolist()  # a head of the order
    assert whole[kept].sum() >= p - 1e-9  # that holds the mass
    assert whole[kept[:-1]].sum() < p + 1e-9  # and is the shortest one


@given(LOGITS, st.floats(0, 1), st.floats(0.1, 3))
def test_min_p(logits: np.ndarray, p: float, temperature: float) -> None:
    ids, _ = candidates(logits, SamplingParams(temperature=temperature, min_p=p))
    whole = softmax(logits, temperature)
    for token in np.flatnonzero(np.isfinite(logits)):
        if whole[token] > p * whole.max() * (1 + 1e-9):
            assert token in ids
        if whole[token] < p * whole.max() * (1 - 1e-9):
            assert token not in ids


def test_filters_apply_in_order() -> None:
    """top-k leaves .5 .3 .2 -> renormalised; top-p then cuts what only together reached it; min-p sees the rest."""
    logits = np.log(np.array([0.4, 0.24, 0.16, 0.12, 0.08], dtype=np.float32))

    def kept(**options: float) -> list[int]:
        return candidates(logits, SamplingParams(temperature=1, **options))[0].tolist()

    assert kept() == [0, 1, 2, 3, 4]
    assert kept(top_p=0.7) == [0, 1, 2]  # .4 + .24 < .7
    assert kept(top_k=3, top_p=0.7) == [0, 1]  # (.4 + .24) / .8 >= .7
    assert kept(min_p=0.35) == [0, 1, 2]
    assert kept(top_p=0.5, min_p=0.35) == [0, 1]
    # the temperature comes first: at 0.5 the probabilities are squared, and .4² holds more than half
    assert candidates(logits, SamplingParams(temperature=0.5, top_p=0.55))[0].tolist() == [0]


def test_top_p_reached_exactly() -> None:
    """Two equal scores hold exactly half each: the first alone is enough for one half."""
    assert candidates(np.zeros(2, dtype=np.float32), SamplingParams(1.0, top_p=0.5))[0].tolist() == [0]


def test_a_draw_of_zero_takes_no_token_of_probability_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sampler, "_uniform", lambda self: 0.0)
    assert Sampler(SamplingParams(1.0)).sample(np.array([-1e4, 0.0, -1e4], dtype=np.float32)) == 1


def test_top_p_of_a_large_vocabulary_equals_the_full_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """The short cut for large vocabularies changes nothing, also where its last value has ties and where it fails."""
    rng = np.random.default_rng(3)
    for scale, p in [(8.0, 0.9), (1.0, 0.95), (0.0, 0.5), (3.0, 0.999)]:
        logits = np.round(rng.normal(size=20_000) * scale, 1).astype(np.float32)
        params = SamplingParams(temperature=1, top_p=p)
        monkeypatch.setattr(sampling_module, "_HEAD_TOKENS", 1024)
        quick = candidates(logits, params)
        monkeypatch.setattr(sampling_module, "_HEAD_TOKENS", 1 << 30)
        whole = candidates(logits, params)
        np.testing.assert_array_equal(quick[0], whole[0])
        np.testing.assert_array_equal(quick[1], whole[1])


@given(LOGITS, st.lists(st.integers(0, 39)), st.floats(0.1, 5))
def test_repetition_penalty(logits: np.ndarray, seen: list[int], penalty: float) -> None:
    seen = sorted({token for token in seen if token < len(logits)})
    before = logits.copy()
    changed = penalize(logits, np.array(seen, dtype=np.int64), penalty)
    np.testing.assert_array_equal(logits, before)
    for token in range(len(logits)):
        score = float(logits[token])
        expected = score if token not in seen else score * penalty if score < 0 else score / penalty
        assert changed[token] == pytest.approx(expected, rel=1e-5)


def test_penalty_counts_prompt_and_own_tokens() -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0), context=[0])
    logits = np.array([4.0, 3.0, 2.5], dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(3)] == [1, 2, 0]  # 4/2 < 3; then 3/2 < 2.5; then all halved
    logits = np.array([-1.0, -1.5], dtype=np.float32)
    assert Sampler(SamplingParams(repetition_penalty=2.0), context=[0]).sample(logits) == 1  # -2 < -1.5


@given(LOGITS)
def test_greedy_takes_the_lowest_id_among_equals(logits: np.ndarray) -> None:
    token = Sampler(SamplingParams()).sample(logits)
    assert logits[token] == logits.max() and np.all(logits[:token] < logits[token])


@given(LOGITS, PARAMS, st.integers(0, 2**64 - 1))
def test_same_seed_same_tokens(logits: np.ndarray, params: SamplingParams, seed: int) -> None:
    params = SamplingParams(params.temperature, params.top_k, params.top_p, params.min_p, seed=seed)
    first, second = (Sampler(params) for _ in range(2))
    drawn = [first.sample(logits) for _ in range(5)]
    assert drawn == [second.sample(logits) for _ in range(5)]
    assert set(drawn) <= set(candidates(logits, params)[0].tolist())


def test_fixed_draws() -> None:
    """The stream is part of what is promised: these numbers must never change."""
    sampler = Sampler(SamplingParams(temperature=1.0, seed=7))
    logits = np.zeros(1000, dtype=np.float32)
    assert [sampler.sample(logits) for _ in range(6)] == [625, 897, 775, 225, 300, 873]


def test_an_unset_seed_is_reported_and_repeats() -> None:
    logits = np.zeros(1000, dtype=np.float32)
    first = Sampler(SamplingParams(temperature=1.0))
    drawn = [first.sample(logits) for _ in range(4)]
    again = Sampler(SamplingParams(temperature=1.0, seed=first.seed))
    assert drawn == [again.sample(logits) for _ in range(4)]


def test_draws_follow_the_probabilities() -> None:
    probabilities = np.array([0.5, 0.0, 0.3, 0.15, 0.05])
    with np.errstate(divide="ignore"):
        logits = np.log(probabilities).astype(np.float32)
    sampler = Sampler(SamplingParams(temperature=1.0, seed=11))
    drawn = np.bincount([sampler.sample(logits) for _ in range(20_000)], minlength=5) / 20_000
    assert drawn[1] == 0
    # five standard deviations of a binomial share at the given seed
    assert np.all(np.abs(drawn - probabilities) <= 5 * np.sqrt(probabilities * (1 - probabilities) / 20_000))


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(temperature=1.0, seed=0)])
@pytest.mark.parametrize("logits", [[np.nan, 1.0], [1.0, np.inf], [-np.inf, -np.inf], [1.0, np.nan, 2.0]])
def test_unusable_logits(params: SamplingParams, logits: list[float]) -> None:
    with pytest.raises(RuntimeDiagnostic, match="the model's logits are not usable"):
        Sampler(params).sample(np.array(logits, dtype=np.float32))


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    ids, probabilities = candidates(np.array([3e38, 0.0, -3e38], dtype=np.float32), SamplingParams(temperature))
    assert np.isfinite(probabilities).all() and ids[np.argmax(probabilities)] == 0


@pytest.mark.parametrize(
    ("option", "value"),
    [("temperature", -0.1), ("temperature", math.inf), ("temperature", math.nan), ("temperature", "hot"),
     ("top_k", -1), ("top_k", 1.5), ("top_p", 0.0), ("top_p", 1.1), ("top_p", math.nan), ("min_p", -0.1),
     ("min_p", 1.1), ("repetition_penalty", 0.0), ("repetition_penalty", math.inf), ("repetition_penalty", None),
     ("seed", -1), ("seed", 1 << 64), ("seed", 1.5)],
)  # fmt: skip
def test_meaningless_parameters(option: str, value: object) -> None:
    with pytest.raises(RuntimeDiagnostic, match=rf"sampling: error: {option} is {value}(.|\n)*expected: "):
        SamplingParams(**{option: value})
