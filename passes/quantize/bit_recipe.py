"""Between recipes and the bits solver: which formats it may use, and its choice as a recipe.

    candidates_of("w3,w4a8-g32,w6a8")       # the formats of these recipes, and bf16
    recipe_of(choice, base)                 # groups of one pattern and format become one rule

`candidates_of` takes what `--recipe` names: every format of weights that the recipes speak of becomes a candidate with
the activations that go with it; without recipes it is integers of 2 to 8 bits in groups of 32, 64 and 128 with int8
activations. `recipe_of` keeps what the base says of embeddings, routers and the KV cache.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping

from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, GroupedIntFormat, NumberFormat, PlainFormat
from ir.parse_value import parse_format
from passes.quantize.bit_choice import BitChoice
from passes.quantize.expert_ranges import ranges_of
from passes.quantize.recipe import HELD_BACK, Choice, Recipe, Rule, load_recipe
from passes.quantize.sensitivity_table import Candidate
from passes.quantize.weight_groups import WeightGroup

INT8 = "q8_sym<group=128, scale=f32>"
WIDTHS = {2: (32, 64), 3: (32, 64, 128), 4: (32, 64, 128), 5: (32, 64), 6: (32, 64), 8: (32,)}  # bits: groups


def candidates_of(recipe: str | None) -> tuple[Candidate, ...]:
    """The candidates by what `--recipe` says, None for the default ones; bf16 is always the last."""
    found: dict[Candidate, None] = {}
    if recipe is None:
        activations = parse_format(INT8)
        for bits, groups in WIDTHS.items():
            for group in groups:
                found[Candidate(GroupedIntFormat(bits, group, False, F16), activations)] = None
    else:
        for part in recipe.split(","):
            found.update(dict.fromkeys(_mentioned(load_recipe(part))))
    found.pop(Candidate(BF16), None)
    return (*found, Candidate(BF16))


def _mentioned(recipe: Recipe) -> Iterator[Candidate]:
    """The pairs of formats that the weights of products get by a recipe."""
    for choice in (recipe.weights, *(r.choice.over(recipe.weights) for r in recipe.rules if r.role not in HELD_BACK)):
        weights, activations = choice.format, choice.activations
        if choice.rotate or choice.outliers:
            raise DiagnosticError(
                f"recipe {recipe.name!r} has rotations or outlier columns, which a budget does not choose among",
                expected="recipes of formats",
                hint="save the recipe that is found with --save-recipe, and add `rotate` or `outliers` to it",
            )
        if isinstance(weights, NumberFormat):
            given = activations if isinstance(activations, NumberFormat) else BF16
            plain = isinstance(weights, PlainFormat)
            yield Candidate(weights, BF16 if plain else given, choice.rounding or "mse")


def recipe_of(choice: BitChoice, base: Recipe | None = None) -> Recipe:
    """The recipe that makes this choice again. Its name says the bits; equal choices give equal texts."""
    assignment, groups = choice.assignment, choice.problem.groups
    weights: dict[Candidate, int] = {}
    for group in groups:
        weights[assignment[group.name]] = weights.get(assignment[group.name], 0) + group.count
    common = max(weights, key=lambda c: (weights[c], str(c)))
    bits = choice.problem.bits(choice.winner.solution)
    kept = tuple(rule for rule in base.rules if rule.role in HELD_BACK) if base is not None else ()
    return Recipe(
        name=f"{bits:.4g}-bits",
        description=f"formats of {len(groups)} groups of weights chosen for {bits:.4g} bits per weight",
        weights=_choice(common),
        rules=(*kept, *_rules(groups, assignment, common)),
        kv=base.kv if base is not None else "",
    )


def _choice(candidate: Candidate) -> Choice:
    plain = isinstance(candidate.weights, PlainFormat)
    return Choice(candidate.weights, candidate.activations, None if plain else candidate.rounding)


def _rules(groups: tuple[WeightGroup, ...], assignment: Mapping[str, Candidate], common: Candidate) -> Iterator[Rule]:
    """A rule for all layers whose groups of one kind have one candidate that is not the common one."""
    layers: dict[tuple[str, Candidate, Ranges], list[int]] = {}
    for group, candidate, experts in _together(groups, assignment):
        if candidate == common:
            continue
        if group.role == "head":
            yield Rule(_choice(candidate), role="head")
        elif group.layer is None:
            yield Rule(_choice(candidate), match=pattern_of(group.tensors), experts=experts)
        else:
            key = pattern_of(group.tensors, layer_mark=_LAYER), candidate, experts
            layers.setdefault(key, []).append(group.layer)
    for (pattern, candidate, experts), numbers in layers.items():
        which = "|".join(map(str, numbers))
        match = pattern.replace(_LAYER, f"({which})" if len(numbers) > 1 else which)
        yield Rule(_choice(candidate), match=match, experts=experts)


def _together(
    groups: tuple[WeightGroup, ...], assignment: Mapping[str, Candidate]
) -> Iterator[tuple[WeightGroup, Candidate, Ranges]]:
    """Every group with its candidate; of stacks whose experts are groups, the stack for each of their candidates, with
    the numbers of the experts, none where that is all of them."""
    stacks: dict[str, tuple[WeightGroup, dict[Candidate, list[int]]]] = {}
    for group in groups:
        stack = group.of or group
        _, experts = stacks.setdefault(stack.name, (stack, {}))
        experts.setdefault(assignment[group.name], []).extend([] if group.of is None else [group.expert])
    for stack, chosen in stacks.values():
        for candidate, experts in chosen.items():
            yield stack, candidate, ranges_of(experts) if len(chosen) > 1 else ()


Ranges = tuple[tuple[int, int], ...]
_LAYER = "<layer>"


def pattern_of(tensors: tuple[str, ...], layer_mark: str = "") -> str:
    """A regular expression that fits the names wholly: words in which they differ as alternatives, numbers as digits.

    With `layer_mark` it stands for the number of the layer.
    """
    split = [name.split(".") for name in tensors]
    if len({len(words) for words in split}) > 1:
        return "|".join(re.escape(name) for name in tensors)
    found = []
    for before, column in itertools.pairwise([(), *zip(*split, strict=True)]):
        words = tuple(dict.fromkeys(column))
        if layer_mark and before and before[0] == "layers" and len(words) == 1:
            found.append(layer_mark)
        elif len(words) == 1:
            found.append(re.escape(words[0]))
        else:
            numbers = all(w.isdecimal() for w in words)
            found.append("[0-9]+" if numbers else f"({'|'.join(re.escape(w) for w in words)})")
    return r"\.".join(found)
