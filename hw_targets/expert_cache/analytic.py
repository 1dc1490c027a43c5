"""Hit rates in closed form, for experts chosen independently at each token.

`popularity` is a vector of one layer's experts that sums to 1, or, where a token chooses several experts at once, of
the chance that a token chooses each one, which sums to the number chosen. `slots` is the room of that layer.
"""

from __future__ import annotations

import math
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


def fading_hit_rate(
    chances: Vector, slots: float, half_life: float, *, tokens: int | None = None, before: int = 0
) -> float:
    """Counts of uses that fade to a half in `half_life` tokens, the highest stay (the policy lrfu): one layer.

    A count has the mean and the variance of a fading sum of independent uses and is taken to be normal; those above
    the level that leaves `slots` of them stay. `tokens` and `before` as for `lru_hit_rate_of_tokens`.
    """
    if slots >= len(chances) and tokens is None:
        return 1.0
    asked = float(chances.sum())
    if slots <= 0 or asked <= 0:
        return 0.0
    fade = 2.0 ** (-1.0 / half_life)
    found, ages = 0.0, {10**6: 1} if tokens is None else _ages(before, before + max(tokens, 1))
    for age, count in ages.items():
        seen = -np.expm1(age * np.log1p(-np.minimum(chances, 1 - 1e-12)))
        if float(seen.sum()) > slots:
            mean = chances * (1.0 - fade**age) / (1.0 - fade)
            spread = np.sqrt(chances * (1.0 - chances) * (1.0 - fade ** (2 * age)) / (1.0 - fade**2)) + 1e-4
            level = _solve(
                lambda x, m=mean, d=spread: -float(_above(m, d, x).sum()), -slots, low=-50.0, high=100.0, halvings=40
            )
            seen = np.minimum(seen, _above(mean, spread, level))
        found += count * float((chances * seen).sum())
    return min(1.0, found / asked / sum(ages.values()))


def _ages(first: int, end: int) -> dict[int, int]:
    """Ages and how many they stand for: each of the first, then one for an eighth of its own age."""
    ages: dict[int, int] = {}
    while first < end:
        count = min(max(1, first // 8), end - first)
        ages[first + count // 2] = count
        first += count
    return ages


def _above(mean: Vector, spread: Vector, level: float) -> Vector:
    """Chance that normal numbers exceed the level; the error function by Abramowitz and Stegun 7.1.26, to 2e-7."""
    x = (mean - level) / (spread * math.sqrt(2.0))
    t = 1.0 / (1.0 + 0.3275911 * np.abs(x))
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return 0.5 * (1.0 + np.sign(x) * (1.0 - series * np.exp(-x * x)))


def _solve(
    function: Callable[[float], float], value: float, *, low: float = 0.0, high: float = 1.0, halvings: int = 100
) -> float:
    """The t at which a rising function of t has the value, to twelve digits; `high` is only where to begin."""
    while function(high) < value and high < 1e12:
        high *= 2
    for _ in range(halvings):
        middle = (low + high) / 2
        if function(middle) < value:
            low = middle
        else:
            high = middle
    return (low + high) / 2
