"""What logits say of a text, and how far two models' logits are apart: plain functions of numpy arrays.

    rows = score_rows(logits, targets)                       # f32 [rows, vocabulary], int [rows]
    rows = score_rows(logits, targets, reference_logits)     # with the reference's logits of the same positions
    scores = Scores.join(pieces)                             # one float64 a position, in order of the text
    perplexity_of(scores.loss), divergence_of(scores)

All logarithms are natural, all sums are in float64. Errors behind a ± are standard errors of a mean over positions that
are taken to be independent, as llama-perplexity's are; neighbouring positions are not quite, so they are a bit small.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from ir.diagnostics import DiagnosticError

_BLOCK_ELEMENTS = 1 << 21  # logits turned into float64 at a time


@dataclass(frozen=True)
class Scores:
    """One number a scored position.

    `loss` [n] nats: -log of the probability of the token that came. With a reference: `reference_loss` [n],
    `divergence` [n] nats: KL(reference || model) over the vocabulary, `same_top` [n] bool: both find the same token
    likeliest (of equals the one with the lowest id). Without: three empty arrays.
    """

    loss: np.ndarray
    reference_loss: np.ndarray
    divergence: np.ndarray
    same_top: np.ndarray

    @classmethod
    def join(cls, pieces: Sequence[Scores]) -> Scores:
        """The pieces one after another."""
        return cls(*(np.concatenate([getattr(piece, field.name) for piece in pieces]) for field in fields(cls)))


def log_probabilities(logits: np.ndarray) -> np.ndarray:
    """float64 [rows, vocabulary]: log softmax."""
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    wide -= np.log(np.exp(wide).sum(axis=-1, keepdims=True))
    return wide


def score_rows(logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None = None) -> Scores:
    """Scores of `logits` [rows, vocabulary] where `targets` [rows] came, beside the reference's logits if given.

    Raises DiagnosticError for logits that are not finite: neither perplexity nor divergence means anything then.
    """
    rows, vocabulary = logits.shape
    step = max(1, _BLOCK_ELEMENTS // vocabulary)
    pieces = [
        _score_block(
            logits[at : at + step], targets[at : at + step], None if reference is None else reference[at : at + step]
        )
        for at in range(0, rows, step)
    ]
    return Scores.join(pieces)


def _score_block(logits: np.ndarray, targets: np.ndarray, reference: np.ndarray | None) -> Scores:
    _refuse_non_finite(logits, "model")
    ours = log_probabilities(logits)
    at = np.arange(len(targets))
    nothing = np.zeros(0)
    if reference is None:
        return Scores(-ours[at, targets], nothing, nothing, nothing.astype(np.bool_))
    _refuse_non_finite(reference, "reference")
    theirs = log_probabilities(reference)
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=-1)
    same_top = logits.argmax(axis=-1) == reference.argmax(axis=-1)
    # A divergence is never negative; its sum of rounded terms may be, by 1e-16.
    return Scores(-ours[at, targets], -theirs[at, targets], np.maximum(divergence, 0.0), same_top)


def _refuse_non_finite(logits: np.ndarray, whose: str) -> None:
    if not np.isfinite(logits).all():
        row, token = (int(i) for i in np.argwhere(~np.isfinite(logits))[0])
        raise DiagnosticError(
            f"the {whose} gives {logits[row, token]} as the logit of token {token}",
            expected="finite logits",
            hint="a weight of the checkpoint may be damaged, or a format too narrow for its activations",
        )


@dataclass(frozen=True)
class Perplexity:
    """Over `tokens` predictions: mean loss in nats, exp of it, and what that is in bits per byte of text."""

    tokens: int
    nats_per_token: float
    nats_error: float
    perplexity: float
    perplexity_error: float
    bits_per_byte: float


def perplexity_of(loss: np.ndarray, bytes_per_token: float) -> Perplexity:
    """`loss` [n >= 1] nats. The error of the perplexity is that of the loss times the perplexity (first order).

    A text of special tokens only has no bytes: its bits per byte are infinite.
    """
    mean, error = mean_and_error(loss)
    value = _exp(mean)
    bits_per_byte = mean / math.log(2) / bytes_per_token if bytes_per_token else math.inf
    return Perplexity(len(loss), mean, error, value, value * error, bits_per_byte)


@dataclass(frozen=True)
class Divergence:
    """How far a model is from its reference, over all scored positions; nats where not said otherwise.

    `top1` is the share of positions at which both find the same token likeliest. `ratio` is the model's perplexity
    over the reference's, with the error of the paired difference of their losses.
    """

    mean: float
    error: float
    median: float
    p90: float
    p99: float
    max: float
    top1: float
    top1_error: float
    ratio: float
    ratio_error: float


def divergence_of(scores: Scores) -> Divergence:
    """Quantiles are interpolated linearly between order statistics (numpy's default)."""
    mean, error = mean_and_error(scores.divergence)
    median, p90, p99 = (float(x) for x in np.quantile(scores.divergence, (0.5, 0.9, 0.99)))
    top1 = float(scores.same_top.mean())
    difference, difference_error = mean_and_error(scores.loss - scores.reference_loss)
    ratio = _exp(difference)
    return Divergence(
        mean=mean,
        error=error,
        median=median,
        p90=p90,
        p99=p99,
        max=float(scores.divergence.max()),
        top1=top1,
        top1_error=math.sqrt(top1 * (1 - top1) / len(scores.same_top)),
        ratio=ratio,
        ratio_error=ratio * difference_error,
    )


def mean_and_error(values: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error, s / sqrt(n) with s divided by n - 1; of one value the error is 0."""
    n = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(n)) if n > 1 else 0.0


def _exp(value: float) -> float:
    """exp, inf where that is too large: a model of random weights may well have such a loss."""
    return math.exp(value) if value < 709 else math.inf
