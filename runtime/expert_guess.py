"""Which experts the next layer will want, guessed while this one is waited for.

Takes what a program's waits for experts say of the routers (`runtime.manifest.RouterInfo`): where the router's input
still lies in the arena, and where its matrix is in the weights. Gives, for a step of a few tokens, the experts that the
*next* layer's router chooses for *this* layer's input: the two inputs differ by what one layer adds (Fate,
arXiv 2502.12224). A guess moves reads forward in time and nothing else; tokens never depend on one.

Keeps count of how many of the guesses that would be read come true, and gives none while that are too few: a read in
vain takes the disk from reads that are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from runtime.await_info import AwaitInfo, RouterInfo
from runtime.manifest import Manifest, ProgramInfo

MOST_TOKENS = 16  # of a step; with more, most experts are used anyway
LEAST_SHARE = 0.6  # of guesses that come true, from which on they are read
_MEMORY = 64  # guesses over which the share is taken, roughly


@dataclass
class GuessCounters:
    """Since the session was opened: experts read on a guess, and those of them that were wanted."""

    read: int = 0
    right: int = 0


class ExpertGuess:
    """`weights`: bytes of the weights' place; `resident`: pieces that stay (a router elsewhere is not used)."""

    def __init__(self, manifest: Manifest, weights: np.ndarray, resident: frozenset[int]) -> None:
        self._weights, self._top_k = weights, max(1, manifest.experts_per_token)
        self._resident = [manifest.weights.pieces[number] for number in sorted(resident)]
        self._next = {program.name: self._pairs(program) for program in manifest.programs}
        self.counters = GuessCounters()
        self._share = 1.0
        self._open: dict[int, dict[int, None]] = {}  # layer -> missing experts that were guessed

    def _pairs(self, program: ProgramInfo) -> dict[int, tuple[int, np.ndarray, int]]:
        """By number of a wait: where the input lies, the next router's matrix [strips, columns, strip], its experts."""
        waits: list[tuple[int, AwaitInfo, RouterInfo]] = [
            (number, wait, wait.router) for number, wait in enumerate(program.awaits) if wait.router is not None
        ]
        pairs = {}
        for (number, _, here), (_, _, there) in pairwise(waits):
            first, last = there.weights, there.weights + there.bytes
            if here.columns == there.columns and any(
                piece.offset <= first and last <= piece.offset + piece.bytes for piece in self._resident
            ):
                matrix = self._weights[first:last].view(np.float32)
                pairs[number] = here.hidden, matrix.reshape(-1, there.columns, there.strip), there.experts
        return pairs

    @property
    def possible(self) -> bool:
        """Whether the artifact says enough, and routers stay in memory."""
        return any(self._next.values())

    def guess(
        self, program: ProgramInfo, number: int, tokens: int, arena: np.ndarray, least_share: float = 0.0
    ) -> list[int]:
        """Experts of the layer behind that of wait `number`, the likeliest first; none where nothing is known.

        Those that would have less than `least_share` of their token's routing weight are left out.
        """
        pair = self._next[program.name].get(number)
        if pair is None or not 0 < tokens <= MOST_TOKENS:
            return []
        at, matrix, experts = pair
        columns = matrix.shape[1]
        rows = arena[at : at + tokens * columns * 4].view(np.float32).reshape(tokens, columns)
        scores = np.concatenate([rows @ strip for strip in matrix], axis=1)[:, :experts]
        best = np.argsort(-scores, axis=1, kind="stable")[:, : self._top_k]
        if not least_share:
            return list(dict.fromkeys(best.T.ravel().tolist()))
        odds = np.exp(np.take_along_axis(scores, best, axis=1) - scores.max(axis=1, keepdims=True))
        heavy = odds >= least_share * odds.sum(axis=1, keepdims=True)
        return list(dict.fromkeys(best.T[heavy.T].tolist()))

    def worth_reading(self, layer: int, missing: Sequence[int]) -> bool:
        """Notes a guess of experts that are not in memory; whether guesses are right often enough to read them."""
        self._open[layer] = dict.fromkeys(missing)
        return self._share >= LEAST_SHARE

    def learn(self, layer: int, experts: Sequence[int]) -> None:
        """What the layer really chose."""
        guessed = self._open.pop(layer, None)
        if not guessed:
            return
        wanted = frozenset(experts)
        right = sum(expert in wanted for expert in guessed)
        if self._share >= LEAST_SHARE:  # it was when they were guessed: read
            self.counters.read += len(guessed)
            self.counters.right += right
        self._share += min(1.0, len(guessed) / _MEMORY) * (right / len(guessed) - self._share)
