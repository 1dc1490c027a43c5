"""Guesses of the next layer's experts: what they are, when they are read and for whom."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.await_info import AwaitInfo, RouterInfo
from runtime.expert_guess import LEAST_SHARE, MOST_TOKENS, ExpertGuess
from runtime.manifest import (
    KVInfo,
    Manifest,
    PieceInfo,
    ProgramInfo,
    TargetInfo,
    WeightsInfo,
)

PAGE = 4096
COLUMNS, LAYERS = 8, 3


def model(experts: int, strip: int, top_k: int) -> tuple[Manifest, int]:
    """A model of which only routers matter: their matrices one after the other, each on a page of its own."""
    pieces: list[PieceInfo] = []
    awaits: list[AwaitInfo] = []
    for layer in range(LAYERS):
        at = 2 * layer * PAGE
        router = RouterInfo(64, at, experts, COLUMNS, strip)
        pieces += [PieceInfo("dense", at, PAGE, 0, "gate"), PieceInfo("experts", at + PAGE, PAGE, PAGE, "experts")]
        awaits += [AwaitInfo(2 * layer, ()), AwaitInfo(2 * layer + 1, (), router)]
    program = ProgramInfo("decode", "s", 16, 1 << 16, (), tuple(awaits))
    nbytes = 2 * LAYERS * PAGE
    weights = WeightsInfo("weights", nbytes, (), tuple(pieces))
    kv, target = KVInfo(LAYERS, 1, 8, "bf16", 64, 0), TargetInfo("host", "", "", ())
    return Manifest("", {}, 100, 64, "f32", target, (program,), kv, weights, {}, {}, top_k), nbytes


@settings(max_examples=30, deadline=None)
@given(
    experts=st.integers(2, 40),
    strip=st.sampled_from((1, 4, 16)),
    tokens=st.integers(1, MOST_TOKENS),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_a_guess_is_what_the_next_router_makes_of_this_input(
    experts: int, strip: int, tokens: int, top_k: int, seed: int
) -> None:
    manifest, nbytes = model(experts, strip, top_k)
    random = np.random.default_rng(seed)
    weights, arena = np.zeros(nbytes, np.uint8), np.zeros(1 << 16, np.uint8)
    matrices = random.standard_normal((LAYERS, experts, COLUMNS)).astype(np.float32)
    for layer, matrix in enumerate(matrices):
        padded = np.full((-(-experts // strip) * strip, COLUMNS), 9.0, np.float32)  # of no expert: never chosen
        padded[:experts] = matrix
        strips = padded.reshape(-1, strip, COLUMNS).transpose(0, 2, 1)
        weights[2 * layer * PAGE :][: strips.size * 4] = np.ascontiguousarray(strips).view(np.uint8).ravel()
    hidden = random.standard_normal((tokens, COLUMNS)).astype(np.float32)
    arena[64 : 64 + hidden.nbytes] = hidden.view(np.uint8).ravel()
    guess = ExpertGuess(manifest, weights, frozenset((0, 2, 4)))
    assert guess.possible
    for number, layer in ((1, 1), (3, 2)):
        found = guess.guess(manifest.programs[0], number, tokens, arena)
        best = np.argsort(-(hidden @ matrices[layer].T), axis=1)[:, :top_k]
        assert set(found) == set(best.ravel().tolist()) and len(set(found)) == len(found)
        assert found[0] == best[0, 0]
    assert guess.guess(manifest.programs[0], 5, tokens, arena) == []  # no layer behind the last
    assert guess.guess(manifest.programs[0], 1, MOST_TOKENS + 1, arena) == []


def test_routers_that_are_not_in_memory_are_not_used() -> None:
    manifest, nbytes = model(4, 1, 2)
    assert not ExpertGuess(manifest, np.zeros(nbytes, np.uint8), frozenset((0, 1))).possible


def test_guesses_that_fail_are_not_read_until_they_come_true_again() -> None:
    manifest, nbytes = model(4, 1, 2)
    guess = ExpertGuess(manifest, np.zeros(nbytes, np.uint8), frozenset((0, 2, 4)))
    assert guess.worth_reading(1, [0, 1])
    guess.learn(1, [0, 1, 3])
    assert (guess.counters.read, guess.counters.right) == (2, 2)
    tries = 0
    while guess.worth_reading(1, [0, 1]):
        guess.learn(1, [2, 3])
        tries += 1
    assert 1 < tries < 100
    read = guess.counters.read
    for _ in range(200):
        guess.learn(1, [0, 1])
        if guess.worth_reading(1, [0, 1]):
            break
    assert guess.counters.read == read  # none of these was read
    assert guess.worth_reading(2, [1]) and 0.5 < LEAST_SHARE < 1
