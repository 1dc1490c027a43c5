"""Formats of single experts in a plan: as entries, layer by layer, and back to the ways to store a part.

    entries = expert_entries([(option.part, layers), ...])      # of `Placement.expert_formats`
    said = said_of(problem, placement.expert_formats)
    for part, layers in stored_as(problem, ways, entry, layers, said): ...

An entry names experts of some layers by number (`0-3,8`) and their recipe; all others of these layers have that of the
entry of the group. Refuses layers without experts, experts that are not there, and recipes that the plan does not list.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from ir.diagnostics import DiagnosticError
from passes.place.parts import Part
from passes.place.placement import Placed, PlacedExperts, layer_numbers, span
from passes.place.problem import Problem
from passes.quantize.expert_ranges import ranges_of, ranges_text, read_ranges

Said = Mapping[int, Mapping[int, str]]  # by layer: the recipes of the experts that are named


def expert_entries(stored: Iterable[tuple[Part, tuple[int, ...]]]) -> tuple[PlacedExperts, ...]:
    """The entries of parts and the layers that are stored so; none of layers whose experts share a format."""
    named: dict[tuple[str, str], list[int]] = {}
    for part, layers in stored:
        for layer in layers if part.mix is not None else ():
            assert part.mix is not None
            for recipe, experts in part.mix.named(part.layers.index(layer)):
                named.setdefault((ranges_text(ranges_of(experts)), recipe), []).append(layer)
    found = [PlacedExperts(span(tuple(sorted(layers))), text, recipe) for (text, recipe), layers in named.items()]
    return tuple(sorted(found, key=lambda entry: (layer_numbers(entry.layers), entry.recipe)))


def said_of(problem: Problem, entries: Sequence[PlacedExperts]) -> Said:
    """What entries say of each layer; of two that name an expert the first decides."""
    found: dict[int, dict[int, str]] = {}
    for entry in entries:
        ranges = read_ranges(entry.experts)
        for layer in layer_numbers(entry.layers):
            count = problem.shape.layers[layer].mlp.experts if layer < len(problem.shape.layers) else 0
            if not count or not ranges or max(last for _, last in ranges) >= count:
                raise DiagnosticError(
                    f"the plan names experts {entry.experts!r} of layer {layer}",
                    expected=f"some of 0-{count - 1}, such as 0-3,8" if count else "a layer with experts",
                )
            mine = found.setdefault(layer, {})
            for first, last in ranges:
                for expert in range(first, last + 1):
                    mine.setdefault(expert, entry.recipe)
    if found and problem.menu is None:
        raise DiagnosticError(
            "the plan gives experts formats of their own, and lists none to choose among",
            expected="`quality.formats` with the recipes that `expert_formats` names",
        )
    return found


def stored_as(
    problem: Problem, ways: tuple[Part, ...], entry: Placed, layers: Sequence[int], said: Said
) -> list[tuple[Part, tuple[int, ...]]]:
    """The ways to store a part that an entry names, each with its layers; () where the part has none."""
    mixed = [layer for layer in layers if entry.group == "experts" and said.get(layer)]
    others = tuple(layer for layer in layers if layer not in mixed)
    found: list[tuple[Part, tuple[int, ...]]] = []
    if others or not layers:
        found.append((_whole(ways, entry), others))
    if mixed and problem.menu is not None:
        base = entry.recipe or problem.formats.name
        table = problem.menu.table(problem.shape, ways)
        alike: dict[tuple[str, ...], list[int]] = {}
        for layer in mixed:
            order = table.orders[ways[0].layers.index(layer)]
            alike.setdefault(tuple(said[layer].get(expert, base) for expert in order), []).append(layer)
        for by_rank, numbers in alike.items():
            recipes = sorted(dict.fromkeys(by_rank), key=lambda name: name == base)  # that of all others last
            if len(recipes) == 1:
                part = _way(ways, recipes[0], entry)
            else:
                part = table.mixed(recipes, [recipes.index(name) for name in by_rank])
            found.append((part, tuple(numbers)))
    return found


def _whole(ways: tuple[Part, ...], entry: Placed) -> Part:
    """The way to store a part that an entry names; the first where it names none."""
    return _way(ways, entry.recipe, entry) if entry.recipe else ways[0]


def _way(ways: tuple[Part, ...], recipe: str, entry: Placed) -> Part:
    for part in ways:
        if recipe in part.recipes:
            return part
    raise DiagnosticError(
        f"the plan stores {entry.group} {entry.layers} as {recipe!r}".replace("  ", " "),
        expected=" or ".join(repr(name) for part in ways for name in part.recipes) or "no recipe: the plan lists none",
        hint="`quality.formats` of the plan lists what may be chosen",
    )
