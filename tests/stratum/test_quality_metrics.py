"""The figures of an evaluation, by hand and against plain numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from stratum.quality_metrics import (
    Scores,
    divergence_of,
    log_probabilities,
    mean_and_error,
    perplexity_of,
    score_rows,
)


def logits_of(*rows: list[float]) -> np.ndarray:
    """Logits whose softmax is the given probabilities, shifted by something that must not matter."""
    return (np.log(np.array(rows)) + 7.0).astype(np.float32)


def test_loss_of_known_probabilities() -> None:
    logits = logits_of([0.5, 0.25, 0.25], [0.1, 0.1, 0.8])
    scores = score_rows(logits, np.array([1, 2]))
    assert scores.loss == pytest.approx([math.log(4), -math.log(0.8)], rel=1e-6)
    assert len(scores.divergence) == len(scores.same_top) == len(scores.reference_loss) == 0


def test_divergence_of_known_probabilities() -> None:
    reference = logits_of([0.5, 0.5], [0.9, 0.1])
    ours = logits_of([0.25, 0.75], [0.8, 0.2])
    scores = score_rows(ours, np.array([0, 1]), reference)
    expected = [
        0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75),
        0.9 * math.log(0.9 / 0.8) + 0.1 * math.log(0.1 / 0.2),
    ]
    assert scores.divergence == pytest.approx(expected, rel=1e-5)
    assert scores.reference_loss == pytest.approx([math.log(2), math.log(10)], rel=1e-6)
    # A tie of the reference is token 0 there, and the model finds 1 likeliest.
    assert scores.same_top.tolist() == [False, True]


def test_summary_of_a_few_positions() -> None:
    scores = Scores(
        loss=np.array([1.0, 2.0, 3.0]),
        reference_loss=np.array([1.0, 1.0, 1.0]),
        divergence=np.array([0.0, 0.1, 0.5]),
        same_top=np.array([True, False, True]),
    )
    found = perplexity_of(scores.loss, bytes_per_token=2.0)
    assert found.tokens == 3 and found.nats_per_token == 2.0 and found.perplexity == pytest.approx(math.e**2)
    assert found.nats_error == pytest.approx(1 / math.sqrt(3))  # s = 1
    assert found.perplexity_error == pytest.approx(math.e**2 / math.sqrt(3))
    assert found.bits_per_byte == pytest.approx(2.0 / math.log(2) / 2.0)
    divergence = divergence_of(scores)
    assert (divergence.mean, divergence.median, divergence.max) == (pytest.approx(0.2), 0.1, 0.5)
    assert divergence.p90 == pytest.approx(0.42) and divergence.p99 == pytest.approx(0.492)  # between 0.1 and 0.5
    assert divergence.top1 == pytest.approx(2 / 3) and divergence.top1_error == pytest.approx(math.sqrt(2 / 27))
    assert divergence.ratio == pytest.approx(math.e)  # the losses differ by 1 on average
    assert divergence.ratio_error == pytest.approx(math.e / math.sqrt(3))


def test_one_position_has_no_error() -> None:
    assert mean_and_error(np.array([3.0])) == (3.0, 0.0)


def test_hopeless_losses_are_infinite_perplexities() -> None:
    found = perplexity_of(np.array([1000.0, 1000.0]), bytes_per_token=0.0)
    assert math.isinf(found.perplexity) and math.isinf(found.bits_per_byte) and found.nats_per_token == 1000.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("whose", ["model", "reference"])
def test_logits_that_are_not_finite_are_refused(bad: float, whose: str) -> None:
    good = np.zeros((2, 3), np.float32)
    spoiled = good.copy()
    spoiled[1, 2] = bad
    pair = (spoiled, good) if whose == "model" else (good, spoiled)
    with pytest.raises(DiagnosticError, match=f"the {whose} gives {bad} as the logit of token 2"):
        score_rows(pair[0], np.array([0, 0]), pair[1])


ROWS = st.integers(1, 40)
SEEDS = st.integers(0, 2**32 - 1)


@given(rows=ROWS, vocabulary=st.integers(2, 50), seed=SEEDS, size=st.sampled_from([1e-3, 1.0, 30.0, 1e4]))
def test_scores_equal_plain_numpy(rows: int, vocabulary: int, seed: int, size: float) -> None:
    random = np.random.default_rng(seed)
    logits, reference = (random.normal(0, size, (rows, vocabulary)).astype(np.float32) for _ in range(2))
    targets = random.integers(0, vocabulary, rows)
    scores = score_rows(logits, targets, reference)
    p, q = (np.exp(log_probabilities(x)) for x in (reference, logits))
    assert np.allclose(p.sum(axis=-1), 1, atol=1e-12) and np.allclose(q.sum(axis=-1), 1, atol=1e-12)
    for row in range(rows):
        wide = logits[row].astype(np.float64)
        expected = math.log(math.fsum(np.exp(wide - wide.max()))) + wide.max() - wide[targets[row]]
        assert scores.loss[row] == pytest.approx(expected, rel=1e-9, abs=1e-9)
        logs = [log_probabilities(x[row : row + 1])[0] for x in (reference, logits)]
        assert scores.divergence[row] == pytest.approx(max(0.0, math.fsum(p[row] * (logs[0] - logs[1]))), abs=1e-9)
        assert scores.same_top[row] == (logits[row].argmax() == reference[row].argmax())
    assert (scores.divergence >= 0).all()


@given(rows=ROWS, seed=SEEDS)
def test_a_model_does_not_differ_from_itself(rows: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 5, (rows, 20)).astype(np.float32)
    found = divergence_of(score_rows(logits, random.integers(0, 20, rows), logits))
    assert found.mean == found.max == 0.0 and found.top1 == 1.0 and found.ratio == 1.0 and found.ratio_error == 0.0


def test_blocks_of_rows_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(5)
    logits, reference = (random.normal(0, 2, (17, 30)).astype(np.float32) for _ in range(2))
    targets = random.integers(0, 30, 17)
    whole = score_rows(logits, targets, reference)
    monkeypatch.setattr("stratum.quality_metrics._BLOCK_ELEMENTS", 60)
    pieces = score_rows(logits, targets, reference)
    for name in ("loss", "reference_loss", "divergence", "same_top"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name))
