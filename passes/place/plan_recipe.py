"""The formats of a plan as a recipe that `build --recipe` takes.

    recipe = recipe_of_plan(placement)
    Path("plan.toml").write_text(recipe.to_toml())

For each recipe that the plan uses and each group of layers that uses it, its rules for that group become rules for the
tensors of these layers by name; those of single experts follow, with their numbers. What the recipe asked for says of
embeddings, routers and the KV cache is kept. Layers are told apart by the number behind `layers.`, `h.` or `blocks.` in
the names of tensors.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ir.diagnostics import DiagnosticError
from passes.place.kv_formats import kv_mixed
from passes.place.placement import PlacedExperts, Placement, layer_numbers
from passes.quantize.expert_ranges import read_ranges
from passes.quantize.recipe import FLOAT, HELD_BACK, Choice, Recipe, Rule, load_recipe

_GROUPS = ("attention", "mlp", "experts", "head")


def recipe_of_plan(placement: Placement) -> Recipe:
    """The recipe that stores every tensor as the plan has it; that of the plan itself where nothing was chosen."""
    if kv_mixed(placement):
        raise DiagnosticError(
            "the plan keeps caches in several formats, and a model is built with one", where="--save-recipe",
            expected="a plan with one format of --kv-formats, or --recipe NAME,kv8",
        )  # fmt: skip
    kv = _kv_of(placement)
    if placement.quality is None and kv and not placement.recipe:
        return Recipe("plan-kv", f"floats and a cache as chosen for {placement.target}", kv=kv)
    if placement.quality is None:
        if not placement.recipe:
            raise DiagnosticError(
                f"the plan keeps all weights in {placement.dtype}: there is no recipe to write",
                expected="a plan made with --recipe or --formats",
            )
        recipe = load_recipe(placement.recipe)
        return replace(recipe, kv=kv) if kv else recipe
    base = load_recipe(placement.recipe) if placement.recipe else Recipe("")
    rules = [rule for rule in base.rules if rule.role in HELD_BACK]
    for group in _GROUPS:
        by_recipe: dict[str, list[int]] = {}
        for entry in placement.groups:
            if entry.group == group:
                by_recipe.setdefault(entry.recipe or placement.recipe, []).extend(layer_numbers(entry.layers))
        for name, layers in by_recipe.items():
            where = _pattern(layers) if len(by_recipe) > 1 else ""
            rules += _rules(load_recipe(name), group, where) if name else []
    for entry in placement.expert_formats:
        rules += _of_experts(entry)
    bits = f"{placement.quality.bits:.4g}"
    used = ", ".join(dict.fromkeys(e.recipe for e in (*placement.groups, *placement.expert_formats) if e.recipe))
    return Recipe(
        f"plan-{bits}-bits", f"{used} as chosen for {placement.target}, {bits} bits a weight", rules=tuple(rules),
        kv=kv or base.kv,
    )  # fmt: skip


def _kv_of(placement: Placement) -> str:
    """The chosen format of the cache; "" for floats, and where none was chosen."""
    if placement.kv_quality is None or not placement.kv or placement.kv[0].format == placement.dtype:
        return ""
    return placement.kv[0].format


def _rules(recipe: Recipe, group: str, where: str) -> Iterator[Rule]:
    """What a recipe says of a group, for the tensors that `where` fits."""
    if recipe.weights != Choice():
        yield Rule(recipe.weights, group, where)
    for rule in recipe.rules:
        if rule.role == group or rule.role.startswith(f"{group}."):
            yield Rule(rule.choice, rule.role, where)


def _of_experts(entry: PlacedExperts) -> Iterator[Rule]:
    """The rules for some experts of some layers."""
    experts, where = read_ranges(entry.experts), _pattern(layer_numbers(entry.layers))
    recipe = load_recipe(entry.recipe) if entry.recipe else Recipe("", weights=Choice(format=FLOAT))
    for rule in _rules(recipe, "experts", where):
        yield replace(rule, experts=experts or ())


def _pattern(layers: list[int]) -> str:
    numbers = "|".join(map(str, sorted(layers)))
    return rf"(.*\.)?(layers|h|blocks)\.({numbers})\..*"
