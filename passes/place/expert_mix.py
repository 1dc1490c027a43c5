"""Experts of a layer in several formats: how many bytes are kept, asked for, missed and held by a cache.

    mix = ExpertMix(("w8a8", "w3"), (9000, 4000), ranks, chances, orders)
    mix.nbytes, mix.asked(tokens=1), mix.missed(misses), mix.largest(slots=32)

Experts are ranked within their layer, first the one that costs most in few bits (`passes.place.expert_splits`). What
is counted of one step is an average over layers that are equal but for who has which rank.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache


@dataclass(frozen=True)
class ExpertMix:
    """`recipes` in use, `sizes` of an expert in each (bytes). Of each rank: `ranks` has the number of its recipe,
    `chances` that a token asks for it. `orders` has of each layer of the part its experts by rank.

    Its last recipe is that of all experts that are not named.
    """

    recipes: tuple[str, ...]
    sizes: tuple[int, ...]
    ranks: tuple[int, ...]
    chances: tuple[float, ...]
    orders: tuple[tuple[int, ...], ...] = field(compare=False, repr=False)

    @property
    def counts(self) -> tuple[int, ...]:
        """Experts of a layer in each recipe."""
        return tuple(self.ranks.count(number) for number in range(len(self.recipes)))

    @property
    def nbytes(self) -> int:
        """Of all experts of a layer."""
        return sum(size * count for size, count in zip(self.sizes, self.counts, strict=True))

    def largest(self, slots: int) -> int:
        """Bytes of a layer's cache that has room for any `slots` of them, as the runtime reserves it."""
        return sum(sorted((self.sizes[at] for at in self.ranks), reverse=True)[:slots])

    def asked(self, tokens: float) -> float:
        """Bytes of an expert, on average over those that a pass over so many tokens asks for."""
        return self._mean(_asked_for(self.chances, tokens))

    def missed(self, misses: Sequence[float]) -> float:
        """The same over those that a cache lacks: `misses` has the share of each rank, in any unit."""
        return self._mean(misses)

    def named(self, layer: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """(recipe, numbers of experts) of the layer at this place of the part's; of all recipes but the last."""
        order = self.orders[layer]
        return tuple(
            (recipe, tuple(sorted(order[rank] for rank, at in enumerate(self.ranks) if at == number)))
            for number, recipe in enumerate(self.recipes[:-1])
        )

    def _mean(self, weights: Sequence[float]) -> float:
        total = math.fsum(weights)
        if not total:
            return self.nbytes / len(self.ranks)
        by_recipe = [0.0] * len(self.recipes)
        for at, weight in zip(self.ranks, weights, strict=True):
            by_recipe[at] += weight
        return sum(size * weight for size, weight in zip(self.sizes, by_recipe, strict=True)) / total


@lru_cache(maxsize=256)
def _asked_for(chances: tuple[float, ...], tokens: float) -> tuple[float, ...]:
    """The chance that some of the tokens asks for an expert, when they choose independently."""
    return tuple(-math.expm1(tokens * math.log1p(-min(p, 1 - 1e-12))) for p in chances)


@lru_cache(maxsize=256)
def misses_by_rank(chances: tuple[float, ...], hit: float) -> tuple[float, ...]:
    """How the misses of a cache divide among experts asked for with these chances, of which a share of `hit` is found.

    By Che's approximation: an expert stays for a time that is the same for all, here the one in which the share is
    reached (*Hierarchical Web Caching Systems*, IEEE JSAC 20, 2002).
    """
    left = [math.log1p(-min(p, 1 - 1e-12)) for p in chances]
    asked = math.fsum(chances)

    def misses(time: float) -> list[float]:
        return [p * math.exp(time * x) for p, x in zip(chances, left, strict=True)]

    low, high = 0.0, 1.0
    while high < 1e12 and math.fsum(misses(high)) > (1.0 - hit) * asked:
        low, high = high, 2 * high
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if math.fsum(misses(middle)) > (1.0 - hit) * asked else (low, middle)
    return tuple(misses(high))
