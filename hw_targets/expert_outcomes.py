"""What an expert cache lacks at each step, as the simulator asks for it: how many experts are missing, by cache name.

From the misses of a replayed or recorded trace (`from_misses`), or drawn from hit rates (`from_hit_rates`). With a
predictor a part of the misses is asked for `distance` layers early: of `ahead` experts at most, the share `accuracy` of
them rightly. The others are asked for when the router has spoken, and what was fetched in vain is read all the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hw_targets.simulator import Simulator

EARLY, LATE, LOW = "early", "late", "low"


def from_misses(
    misses: np.ndarray,
    names: Sequence[str],
    *,
    ahead: int = 0,
    accuracy: float = 0.0,
    distance: int = 1,
    absent: float | None = None,
    stand_ins: np.ndarray | None = None,
) -> list[dict[str, int]]:
    """For each step what is missing, by `NAME.early` and `NAME.late`. `misses` is int [steps, layers], >= 0.

    `stand_ins`, of the same shape, are those that are read in fewer bits instead, by `NAME.low`; they are not among
    `misses`.

    The first `distance` layers have none before them that could ask early. Of the `ahead` experts that are guessed for
    a layer the share 1 - `accuracy` is wrong; of these the share `absent` is not in the cache, and is read in vain
    (None: as many as there are misses that were not foreseen). Shares are kept over the steps: where 0.5 experts a step
    are predicted, it is one every second step.
    """
    if misses.ndim != 2 or misses.shape[1] != len(names):
        raise ValueError(f"expected misses of shape [steps, {len(names)}], got {list(misses.shape)}")
    if not 0.0 <= accuracy <= 1.0 or min(ahead, distance) < 0 or (misses.size and misses.min() < 0):
        raise ValueError("expected misses >= 0, ahead >= 0, distance >= 0 and an accuracy from 0 to 1")
    if absent is not None and not 0.0 <= absent <= 1.0:
        raise ValueError("expected a share of wrong guesses from 0 to 1")
    if stand_ins is not None and (stand_ins.shape != misses.shape or (stand_ins.size and stand_ins.min() < 0)):
        raise ValueError(f"expected stand-ins >= 0 of shape {list(misses.shape)}, got {list(stand_ins.shape)}")
    owed, vain = np.zeros(len(names)), np.zeros(len(names))
    found = []
    for number, row in enumerate(misses.tolist()):
        step: dict[str, int] = {}
        if stand_ins is not None:
            step |= {f"{name}.{LOW}": int(n) for name, n in zip(names, stand_ins[number], strict=True)}
        for layer, (name, missing) in enumerate(zip(names, row, strict=True)):
            early = min(ahead, missing) if layer >= distance else 0
            owed[layer] += early * accuracy
            right = min(int(owed[layer] + 1e-9), early)
            owed[layer] -= right
            if absent is not None and layer >= distance:
                vain[layer] += ahead * (1.0 - accuracy) * absent
                wrong = min(int(vain[layer] + 1e-9), ahead - right)
                vain[layer] -= wrong
                early = right + wrong
            step[f"{name}.{EARLY}"] = early
            step[f"{name}.{LATE}"] = missing - right
        found.append(step)
    return found


def from_hit_rates(rates: Sequence[float], top_k: int, steps: int, seed: int = 0) -> np.ndarray:
    """Misses int [steps, layers] drawn independently: each of `top_k` experts of a layer is there with its hit rate."""
    if any(not 0.0 <= rate <= 1.0 for rate in rates) or top_k < 1 or steps < 1:
        raise ValueError("expected hit rates from 0 to 1, and one expert and one step or more")
    rng = np.random.default_rng(seed)
    return rng.binomial(top_k, [[1.0 - rate for rate in rates]] * steps)


@dataclass(frozen=True)
class StepTimes:
    """Seconds of every step, in order."""

    seconds: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.seconds) / len(self.seconds)

    def quantile(self, share: float) -> float:
        """The time that this share of the steps does not exceed (the nearest of those that occur)."""
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


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
