"""Bytes of layers whose experts differ in format: those of each expert under the recipe of its own format."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.shape_library import load_shape
from passes.place.formats import Formats, formats_of
from passes.place.parts import Part, parts_of
from passes.quantize.recipe import read_recipe

RECIPES = {
    "w4a8-g32": "q4_sym<group=32, scale=f16>",
    "w8a8": "q8_sym<group=32, scale=f16>",
    "w2a8": "q2_sym<group=32, scale=f16>",
}


@settings(max_examples=6, deadline=None)
@given(chosen=st.lists(st.sampled_from(sorted(RECIPES)), min_size=64, max_size=64), named=st.booleans())
def test_every_expert_takes_the_bytes_of_its_format(chosen: list[str], named: bool) -> None:
    rules = []
    for recipe, format in RECIPES.items():
        numbers = [e for e, of in enumerate(chosen) if of == recipe]
        key = f"match = '.*experts\\.({'|'.join(map(str, numbers))})\\..*'" if named else ""
        key = key or f'experts = "{",".join(map(str, numbers))}"'
        rules += [f'[[rule]]\n{key}\nformat = "{format}"\n'] if numbers else []
    mixed = Formats("mixed", read_recipe("\n".join(rules), "mixed.toml"))
    uniform = {name: _experts(formats_of(name)) for name in RECIPES}
    found = _experts(mixed)
    assert found.nbytes * 64 == sum(uniform[name].nbytes for name in chosen)
    assert found.layers == tuple(range(16)) and found.expert_bytes == found.nbytes // 64
    assert all((name in chosen) == (format in found.format) for name, format in RECIPES.items())


def _experts(formats: Formats) -> Part:
    (part,) = (p for p in parts_of(load_shape("OLMoE-1B-7B-0924"), formats) if p.group == "experts")
    return part
