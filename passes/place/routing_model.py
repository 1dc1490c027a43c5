"""How often an expert is found in a cache, when no trace says so: sessions with a Zipf popularity of experts.

    hit_rate(128, 8, slots=51, batch=1)        # share of the experts a token asks for that lie in 51 of 128 slots
    distinct_experts(128, 8, tokens=64)        # how many experts 64 tokens of mixed sessions touch

Within a session the i-th most popular expert of a layer is chosen with a probability falling like i^-s (s = 1.4 fits
public traces best; other sessions have other favourites, so that many sessions together are near uniform). Hits of
least-recently-used replacement by Che's approximation, of the policy of `run` by the chances of counts; the exact
replay of a trace is `passes.place.cache_choice`. The closed forms of caches (`hw_targets.expert_cache.analytic`) are
loaded when a cache is judged: a plan without one needs no arrays.
"""

from __future__ import annotations

from functools import lru_cache

SESSION_ZIPF = 1.4
SESSION_TOKENS = 128


@lru_cache(maxsize=1024)
def inclusion(experts: int, top_k: int, skew: float = SESSION_ZIPF) -> tuple[float, ...]:
    """Probability that a token uses the i-th most popular expert; they sum to `top_k` and none exceeds 1."""
    from hw_targets.expert_cache.analytic import inclusion_chances, zipf_popularity

    return tuple(inclusion_chances(zipf_popularity(experts, skew), top_k).tolist())


@lru_cache(maxsize=4096)
def hit_rate(experts: int, top_k: int, slots: int, batch: int = 1, skew: float = SESSION_ZIPF) -> float:
    """Share of a token's experts found in a cache of `slots` for the layer; `batch` sessions share it.

    Below the experts of one token nothing survives until the next, which is exactly 0. Never falls with more slots.
    """
    if slots >= experts:
        return 1.0
    if slots < min(experts, top_k) or slots <= 0:
        return 0.0
    if batch > 1:
        return fixed_share(experts, top_k, slots)  # favourites of many sessions together: near uniform
    import numpy as np

    from hw_targets.expert_cache.analytic import lru_hit_rate_of_tokens

    chances = np.array(inclusion(experts, top_k, skew))
    return lru_hit_rate_of_tokens(chances, max(slots, float(chances.sum())), whole_passes=False)


@lru_cache(maxsize=4096)
def fading_hit_rate(experts: int, top_k: int, slots: int, batch: int = 1) -> float:
    """As `hit_rate`, of the policy lrfu: counts of uses that fade. It has no cliff."""
    if slots >= experts or batch > 1:
        return fixed_share(experts, top_k, slots)
    import numpy as np

    from hw_targets.expert_cache.analytic import fading_hit_rate as fading
    from hw_targets.expert_cache.policies import HALF_LIFE

    return fading(np.array(inclusion(experts, top_k)), slots, HALF_LIFE)


def fixed_share(experts: int, top_k: int, slots: int, batch: int = 1) -> float:
    """Share of a token's experts that `slots` fixed ones serve. Favourites change with the session, so that without a
    trace no choice beforehand is better than any other."""
    return min(1.0, slots / experts)


def distinct_experts(experts: int, top_k: int, tokens: float) -> float:
    """How many experts a pass over `tokens` tokens touches when they choose independently and uniformly."""
    return experts * (1.0 - (1.0 - top_k / experts) ** tokens) if experts else 0.0
