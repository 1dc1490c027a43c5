"""Weights for the routers of a random model, so that it routes as in a session and not nearly always alike.

A checkpoint of random numbers routes almost constantly or almost uniformly, and a measurement of expert caches on it
says little. Here every expert is chosen as often as a synthetic session (`hw_targets.routing.synthetic`) chooses it:
its logit is normal noise that depends on the token, and a bias, the normal quantile of the chance that a token chooses
the expert. Routers have no bias of their own, so tokens carry a mark: one element of the router's input, the same for
all tokens of a topic, which stays so through the residual stream where the embedding is large. Each topic has its own
element and so its own order of experts; orders of neighbouring topics differ in a few places, as a session drifts.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np
import numpy.typing as npt

from hw_targets.expert_cache.analytic import inclusion_chances, zipf_popularity

LOGIT_DEVIATION = 1.7  # of the noise; only how sharp the routing weights are depends on it
# Of E experts E/32 change places with others from topic to topic. With sixteen tokens a topic the experts that tokens
# share then fall by a fifth in a hundred tokens, as in the recorded session.
MOVED_SHARE = 32


def session_router_weights(
    experts: int,
    top_k: int,
    marks: Sequence[float],
    deviations: npt.ArrayLike,
    *,
    exponent: float,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """A router's matrix [experts, topics + elements].

    Its input begins with one element for each topic: `marks[t]` (not 0) for tokens of topic t, else 0. The others vary
    between tokens with the standard deviations `deviations` (> 0). A token of any topic then chooses `top_k` experts
    with the chances of a session of Zipf's law with this exponent. ValueError for values that make no router.
    """
    spread = np.asarray(deviations, np.float64)
    if not (1 <= top_k < experts and len(marks) > 0 and all(marks) and spread.ndim == 1 and spread.size):
        raise ValueError("a session router needs more experts than a token chooses, marks other than 0, and elements")
    if not (spread > 0).all():
        raise ValueError("a session router needs inputs that vary: deviations above 0")
    random = np.random.Generator(np.random.PCG64(seed))
    chances = inclusion_chances(zipf_popularity(experts, exponent), top_k)
    bias = np.array([NormalDist().inv_cdf(min(max(p, 1e-6), 1 - 1e-6)) for p in chances.tolist()])
    noise = random.standard_normal((experts, spread.size)) * (spread**2).sum() ** -0.5
    orders = topic_orders(experts, len(marks), random)
    biases = np.stack([bias[order] / mark for order, mark in zip(orders, marks, strict=True)], axis=1)
    return (LOGIT_DEVIATION * np.concatenate([biases, noise], axis=1)).astype(np.float32)


def topic_orders(experts: int, topics: int, random: np.random.Generator) -> list[npt.NDArray[np.int64]]:
    """The rank of each expert, [experts], in each topic; E/32 experts (one at least) change places with any other."""
    orders = [random.permutation(experts)]
    for _ in range(topics - 1):
        order = orders[-1].copy()
        for first, second in random.integers(experts, size=(max(1, experts // MOVED_SHARE), 2)):
            order[first], order[second] = order[second], order[first]
        orders.append(order)
    return orders
