"""Hit rates in closed form, for experts chosen independently at each token.

`popularity` is a vector of one layer's experts that sums to 1, or, where a token chooses several experts at once, of
the chance that a token chooses each one, which sums to the number chosen. `slots` is the room of that layer.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]


def zipf_popularity(experts: int, exponent: float) -> Vector:
    """Weights 1 / rank^exponent, scaled to the sum 1; exponent 0 is uniform."""
    weights = np.arange(1, experts + 1, dtype=np.float64) ** -exponent
    return weights / weights.sum()


def inclusion_chances(popularity: Vector, top_k: int) -> Vector:
    """The chance that each expert is among `top_k` drawn without replacement, in proportion to `popularity`.

    Drawing in this way (Gumbel-top-k) is a race of exponential clocks; the chance that a clock rings by the time at
    which top_k have rung on average is close to it, and sums to top_k.
    """
    if top_k >= len(popularity):
        return np.ones_like(popularity)
    time = _solve(lambda t: float((-np.expm1(-popularity * t)).sum()), float(top_k))
    return -np.expm1(-popularity * time)


def uniform_hit_rate(experts: int, slots: float) -> float:
    """Uniform choice: whatever the policy, the share of the experts that is there."""
    return min(1.0, slots / experts)


def static_hit_rate(popularity: Vector, slots: int) -> float:
    """The most popular experts pinned: the best that any policy can do that does not see the future."""
    ranked = np.sort(popularity)[::-1]
    return float(ranked[:slots].sum() / ranked.sum())


def lru_hit_rate(popularity: Vector, slots: float) -> float:
    """LRU by Che's approximation: an expert stays for the time in which `slots` different ones are asked for.

    Hierarchical Web Caching Systems: Modeling, Design and Experimental Results, IEEE JSAC 20 (2002).
    """
    if slots >= len(popularity):
        return 1.0
    if slots <= 0:
        return 0.0
    popularity = popularity / popularity.sum()
    time = _solve(lambda t: float((-np.expm1(-popularity * t)).sum()), float(slots))
    return float((popularity * -np.expm1(-popularity * time)).sum())


def lru_hit_rate_of_tokens(
    chances: Vector, slots: float, *, tokens: int | None = None, before: int = 0, whole_passes: bool
) -> float:
    """LRU where a token asks for the experts of its choice at once, at a batch of one token.

    With `tokens` the mean over that many tokens, after `before` others that found an empty cache; without it the rate
    of a cache that has been in use for long. `whole_passes`: one budget for many layers, `slots` is a layer's part of
    it. Such a cache forgets whole passes: an expert is still there at the next token only when the cache holds what a
    pass asks for, below that the hit rate is 0, and it rises in steps. A layer's own share forgets gradually.
    """
    asked = float(chances.sum())
    if slots < asked:
        return 0.0
    left = np.log1p(-np.minimum(chances, 1 - 1e-12))
    window = 1e12  # tokens for which an expert stays
    if slots < len(chances):
        window = max(1.0, _solve(lambda t: float((-np.expm1(left * t)).sum()), slots))
        window = float(np.floor(window)) if whole_passes else window
    ages = np.array([window]) if tokens is None else np.minimum(np.arange(before, before + max(tokens, 1)), window)
    reuse = -np.expm1(left[None, :] * ages[:, None])  # chance that the expert was asked for within the window
    return float((reuse @ chances).mean() / asked)


def _solve(function: Callable[[float], float], value: float) -> float:
    """The t at which a rising function of t has the value, to twelve digits."""
    low, high = 0.0, 1.0
    while function(high) < value and high < 1e12:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2
