"""Synthetic routers: traces for a model of which none was recorded.

Within a session a layer's experts have popularities of Zipf's law in an order drawn for the session; a token draws its
experts without replacement (Gumbel-top-k). Recorded traces of single sessions are met with exponents of 1.3 to 1.4 and
no stickiness; many sessions mixed are nearly uniform, since each has its own order.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hw_targets.routing.trace import RoutingTrace


@dataclass(frozen=True)
class Router:
    """How experts are chosen.

    exponent: Zipf exponent within a session, 0 is uniform. stickiness: chance with which an expert of the token before
    is kept. drift: chance, for each token and layer, that two ranks of the session's order change places. sessions: how
    many take turns, token by token.
    """

    exponent: float = 1.4
    stickiness: float = 0.0
    drift: float = 0.0
    sessions: int = 1


SESSION = Router()  # one user's conversation
MIXED = Router(exponent=0.0)  # requests of many users


def synthetic_trace(
    router: Router,
    *,
    experts: int,
    top_k: int,
    layers: int,
    tokens: int,
    prompt: int = 0,
    batch: int = 1,
    expert_bytes: int = 1,
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `prompt` tokens in one batch and `tokens` decoded ones, `batch` of them in each pass.

    The tokens of one pass belong to different sessions while there are enough of them. The same arguments give the same
    trace. ValueError for sizes that no model has.
    """
    if not (1 <= top_k <= experts and layers >= 1 and tokens >= 0 and prompt >= 0 and batch >= 1):
        raise ValueError("a synthetic trace needs 1 <= top_k <= experts, a layer, and no negative count of tokens")
    random = np.random.Generator(np.random.PCG64(seed))
    count = prompt + tokens
    logits = -router.exponent * np.log(np.arange(1, experts + 1))
    order = np.stack([[random.permutation(experts) for _ in range(layers)] for _ in range(router.sessions)])
    strength = np.empty((router.sessions, layers, experts))
    for session in range(router.sessions):
        for layer in range(layers):
            strength[session, layer, order[session, layer]] = logits
    chosen = np.empty((count, layers, top_k), np.int32)
    weights = np.empty((count, layers, top_k), np.float32)
    before: dict[int, np.ndarray] = {}
    row = np.arange(layers)[:, None]
    for token in range(count):
        session = (0 if token < prompt else token - prompt) % router.sessions
        noisy = strength[session] + random.gumbel(size=(layers, experts))
        if router.stickiness and session in before:
            keep = random.random((layers, top_k)) < router.stickiness
            noisy[row, before[session]] += np.where(keep, 1e6, 0.0)
        top = np.argpartition(noisy, experts - top_k, axis=1)[:, experts - top_k :]
        rank = np.argsort(-noisy[row, top], axis=1, kind="stable")
        chosen[token] = before[session] = top[row, rank]
        score = np.minimum(noisy[row, chosen[token]], 700.0)
        score = np.exp(score - score.max(axis=1, keepdims=True))
        weights[token] = score / score.sum(axis=1, keepdims=True)
        if router.drift:
            _drift(strength[session], router.drift, random)
    index = np.arange(count)
    passes = np.where(index < prompt, 0, (index - prompt) // batch + (prompt > 0))
    return RoutingTrace(
        model=f"synthetic(exponent={router.exponent:g}, stickiness={router.stickiness:g}, drift={router.drift:g}, "
        f"sessions={router.sessions})",
        arch="synthetic",
        expert_count=experts,
        top_k=top_k,
        layers=tuple(range(layers)),
        expert_bytes=(expert_bytes,) * layers,
        dense_bytes=(0,) * layers,
        experts=chosen,
        weights=weights,
        turn=np.where(index < prompt, 0, (index - prompt) % router.sessions),
        position=index,
        batch=passes,
        decode=index >= prompt,
    )


def _drift(strength: np.ndarray, chance: float, random: np.random.Generator) -> None:
    """Two experts of a layer change places, in each layer with the given chance."""
    layers, experts = strength.shape
    first, second = random.integers(experts, size=(2, layers))
    moved = np.flatnonzero(random.random(layers) < chance)
    a, b = first[moved], second[moved]
    strength[moved, a], strength[moved, b] = strength[moved, b].copy(), strength[moved, a].copy()
