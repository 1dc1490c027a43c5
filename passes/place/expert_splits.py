"""Ways to store the experts of equal layers in two formats: those that lose most in few bits have the wider one.

    table = ExpertTable.of(shape, plain, choices, losses, uses)   # `plain`: parts of experts, each in one format
    table.splits()                                                # parts in two formats, along the frontier
    table.mixed(("w8a8", "w3"), ranks)                            # a part whose experts have these, rank by rank

An expert's rank in its layer is by what it loses in the fewest bits: use times error, or use alone where losses are
estimated (`passes.quantize.expert_uses`). Formats are those of the lower convex hull of bytes and loss, two of them in
a layer (neighbours on the hull, or one further apart), split after a few numbers of experts: layers of several splits
are what lies between. Where all experts of a layer are alike there are no splits. Refuses recipes that are not listed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from frontends.model_shape import ModelShape
from ir.diagnostics import DiagnosticError
from passes.place.expert_mix import ExpertMix
from passes.place.format_loss import Losses
from passes.place.formats import Formats
from passes.place.parts import Part
from passes.quantize.expert_uses import use_shares

_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4)  # of a layer's experts in the wider format
_FEW_SHARES = (1 / 16, 1 / 4, 1 / 2)
_MANY_PAIRS = 5  # of formats: then fewer shares of each
_ALIKE = 1e-9  # a difference of losses that is none
Uses = Mapping[int, Sequence[float]]  # by layer: how often each expert is picked


@dataclass(frozen=True)
class ExpertTable:
    """`plain`: one part a format. `lost` has of each of them, by layer, what the experts before each rank lose
    together; `chances` that a token asks for the expert of a rank, `orders` the experts of each layer by rank."""

    plain: tuple[Part, ...]
    lost: tuple[tuple[tuple[float, ...], ...], ...]
    chances: tuple[float, ...]
    orders: tuple[tuple[int, ...], ...]

    @staticmethod
    def of(
        shape: ModelShape, plain: Sequence[Part], choices: Sequence[Formats], losses: Losses, uses: Uses
    ) -> ExpertTable:
        """The table of parts that differ in format alone; `choices` are the formats that their recipes name."""
        by_name = {formats.name: formats for formats in choices}
        each = [losses.of_experts(shape, part, by_name[part.recipe], uses) for part in plain]
        narrow = each[min(range(len(plain)), key=lambda i: plain[i].nbytes)]
        count, top_k, layers = plain[0].experts, plain[0].top_k, plain[0].layers
        shares = [use_shares(uses.get(layer, (0.0,) * count)) for layer in layers]
        orders = tuple(
            tuple(sorted(range(count), key=lambda e: (-lost[e], -share[e], e)))
            for lost, share in zip(narrow, shares, strict=True)
        )
        by_rank = [[share[e] for e in order] for share, order in zip(shares, orders, strict=True)]
        chances = tuple(min(1.0, top_k * math.fsum(found) / len(layers)) for found in zip(*by_rank, strict=True))
        lost = tuple(
            tuple(_sums(row[e] for e in order) for row, order in zip(way, orders, strict=True)) for way in each
        )
        return ExpertTable(tuple(plain), lost, chances, orders)

    @property
    def losses(self) -> tuple[tuple[float, ...], ...]:
        """Of each format what its layers lose in all."""
        return tuple(tuple(row[-1] for row in way) for way in self.lost)

    def mixed(self, recipes: Sequence[str], ranks: Sequence[int]) -> Part:
        """The part in which the expert of each rank has the recipe of this number. DiagnosticError for one that is not
        listed."""
        ways = [self._way(name) for name in recipes]
        count = self.plain[0].experts
        mix = ExpertMix(
            tuple(recipes), tuple(self.plain[w].nbytes // count for w in ways), tuple(ranks), self.chances, self.orders
        )
        runs: list[tuple[int, int, int]] = []  # (format, first rank, the one behind the last)
        for number, run in itertools.groupby(ranks):
            begin = runs[-1][2] if runs else 0
            runs.append((ways[number], begin, begin + len(list(run))))
        losses = tuple(
            math.fsum(self.lost[way][at][end] - self.lost[way][at][begin] for way, begin, end in runs)
            for at in range(len(self.orders))
        )
        elements = [self.plain[w].element for w in ways]
        texts = [f"{n} of {self.plain[w].format}" for n, w in zip(mix.counts, ways, strict=True)]
        product = sum(n * self.plain[w].weight_bytes // count for n, w in zip(mix.counts, ways, strict=True))
        return replace(
            self.plain[ways[-1]], nbytes=mix.nbytes, weight_bytes=product, format=" + ".join(texts), recipes=(),
            losses=losses, mix=mix, element=next((e for e in elements if e != "i8"), "i8"),
        )  # fmt: skip

    def split(self, wide: str, narrow: str, first: int) -> Part:
        """The experts of the first ranks in one recipe, the others in another one."""
        count = self.plain[0].experts
        return self.mixed((wide, narrow), (0,) * first + (1,) * (count - first))

    def splits(self) -> tuple[Part, ...]:
        """The ways in two formats, none where all experts of every layer are alike."""
        if all(self._alike(row) for way in self.lost for row in way):
            return ()
        pairs = self._pairs()
        count = self.plain[0].experts
        shares = _SHARES if len(pairs) < _MANY_PAIRS else _FEW_SHARES
        firsts = sorted({round(share * count) for share in shares} - {0, count})
        if count <= len(shares) + 1:
            firsts = list(range(1, count))
        return tuple(
            self.split(self.plain[wide].recipe, self.plain[narrow].recipe, first)
            for wide, narrow in pairs
            for first in firsts
        )

    def _way(self, name: str) -> int:
        for number, part in enumerate(self.plain):
            if name in part.recipes:
                return number
        raise DiagnosticError(
            f"experts are stored as {name!r}", expected=" or ".join(repr(n) for p in self.plain for n in p.recipes)
        )

    def _alike(self, row: tuple[float, ...]) -> bool:
        """Whether all experts of a layer lose the same."""
        count = len(row) - 1
        return all(abs(value - row[-1] * rank / count) <= _ALIKE * (row[-1] or 1.0) for rank, value in enumerate(row))

    def _pairs(self) -> list[tuple[int, int]]:
        """(wider, narrower) format of the splits, by number: of the hull, computed in the same element."""
        hull: list[int] = []
        total = [math.fsum(losses) for losses in self.losses]
        for way in sorted(range(len(self.plain)), key=lambda i: (self.plain[i].nbytes, total[i])):
            if hull and total[way] >= total[hull[-1]]:
                continue  # larger, and loses no less
            while len(hull) > 1 and self._slope(hull[-2], hull[-1], total) >= self._slope(hull[-1], way, total):
                hull.pop()
            hull.append(way)
        near = [(hull[i + step], hull[i]) for step in (1, 2) for i in range(len(hull) - step)]
        return [(wide, narrow) for wide, narrow in near if self.plain[wide].element == self.plain[narrow].element]

    def _slope(self, small: int, large: int, total: Sequence[float]) -> float:
        """Loss by byte from one format to a wider one: below 0."""
        return (total[large] - total[small]) / (self.plain[large].nbytes - self.plain[small].nbytes)


def _sums(losses: Iterable[float]) -> tuple[float, ...]:
    """What the experts before each rank lose together, and all of them."""
    return tuple(itertools.accumulate(losses, initial=0.0))
