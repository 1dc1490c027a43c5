"""From logits to the next token: greedy, or temperature, top-k, top-p and min-p with a seed; repetition penalty.

Order and meaning are those of Hugging Face `generate` (transformers' logits processors), because generation_config.json
is written for it: repetition penalty, then temperature, then top-k, top-p, min-p, each on what the one before left.
(llama.cpp filters first and applies the temperature last; with a temperature of 1 both agree.)

- repetition penalty p: the score of every token in the prompt or the text so far is divided by p when positive, else
  multiplied by p.
- top-k: scores below the k-th largest are dropped; ties with the k-th stay.
- top-p: of the tokens in order of probability, the shortest head whose probabilities sum to at least p stays.
- min-p: tokens less probable than p times the most probable one are dropped.

At least one token always stays. Temperature 0 is greedy: the largest score, the lowest id among equals.
Probabilities are float64. The same seed and the same logits give the same tokens on every machine and numpy version:
draws come from PCG64's raw stream, which numpy guarantees not to change.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic

_HEAD_TOKENS = 1024


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy; 0 switches top-k and min-p off, 1 top-p and the penalty.

    `seed` None draws one from the system; `Sampler.seed` tells which. Refuses values that mean nothing.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0.0 <= _real(self.temperature) < math.inf, "0 (greedy) or more")
        _check("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "0 (off) or a number of tokens")
        _check("top_p", self.top_p, 0.0 < _real(self.top_p) <= 1.0, "more than 0, at most 1 (off)")
        _check("min_p", self.min_p, 0.0 <= _real(self.min_p) <= 1.0, "0 (off) to 1")
        penalty = self.repetition_penalty
        _check("repetition_penalty", penalty, 0.0 < _real(penalty) < math.inf, "more than 0; 1 is off")
        seed = self.seed
        _check("seed", seed, seed is None or (isinstance(seed, int) and 0 <= seed < 1 << 64), "an integer in 0..2^64-1")

    @property
    def greedy(self) -> bool:
        """Whether the choice is the largest score."""
        return self.temperature == 0.0


class Sampler:
    """Chooses the tokens of one sequence: holds its random stream and which tokens it has seen."""

    def __init__(self, params: SamplingParams, context: Iterable[int] = ()) -> None:
        self.params = params
        self.seed = params.seed if params.seed is not None else secrets.randbits(32)
        self._stream: np.random.PCG64 | None = None  # made on the first draw: greedy runs never load numpy.random
        self._seen = dict.fromkeys(context) if params.repetition_penalty != 1.0 else {}

    def sample(self, logits: np.ndarray) -> int:
        """The next token for `logits` [vocab]; remembers it for the repetition penalty.

        Raises RuntimeDiagnostic when the logits hold a NaN, +inf, or nothing but -inf.
        """
        token = self._choose(logits)
        if self.params.repetition_penalty != 1.0:
            self._seen[token] = None
        return token

    def _choose(self, logits: np.ndarray) -> int:
        if self._seen:
            logits = penalize(logits, np.fromiter(self._seen, np.int64), self.params.repetition_penalty)
        best = int(np.argmax(logits))  # the first NaN when there is one
        if not math.isfinite(logits[best]):
            raise RuntimeDiagnostic(
                f"the model's logits are not usable: the largest is {logits[best]} (token {best})",
                expected="finite numbers",
                hint="the weights may hold NaN or overflow in this dtype; try --dtype f32",
            )
        if self.params.greedy:
            return best
        ids, probabilities = candidates(logits, self.params)
        cumulative = np.cumsum(probabilities)
        at = int(np.searchsorted(cumulative, self._uniform() * cumulative[-1], side="right"))
        return int(ids[min(at, len(ids) - 1)])  # rounding can put the draw on the very end

    def _uniform(self) -> float:
        """The next number of the stream in [0, 1), 53 bits."""
        if self._stream is None:
            self._stream = np.random.PCG64(self.seed)
        return (int(self._stream.random_raw()) >> 11) * 2.0**-53


def penalize(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """`logits` [vocab] with the repetition penalty on the token ids in `seen`; a copy."""
    logits = np.array(logits, dtype=np.float32)
    scores = logits[seen]
    logits[seen] = np.where(scores < 0, scores * np.float32(penalty), scores / np.float32(penalty))
    return logits


def candidates(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, np.ndarray]:
    """The tokens that temperature, top-k, top-p and min-p leave: ids ascending, and their probabilities (sum 1).

    `logits` [vocab] with a finite maximum; params.temperature > 0.
    """
    ids = np.flatnonzero(logits > -np.inf)
    if 0 < params.top_k < len(ids):
        scores = logits[ids]
        kth_largest = np.partition(scores, len(ids) - params.top_k)[len(ids) - params.top_k]
        ids = ids[scores >= kth_largest]
    # Subtract before dividing: a tiny temperature then gives -inf, not inf - inf.
    scores = logits[ids].astype(np.float64)
    with np.errstate(over="ignore"):
        probabilities = np.exp((scores - scores.max()) / params.temperature)
    probabilities /= probabilities.sum()
    if params.top_p < 1.0:
        kept = _nucleus(scores, probabilities, params.top_p)
        ids, probabilities = ids[kept], probabilities[kept] / probabilities[kept].sum()
    if params.min_p > 0.0:
        stays = probabilities >= params.min_p * probabilities.max()
        ids, probabilities = ids[stays], probabilities[stays] / probabilities[stays].sum()
    return ids, probabilities


def _nucleus(scores: np.ndarray, probabilities: np.ndarray, top_p: float) -> np.ndarray:
    """Indices, ascending, of the shortest head (by score, then by index) whose probabilities sum to `top_p` or more."""
    likely = np.arange(len(probabilities))
    if len(probabilities) > 4 * _HEAD_TOKENS:
        # Sorting a whole vocabulary costs more than a small model's step. Mostly a short head holds the mass; all ties
        # with its last value are in it, so the order is that of the full sort.
        least = np.partition(scores, len(scores) - _HEAD_TOKENS)[len(scores) - _HEAD_TOKENS]
        head = np.flatnonzero(scores >= least)
        if probabilities[head].sum() > top_p + 1e-9:
            likely = head
    order = likely[np.argsort(-scores[likely], kind="stable")]
    earlier = np.concatenate([[0.0], np.cumsum(probabilities[order])[:-1]])  # the sum before each token
    return np.sort(order[: max(1, int(np.searchsorted(earlier, top_p, side="left")))])


def _real(value: object) -> float:
    """The value as a number; NaN, which every range refuses, when it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _check(name: str, value: object, fine: bool, expected: str) -> None:
    if not fine:
        raise RuntimeDiagnostic(f"{name} is {value}", where="sampling", expected=expected)
