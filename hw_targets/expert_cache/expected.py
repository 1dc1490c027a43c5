"""Expected hit rate of a cache of experts when no trace is given, and the synthetic router that meets a given trace.

LRU and lrfu are answered in closed form (micro- to milliseconds); other policies by replaying a short synthetic trace
of a few layers, with the slots in proportion (some tens of milliseconds, remembered).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from hw_targets.expert_cache.analytic import (
    fading_hit_rate,
    inclusion_chances,
    lru_hit_rate_of_tokens,
    zipf_popularity,
)
from hw_targets.expert_cache.policies import HALF_LIFE
from hw_targets.expert_cache.replay import replay
from hw_targets.routing.synthetic import SESSION, Router, synthetic_trace
from hw_targets.routing.trace import RoutingTrace

_LAYERS = 12  # of a synthetic trace that stands for a deeper model
_TOKENS = 160


def expected_hit_rate(
    *,
    experts: int,
    top_k: int,
    layers: int,
    slots: int,
    policy: str = "lru",
    scope: str = "global",
    router: Router = SESSION,
    tokens: int | None = None,
    before: int = 0,
    batch: int = 1,
) -> float:
    """Share of decode lookups that hit, 0 to 1.

    `slots`: entries of the cache, all layers together. `tokens`: decoded from now on, after `before` tokens that found
    the cache empty; without it a cache that has been in use for long. `batch`: tokens in one pass, of as many
    sessions.
    """
    if slots >= experts * layers and tokens is None:
        return 1.0
    simple = not router.stickiness and not router.drift and router.sessions == 1 and batch == 1
    if policy == "lru" and simple:
        chances = _chances(experts, router.exponent, top_k)
        share = float(slots // layers) if scope == "layer" else slots / layers
        return lru_hit_rate_of_tokens(chances, share, tokens=tokens, before=before, whole_passes=scope == "global")
    if policy == "lrfu" and simple:
        chances = _chances(experts, router.exponent, top_k)
        return fading_hit_rate(chances, slots / layers, HALF_LIFE, tokens=tokens, before=before)
    return _simulated(experts, top_k, layers, slots, policy, scope, router, tokens, before, batch)


@lru_cache(maxsize=256)
def _chances(experts: int, exponent: float, top_k: int) -> np.ndarray:
    return inclusion_chances(zipf_popularity(experts, exponent), top_k)


@lru_cache(maxsize=1024)
def _simulated(
    experts: int,
    top_k: int,
    layers: int,
    slots: int,
    policy: str,
    scope: str,
    router: Router,
    tokens: int | None,
    before: int,
    batch: int,
) -> float:
    depth = min(layers, _LAYERS)
    passes = min(_TOKENS, tokens) if tokens is not None else _TOKENS
    warm = min(_TOKENS, before) if tokens is not None else _TOKENS // 2
    trace = _session(router, experts, top_k, depth, (warm + passes) * batch, batch)
    part = slots * depth // layers
    return replay(trace, slots=part, policy=policy, scope=scope, first_step=warm).decode_hit_rate


@lru_cache(maxsize=4)
def _session(router: Router, experts: int, top_k: int, layers: int, tokens: int, batch: int) -> RoutingTrace:
    router = replace(router, sessions=max(router.sessions, batch))
    return synthetic_trace(router, experts=experts, top_k=top_k, layers=layers, tokens=tokens, batch=batch)


@dataclass(frozen=True)
class RouterFit:
    """The router whose LRU hit rates are nearest to a trace's. Rates are of decode lookups, from 0 to 1, at cache sizes
    of `cycles` times what one token uses; `mean_error` is the mean distance of the two."""

    router: Router
    cycles: tuple[float, ...]
    recorded: tuple[float, ...]
    modelled: tuple[float, ...]
    mean_error: float


def fit_router(
    trace: RoutingTrace,
    *,
    cycles: Sequence[float] = (1.27, 2.55, 3.82, 5.1),
    exponents: Sequence[float] = tuple(round(0.1 * n, 1) for n in range(21)),
    stickiness: Sequence[float] = (0.0, 0.1, 0.2, 0.3),
    seed: int = 0,
) -> RouterFit:
    """Fits exponent and stickiness to a recorded trace by the hit rates of a global LRU cache.

    Exponents are searched for each stickiness by descent on the grid, the error having one valley. A synthetic trace
    has the recorded one's tokens and a third of its layers; some seconds in all.
    """
    cycles = tuple(cycle for cycle in cycles if cycle * trace.top_k <= trace.expert_count) or (1.0,)
    recorded = tuple(replay(trace, int(cycle * trace.cycle_bytes)).decode_hit_rate for cycle in cycles)
    layers = max(1, trace.layer_count // 3)
    best: RouterFit | None = None

    def tried(exponent: float, sticky: float) -> RouterFit:
        nonlocal best
        router = Router(exponent, sticky)
        model = synthetic_trace(
            router,
            experts=trace.expert_count,
            top_k=trace.top_k,
            layers=layers,
            tokens=trace.decode_tokens,
            prompt=trace.tokens - trace.decode_tokens,
            seed=seed,
        )
        rates = tuple(replay(model, int(cycle * model.cycle_bytes)).decode_hit_rate for cycle in cycles)
        error = float(np.mean(np.abs(np.subtract(rates, recorded))))
        fit = RouterFit(router, cycles, recorded, rates, error)
        if best is None or fit.mean_error < best.mean_error:
            best = fit
        return fit

    for sticky in stickiness:
        low, high = 0, len(exponents) - 1
        while high - low > 1:  # two neighbours in the middle tell on which side the valley lies
            middle = (low + high) // 2
            if tried(exponents[middle], sticky).mean_error <= tried(exponents[middle + 1], sticky).mean_error:
                high = middle
            else:
                low = middle + 1
        tried(exponents[low], sticky)
        tried(exponents[high], sticky)
    assert best is not None
    return best
