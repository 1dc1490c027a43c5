"""What a simulated step has to bring where some missing experts are guessed before their layer asks for them.

    outcomes = with_guesses(misses, weights, names, early, 0.98)     # one for each row, for the simulator

A guess is the next layer's router on the input of the layer before (Fate, arXiv:2502.12224), as `runtime.expert_guess`
makes it; the last argument is the share of them that comes true.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from hw_targets.expert_outcomes import EARLY, LATE


def with_guesses(
    misses: np.ndarray,
    weights: np.ndarray,
    names: Sequence[str],
    early: Mapping[str, int],
    right: float,
) -> list[dict[str, int]]:
    """For each row of `misses` (int [rows, layers], rows counting `weights`) what is missing, by `NAME.early` and
    `NAME.late`.

    Of a layer's missing experts as many as `early` says are asked for early, at most; of these the share `right` is
    what the layer then wants, over all rows and layers, to the nearest whole one. The others are brought in vain, and
    what they should have been comes late.
    """
    if misses.ndim != 2 or misses.shape != (len(weights), len(names)):
        raise ValueError(f"expected misses of shape [{len(weights)}, {len(names)}], got {list(misses.shape)}")
    if not 0.0 <= right <= 1.0 or any(count < 0 for count in early.values()):
        raise ValueError("expected a share of right guesses from 0 to 1, and 0 guesses or more")
    owed = 0.5 * float(weights[0]) if len(weights) else 0.0  # right guesses that were not counted: there are whole ones
    found = []
    for row, weight in zip(misses.tolist(), weights.tolist(), strict=True):
        step: dict[str, int] = {}
        for name, missing in zip(names, row, strict=True):
            asked = min(early.get(name, 0), missing)
            owed += weight * asked * right
            come = min(asked, int(owed / weight + 1e-9)) if weight > 0.0 else 0
            owed -= weight * come
            step[f"{name}.{LATE}"] = missing - come
            if early.get(name, 0):
                step[f"{name}.{EARLY}"] = asked
        found.append(step)
    return found
