"""What an expert cache lacks at each step, as the simulator asks for it: how many experts are missing, by cache name.

Drawn from hit rates (`from_hit_rates`), or drawn so that all together they are exactly as many as expected
(`even_misses`); `hw_targets.expert_guesses` divides them into those that are asked for early, on a guess, and late.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from hw_targets.simulator import Simulator

_WHOLE = 1e-9  # what is as near to a whole number is one
EARLY, LATE = "early", "late"


def from_hit_rates(rates: Sequence[float], top_k: int, steps: int, seed: int = 0) -> np.ndarray:
    """Misses int [steps, layers] drawn independently: each of `top_k` experts of a layer is there with its hit rate."""
    if any(not 0.0 <= rate <= 1.0 for rate in rates) or top_k < 1 or steps < 1:
        raise ValueError("expected hit rates from 0 to 1, and one expert and one step or more")
    rng = np.random.default_rng(seed)
    return rng.binomial(top_k, [[1.0 - rate for rate in rates]] * steps)


@dataclass(frozen=True)
class Lacking:
    """Caches that are alike: how many there are, and the chances that r or more experts are missing in one, r = 1, 2..

    `kinds`: by rank, what becomes of the r-th missing expert; empty when the same becomes of all.
    """

    caches: int
    chances: tuple[float, ...]
    kinds: tuple[int, ...] = ()


def even_misses(groups: Sequence[Lacking], steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(misses int [rows, caches], weights f64 [rows] that sum to 1), the caches of the groups in order.

    Which caches of the `steps` steps miss experts is drawn, how many experts are missing in all of them is not: as many
    as are expected, in every group and of every kind. Where that is no whole number, a step comes more than once, with
    one more missing and without, and its weight is divided. So the weighted mean of anything convex in the numbers of
    missing experts, as times are, is not below its value at the expected ones.
    """
    if steps < 1 or any(not 0.0 <= chance <= 1.0 for group in groups for chance in group.chances):
        raise ValueError("expected chances from 0 to 1, and one step or more")
    rng = np.random.default_rng(seed)
    misses = np.zeros((steps, sum(group.caches for group in groups)), np.int64)
    more: list[list[tuple[float, int]]] = [[] for _ in range(steps)]  # by step: (share, cache) of one more missing
    first = 0
    for group in groups:
        cells = rng.permutation(steps * group.caches)
        step, cache = cells // group.caches, first + cells % group.caches
        counts, shares = _whole_counts(np.array(group.chances) * len(cells), bool(group.kinds))
        for count, share in zip(counts.tolist(), shares.tolist(), strict=True):
            misses[step[:count], cache[:count]] += 1
            if share > 0.0:
                more[step[count]].append((share, int(cache[count])))
        first += group.caches
    rows, weights = list(misses), [1.0 - max((share for share, _ in extra), default=0.0) for extra in more]
    others = [found for row, extra in zip(misses, more, strict=True) for found in _with_more(row, extra)]
    if others:
        shares = np.array([share for _, share in others])
        kept = _fewer(shares, _sums(groups, np.array([row for row, _ in others])))
        rows += [row for (row, _), share in zip(others, kept, strict=True) if share > 0.0]
        weights += [share for share in kept.tolist() if share > 0.0]
    found = [(row, weight) for row, weight in zip(rows, weights, strict=True) if weight > 0.0]
    return np.array([row for row, _ in found]), np.array([weight for _, weight in found]) / steps


def _whole_counts(expected: np.ndarray, by_rank: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of expected numbers by rank (falling): whole numbers that do not rise, and what is missing to the expectation,
    below 1; not by rank, both add up to the same sum, and only one rank lacks something."""
    if by_rank:
        counts = np.floor(expected + _WHOLE)
        lacking = expected - counts
    else:
        upto = np.floor(np.cumsum(expected) + _WHOLE)
        counts = np.sort(np.diff(upto, prepend=0.0))[::-1]
        lacking = np.zeros_like(expected)
        if len(expected):
            lacking[np.argmax(expected - counts)] = expected.sum() - upto[-1]
    return counts.astype(np.int64), np.where(lacking > _WHOLE, lacking, 0.0)


def _with_more(row: np.ndarray, extra: list[tuple[float, int]]) -> Iterator[tuple[np.ndarray, float]]:
    """A step with some of what may be missing too: (misses, share). What has the larger share is missing as long as
    what has the smaller one."""
    row, before = row.copy(), 0.0
    for _, cache in extra:
        row[cache] += 1
    for share, cache in sorted(extra):
        if share > before:
            yield row.copy(), share - before
        row[cache] -= 1
        before = share


def _sums(groups: Sequence[Lacking], misses: np.ndarray) -> np.ndarray:
    """f64 [1 + kinds of all groups, rows]: ones, and how many experts of each kind are missing in each row."""
    sums, first = [np.ones(len(misses))], 0
    for group in groups:
        mine = misses[:, first : first + group.caches]
        kinds = np.array(group.kinds or (0,) * len(group.chances))
        for kind in sorted(set(kinds.tolist())):
            upto = np.concatenate([[0], np.cumsum(kinds == kind)])
            sums.append(upto[mine].sum(axis=1).astype(np.float64))
        first += group.caches
    return np.array(sums)


def _fewer(weights: np.ndarray, sums: np.ndarray) -> np.ndarray:
    """Weights of which no more than there are sums are above 0, and that give the same sums (Caratheodory)."""
    weights, kept = weights.copy(), np.arange(len(weights))
    while len(kept) > len(sums):
        change = np.linalg.svd(sums[:, kept])[2][-1]  # it changes no sum
        change = change if change.max() > -change.min() else -change
        steps = np.where(change > 0.0, weights[kept] / np.where(change > 0.0, change, 1.0), np.inf)
        last = int(steps.argmin())
        weights[kept] -= steps[last] * change
        weights[kept[last]] = 0.0
        kept = np.delete(kept, last)
    return np.maximum(weights, 0.0)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of every step, in order."""

    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)


def simulate_steps(simulator: Simulator, outcomes: Iterable[dict[str, int]]) -> StepTimes:
    """The time of a step for each of the outcomes; equal ones are simulated once."""
    known: dict[tuple[tuple[str, int], ...], float] = {}
    times = []
    for outcome in outcomes:
        key = tuple(outcome.items())
        if key not in known:
            known[key] = simulator.seconds(outcome)
        times.append(known[key])
    if not times:
        raise ValueError("expected one step or more")
    return StepTimes(tuple(times))
