"""Weights for the routers of a random model, so that it routes as in a session and not nearly always alike.

A checkpoint of random numbers routes almost constantly or almost uniformly, and a measurement of expert caches on it
says little. Here a router's logits become a bias of Zipf's law in a drawn order, plus noise that depends on the token.
Routers have no bias of their own, so one element of the router's input must be the same for every token: a
large constant in one column of the embedding stays so through the residual stream.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

# Normal noise has thinner tails than the Gumbel noise of a synthetic router (deviation 1.28). With this deviation the
# hit rates of caches of one to four times a token's experts are nearest, within some six points.
NOISE_DEVIATION = 1.7


def session_router_weights(
    experts: int,
    hidden: int,
    *,
    exponent: float,
    constant_element: int,
    constant_value: float,
    rest_deviation: float,
    seed: int = 0,
) -> npt.NDArray[np.float32]:
    """A router's matrix [experts, hidden].

    Its input has `constant_value` (not 0) at `constant_element` for every token; the other elements vary between tokens
    with standard deviation `rest_deviation` (> 0). Logits are then -exponent * log(rank of the expert) + normal noise.
    ValueError for values that make no router.
    """
    if not (experts > 0 and 0 <= constant_element < hidden and constant_value != 0 and rest_deviation > 0):
        raise ValueError("a session router needs experts, a constant element within the input, and inputs that vary")
    random = np.random.Generator(np.random.PCG64(seed))
    rank = np.empty(experts)
    rank[random.permutation(experts)] = np.arange(1, experts + 1)
    weights = random.standard_normal((experts, hidden))
    weights *= NOISE_DEVIATION / (rest_deviation * math.sqrt(max(1, hidden - 1)))
    weights[:, constant_element] = -exponent * np.log(rank) / constant_value
    return weights.astype(np.float32)
