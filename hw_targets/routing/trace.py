"""A routing trace: for every token and every layer with experts, which experts the router chose, and how strongly.

`RoutingTrace` holds arrays of one row a token; tokens that were evaluated together (a prompt, or one token of each of
several sequences) share a batch number. `batches()` gives what a cache sees: for each batch and layer the distinct
experts, since a cache loads an expert once however many tokens of the batch use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

NO_EXPERT = -1  # a slot that a token left empty, or a layer that did not route this token


@dataclass(frozen=True)
class Batch:
    """What one layer asks of a cache at once.

    `experts`: distinct expert ids by their first appearance, tokens in order and slots by rank. `recency`: the same ids
    by their last appearance, so that what the newest token chose counts as used last. `weights`: for each of `experts`
    its share of the routing weight of the batch; where the trace knows no weights each choice counts alike.
    """

    layer: int  # index into RoutingTrace.layers
    step: int  # number of the batch of tokens: a model's pass over its layers
    decode: bool  # whether its first token was decoded, and not part of a prompt
    experts: tuple[int, ...]
    recency: tuple[int, ...]
    weights: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Routing of `tokens` tokens through the layers that have experts.

    experts: int32 [tokens, layers, top_k], by rank, NO_EXPERT where there is none; weights: float32 of the same shape,
    NaN where not known. turn, position, batch: int64 [tokens]; decode: bool [tokens], False for tokens of a prompt.
    Batch numbers rise through the file. layers: model layer of each layer index; expert_bytes: bytes of one expert of
    that layer; dense_bytes: bytes of the layer's other weights (0 where not known).
    """

    model: str
    arch: str
    expert_count: int
    top_k: int
    layers: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    dense_bytes: tuple[int, ...]
    experts: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    turn: npt.NDArray[np.int64]
    position: npt.NDArray[np.int64]
    batch: npt.NDArray[np.int64]
    decode: npt.NDArray[np.bool_]

    @property
    def tokens(self) -> int:
        return int(self.experts.shape[0])

    @property
    def decode_tokens(self) -> int:
        return int(self.decode.sum())

    @property
    def layer_count(self) -> int:
        """Layers that have experts."""
        return len(self.layers)

    @property
    def all_expert_bytes(self) -> int:
        """Bytes of every expert of every layer."""
        return sum(self.expert_bytes) * self.expert_count

    @property
    def cycle_bytes(self) -> int:
        """Bytes of the experts that one token uses in all layers: below this size a global LRU cache never hits."""
        return sum(self.expert_bytes) * self.top_k

    @cached_property
    def requests(self) -> tuple[Batch, ...]:
        """All of `batches()`, kept: every replay of the trace reads them."""
        return tuple(self.batches())

    def batches(self) -> Iterator[Batch]:
        """Batches in the order in which a model makes them: pass by pass, and in each pass layer by layer."""
        starts = np.flatnonzero(np.r_[True, self.batch[1:] != self.batch[:-1]]) if self.tokens else np.empty(0, int)
        ends = np.r_[starts[1:], self.tokens]
        for step, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
            chosen = self.experts[start:end].tolist()
            weight = self.weights[start:end].tolist()
            decode = bool(self.decode[start])
            for layer in range(self.layer_count):
                ids = [e for token in chosen for e in token[layer] if e >= 0]
                if not ids:
                    continue
                first = tuple(dict.fromkeys(ids))
                recency = first if len(first) == len(ids) else tuple(dict.fromkeys(reversed(ids)))[::-1]
                shares = _weight_shares(chosen, weight, layer, first)
                yield Batch(layer, step, decode, first, recency, shares)


def _weight_shares(
    chosen: list[list[list[int]]], weight: list[list[list[float]]], layer: int, first: tuple[int, ...]
) -> tuple[float, ...]:
    """Share of the batch's routing weight that each of `first` got; a weight that is not known counts as 1."""
    total = dict.fromkeys(first, 0.0)
    for experts, weights in zip(chosen, weight, strict=True):
        for expert, value in zip(experts[layer], weights[layer], strict=True):
            if expert >= 0:
                total[expert] += value if value == value else 1.0  # NaN differs from itself
    whole = sum(total.values())
    return tuple(total[e] / whole if whole > 0 else 0.0 for e in first)
