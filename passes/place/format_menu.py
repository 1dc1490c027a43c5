"""Formats that a plan may choose among, part by part, and what the choice may cost of the model's quality.

    menu = menu_of(["w4a8-g32", "w3", "w8a8"], asked=formats_of("w4a8-g32"))   # loses no more than w4a8-g32 throughout
    menu = menu_of(names, asked, least_bits=4.0)                               # or: 4 bits a weight on average
    for ways in menu.variants(shape): ...                                      # of each part one `Part` a format

Each listed recipe is one way for attention, MLP, experts and head of any layer; embeddings, routers and the KV cache
are as the recipe asked for has them. The experts of a layer share a format, unless `uses` says how often each is picked
(by layer): then they may have two (`passes.place.expert_splits`).
What a format loses is measured (`passes.place.format_loss`) or estimated. Refuses formats that are no recipes, recipes
that choose by the names of tensors, and budgets that no listed format keeps.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from frontends.model_shape import ModelShape
from ir.diagnostics import DiagnosticError
from passes.place.expert_splits import ExpertTable
from passes.place.format_loss import ESTIMATED, Losses
from passes.place.formats import Formats, formats_of
from passes.place.parts import Part, parts_of

FIXED = ("embedding",)  # groups that keep the format asked for
MOST_FORMATS = 8
Cuts = tuple[tuple[int, int], ...]
Shares = tuple[tuple[str, float], ...]  # of a layer's experts in a recipe


@dataclass(frozen=True)
class Menu:
    """`choices` are the formats, the one asked for first. `most_loss` and `least_bits` (of the weights of products, on
    average) bound what is chosen; None: no bound. `uses`: ((layer, (how often each expert is picked, ...)), ...), known
    from `uses_source`; where it is empty the experts of a layer share a format."""

    choices: tuple[Formats, ...]
    losses: Losses = ESTIMATED
    most_loss: float | None = None
    least_bits: float | None = None
    uses: tuple[tuple[int, tuple[float, ...]], ...] = ()
    uses_source: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.choices)

    def variants(self, shape: ModelShape, cuts: Cuts = (), shares: Shares = ()) -> tuple[tuple[Part, ...], ...]:
        """Of each part of the model one for every format that differs; `Part.recipes` are those that agree. Then those
        in two formats, with each of `shares` (that are pinned) besides the usual ones."""
        return _variants(self.choices, self.losses, self.uses, shape, cuts, shares)

    def table(self, shape: ModelShape, ways: Sequence[Part]) -> ExpertTable:
        """The experts of the layers of a part rank by rank; `ways` are its variants."""
        return _table(shape, tuple(p for p in ways if p.mix is None), self.choices, self.losses, self.uses)

    def allowed(self, shape: ModelShape) -> tuple[str, ...]:
        """The listed formats that keep the bounds throughout."""
        return tuple(n for n in self.names if self.keeps(uniform_quality(self, shape, n)))

    def uniform(self, shape: ModelShape) -> tuple[Formats, ...]:
        """The same, as formats."""
        allowed = self.allowed(shape)
        return tuple(f for f in self.choices if f.name in allowed)

    def keeps(self, quality: Quality) -> bool:
        """Whether a quality is within the bounds."""
        lost = self.most_loss is not None and quality.loss > self.most_loss * (1 + 1e-6)
        return not lost and (self.least_bits is None or quality.bits >= self.least_bits * (1 - 1e-6))

    def unbounded(self) -> Menu:
        """The same formats without a budget of quality: for a plan that is given."""
        return dataclasses.replace(self, most_loss=None, least_bits=None)


@dataclass(frozen=True)
class Quality:
    """What a choice of formats amounts to: its loss, and bits of a weight of products on average, scales included."""

    loss: float
    bits: float


def quality_of(taken: Sequence[tuple[Part, tuple[int, ...]]]) -> Quality:
    """Of parts (a format each) and the layers that have them; () is embedding or head."""
    loss, weights, nbytes = [], 0, 0
    for part, layers in taken:
        if part.losses:
            numbers = {layer: at for at, layer in enumerate(part.layers)}
            loss += [part.losses[numbers[i]] for i in layers] if layers else [part.losses[0]]
        weights += part.weights * (len(layers) or 1)
        nbytes += part.weight_bytes * (len(layers) or 1)
    return Quality(math.fsum(loss), 8 * nbytes / weights if weights else 0.0)


def uniform_quality(menu: Menu, shape: ModelShape, name: str) -> Quality:
    """Of one listed format throughout."""
    ways = menu.variants(shape)
    return quality_of([(next(p for p in found if name in p.recipes), found[0].layers) for found in ways])


def menu_of(
    names: Sequence[str],
    asked: Formats,
    shape: ModelShape,
    losses: Losses = ESTIMATED,
    *,
    most_loss: float | None = None,
    least_bits: float | None = None,
    uses: Mapping[int, Sequence[float]] | None = None,
    uses_source: str = "",
) -> Menu:
    """The menu of listed recipes. Without a bound a plan loses no more than the format asked for throughout. `uses`: by
    layer how often each expert is picked, from `uses_source`; None: experts of a layer share a format."""
    _check(asked)
    found = [asked]
    for name in dict.fromkeys(n.strip() for n in names):
        if name != asked.name:
            listed = formats_of(name or None, asked.float_format)
            _check(listed)
            found.append(dataclasses.replace(listed, recipe=dataclasses.replace(listed.recipe, kv=asked.recipe.kv)))
    if len(found) > MOST_FORMATS:
        raise DiagnosticError(f"{len(found)} formats to choose among", expected=f"at most {MOST_FORMATS}")
    by_layer = tuple((layer, tuple(counts)) for layer, counts in sorted((uses or {}).items()))
    menu = Menu(tuple(found), losses, uses=by_layer, uses_source=uses_source if by_layer else "")
    reached = {name: uniform_quality(menu, shape, name) for name in menu.names}
    if most_loss is None and least_bits is None:
        most_loss = reached[asked.name].loss
    least = min(q.loss for q in reached.values())
    most = max(q.bits for q in reached.values())
    if most_loss is not None and most_loss < least * (1 - 1e-9):
        raise DiagnosticError(
            f"none of {', '.join(map(_shown, menu.names))} loses as little as {most_loss:.4g}",
            expected=f"a loss of {least:.4g} or more, or a wider format among them",
        )
    if least_bits is not None and least_bits > most * (1 + 1e-9):
        raise DiagnosticError(
            f"none of {', '.join(map(_shown, menu.names))} has {least_bits:g} bits a weight",
            expected=f"{most:.4g} or less, or a wider format among them",
        )
    return dataclasses.replace(menu, most_loss=most_loss, least_bits=least_bits)


def _check(formats: Formats) -> None:
    named = [rule.match for rule in formats.recipe.rules if rule.match]
    if named:
        raise DiagnosticError(
            f"recipe {formats.name} chooses by names of tensors ({named[0]}), so it is no format to choose among",
            expected="recipes that choose by roles, such as w3 or w4a8-g32",
        )


def _shown(name: str) -> str:
    return name or "floats"


def _different(ways: tuple[Part, ...]) -> tuple[Part, ...]:
    """One part for all formats that store it alike. The group that keeps its format has one way."""
    first = ways[0]
    if first.group in FIXED:
        return (dataclasses.replace(first, recipes=tuple(n for p in ways for n in p.recipes)),)
    found: list[Part] = []
    for part in ways:
        if part.group == "head" and part.tied != first.tied:
            continue  # the bytes of the table would be another part's
        same = next((i for i, p in enumerate(found) if _stored(p) == _stored(part)), None)
        if same is None:
            found.append(part)
        else:
            found[same] = dataclasses.replace(found[same], recipes=(*found[same].recipes, *part.recipes))
    return tuple(found)


def _stored(part: Part) -> tuple[object, ...]:
    return part.nbytes, part.format, part.element, part.weight_bytes, part.losses


Uses = tuple[tuple[int, tuple[float, ...]], ...]


@lru_cache(maxsize=32)
def _variants(
    choices: tuple[Formats, ...], losses: Losses, uses: Uses, shape: ModelShape, cuts: Cuts, shares: Shares
) -> tuple[tuple[Part, ...], ...]:
    by_recipe = [_parts(shape, formats, cuts, losses) for formats in choices]
    found = []
    for ways in (_different(ways) for ways in zip(*by_recipe, strict=True)):
        if not uses or not ways[0].experts:
            found.append(ways)
            continue
        table = _table(shape, ways, choices, losses, uses)
        whole = tuple(dataclasses.replace(p, losses=x) for p, x in zip(ways, table.losses, strict=True))
        pinned = [
            table.split(name, other.recipe, round(share * other.experts))
            for name, share in shares
            for other in ways
            if name not in other.recipes and 0 < round(share * other.experts) < other.experts
        ]
        found.append((*whole, *table.splits(), *pinned))
    return tuple(found)


def _parts(shape: ModelShape, formats: Formats, cuts: Cuts, losses: Losses) -> tuple[Part, ...]:
    found = []
    for part in parts_of(shape, formats, cuts):
        lost = losses.of_part(shape, part, formats) if part.group not in FIXED else ()
        found.append(dataclasses.replace(part, recipes=(formats.name,), losses=lost))
    return tuple(found)


@lru_cache(maxsize=64)
def _table(
    shape: ModelShape, plain: tuple[Part, ...], choices: tuple[Formats, ...], losses: Losses, uses: Uses
) -> ExpertTable:
    return ExpertTable.of(shape, plain, choices, losses, dict(uses))
