"""Recipes: what they say of a tensor, how several go together, and what is refused, with which words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from ir.formats import BF16
from ir.parse_value import parse_format
from passes.quantize.recipe import Choice, Recipe, Rule, load_recipe, read_recipe, shipped_recipes
from passes.quantize.recipe_formats import cache_type, is_int8

Q4, Q6, Q8 = (parse_format(f"q{bits}_sym<group=32, scale=f16>") for bits in (4, 6, 8))
SHIPPED = shipped_recipes()
INT8 = SHIPPED["w4a8-g32"].weights.activations
EXPECTED = {
    *("w8a8", "w6a8", "w5a8", "w4a8-g32", "w4a8-g128", "w4a16-g32", "w4a16-g128", "w3", "w2a8", "w1a8"),
    *("ternary", "nf4", "nl4", "mxfp4", "fp8", "w8a8-fp8", "pq2", "k4", "outliers16", "rotate64"),
    *("as-stored", "none", "kv8", "kv4", "kv2"),
}


def test_the_names_that_users_expect_are_there():
    assert set(SHIPPED) >= EXPECTED
    for name, recipe in SHIPPED.items():
        assert recipe.name == name and recipe.description


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_survive_their_text_form(name):
    recipe = SHIPPED[name]
    assert read_recipe(recipe.to_toml(), "again") == recipe


def test_low_bit_recipes_give_the_head_more_bits_and_leave_router_and_table_alone():
    recipe = SHIPPED["w4a8-g32"]
    assert is_int8(INT8)
    assert recipe.choice("model.layers.0.mlp.up_proj.weight", "mlp.up") == Choice(Q4, INT8)
    assert recipe.choice("lm_head.weight", "head") == Choice(Q6, INT8)
    assert recipe.choice("model.layers.0.mlp.gate.weight", "router") == Choice()
    assert recipe.choice("model.embed_tokens.weight", "embedding") == Choice()


def test_the_last_rule_that_fits_decides_key_by_key():
    text = """
        [weights]
        format = "q4_sym<group=32, scale=f16>"
        rounding = "nearest"
        [[rule]]
        role = "attention"
        format = "q6_sym<group=32, scale=f16>"
        [[rule]]
        match = '.*\\.(q|k)_proj\\.weight'
        rotate = 64
        [[rule]]
        role = "attention.k"
        match = 'model\\.layers\\.0\\..*'
        format = "q8_sym<group=32, scale=f16>"
        [[rule]]
        role = "router"
        format = "bf16"
    """
    recipe = read_recipe(text, "mine.toml")
    assert recipe.name == "mine"
    assert recipe.choice("model.layers.0.self_attn.k_proj.weight", "attention.k") == Choice(Q8, None, "nearest", 64)
    assert recipe.choice("model.layers.1.self_attn.k_proj.weight", "attention.k") == Choice(Q6, None, "nearest", 64)
    assert recipe.choice("model.layers.1.self_attn.v_proj.weight", "attention.v") == Choice(Q6, None, "nearest")
    assert recipe.choice("model.layers.1.mlp.up_proj.weight", "mlp.up") == Choice(Q4, None, "nearest")
    assert recipe.choice("model.layers.0.mlp.gate.weight", "router") == Choice(BF16)


def test_names_match_wholly_and_by_name_alone_nothing_that_is_held_back():
    recipe = read_recipe("[[rule]]\nmatch = '.*gate.*'\nformat = 'bf16'\n[[rule]]\nmatch = 'up'\nformat = 'bf16'", "r")
    assert recipe.choice("mlp.gate.weight", "mlp.gate") == Choice(BF16)
    assert recipe.choice("mlp.gate.weight", "router") == Choice()
    assert recipe.choice("mlp.up.weight", "mlp.up") == Choice()


def test_later_recipes_override_earlier_ones(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text('description = "int8 heads"\n[[rule]]\nrole = "head"\nformat = "q8_sym<group=32, scale=f16>"\n')
    both = load_recipe(f"w4a8-g32,{path}")
    assert both.name == "w4a8-g32,mine"
    assert both.description == f"{SHIPPED['w4a8-g32'].description}; int8 heads"
    assert both.choice("lm_head.weight", "head") == Choice(Q8, INT8)
    assert load_recipe(f"{path},w4a8-g32").choice("lm_head.weight", "head") == Choice(Q6, INT8)
    assert load_recipe(["none", "w8a8"]).weights == SHIPPED["w8a8"].weights


FAULTS = [
    ("[weights", "the recipe is no TOML: Expected ']' at the end of a table declaration"),
    ("[weight]\nformat = 'bf16'", "unknown key 'weight'; did you mean 'weights'?"),
    ("[weights]\nfromat = 'bf16'", "[weights]: unknown key 'fromat'; did you mean 'format'?"),
    ("name = 3", "name is 3"),
    ("weights = 'bf16'", "weights is 'bf16'"),
    ("[weights]\nformat = 'q4_sim<group=32, scale=f16>'", "[weights]: format = 'q4_sim<group=32, scale=f16>'"),
    (
        "[weights]\nformat = 'q9_sym<group=32, scale=f16>'",
        "format = 'q9_sym<group=32, scale=f16>': expected 1 to 8 bits",
    ),
    ("[weights]\nformat = 'i32'", "holds no weights"),
    ("[weights]\nformat = 'tensor<4 x f32>'", "format = 'tensor<4 x f32>'"),
    ("[weights]\nactivations = 'q4_sym<group=32, scale=f16>'", "cannot be made while a product runs"),
    ("[weights]\nactivations = 'stored'", "cannot be made while a product runs"),
    ("[weights]\nrounding = 'Mse'", "unknown rounding 'Mse'; did you mean 'mse'?"),
    ("[weights]\nrotate = 48", "rotate = 48"),
    ("[weights]\nrotate = true", "rotate is True"),
    ("[weights]\noutliers = -1", "outliers = -1"),
    ("[weights]\noutliers = 8\nrotate = 64", "rotate and outliers exclude each other"),
    ("[[rule]]\nformat = 'bf16'", "rule 1: it says not what it is about"),
    ("[[rule]]\nrole = 'head'", "rule 1: it says nothing"),
    ("[[rule]]\nrole = 'haed'\nformat = 'bf16'", "unknown role 'haed'; did you mean 'head'?"),
    ("[[rule]]\nrole = 'norm'\nformat = 'bf16'", "norms and biases stay f32"),
    ("[[rule]]\nmatch = 'a(b'\nformat = 'bf16'", "match is no regular expression: missing ), unterminated subpattern"),
    ("[[rule]]\nrole = 'embedding'\nformat = 'q4_sym<group=32, scale=f16>'", "an embedding is looked up"),
    ("rule = 3", "rule is 3"),
    ("rule = [3]", "rule holds 3"),
    ("[kv]\nbits = 8", "[kv]: unknown key 'bits'"),
    ("[kv]\nformat = 'q3_sym<group=row, scale=f16>'", "[kv]: format = 'q3_sym<group=row, scale=f16>': expected f32"),
    ("[kv]\nformat = 'bf16>, tensor<4 x f32'", "[kv]: format = 'bf16>, tensor<4 x f32'"),
    ("[kv]\nformat = 'bf16, rotat=64'", "[kv]: format = 'bf16, rotat=64': expected one each of rotate"),
    (
        "[weights]\nformat = 'bf16'\nactivations = 'q8_sym<group=32, scale=f32>'",
        "[weights]: q8_sym<group=32, scale=f32> activations cannot be multiplied by bf16 weights",
    ),
    (
        "[weights]\nformat = 'q8_sym<group=32, scale=f16>'\nactivations = 'f8e4m3<block=row, scale=f32>'",
        "f8e4m3<block=row, scale=f32> activations cannot be multiplied by q8_sym<group=32, scale=f16> weights",
    ),
    ("[weights]\nactivations = 'f8e5m2<block=row, scale=f32>'", "cannot be made while a product runs"),
    ("[weights]\nactivations = 'f8e4m3<block=2x64, scale=f32>'", "cannot be made while a product runs"),
]


@pytest.mark.parametrize(("text", "message"), FAULTS, ids=[m for _, m in FAULTS])
def test_refusals(text, message):
    with pytest.raises(DiagnosticError) as caught:
        read_recipe(text, "bad.toml")
    assert message in str(caught.value) and "bad.toml" in str(caught.value)


def test_a_bad_regular_expression_is_shown_where_it_is_bad():
    with pytest.raises(DiagnosticError, match=r"\n  a\(b\n   \^"):
        read_recipe("[[rule]]\nmatch = 'a(b'\nformat = 'bf16'", "r")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("w4a8-g23", "there is no recipe 'w4a8-g23'; did you mean 'w4a8-g32'?"),
        ("", "a recipe has no name in ''"),
        ("w8a8,,w3", "a recipe has no name in 'w8a8,,w3'"),
        ("./nowhere.toml", "the recipe cannot be read: No such file or directory"),
        ("../w8a8", "the recipe cannot be read"),
    ],
)
def test_names_that_are_not_there(text, message):
    with pytest.raises(DiagnosticError) as caught:
        load_recipe(text)
    assert message in str(caught.value)


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "r.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(DiagnosticError, match="no UTF-8 text"):
        load_recipe(str(path))
    path.write_bytes(b"#" * (5 << 20))
    with pytest.raises(DiagnosticError, match="too large"):
        load_recipe(str(path))


FORMATS = st.sampled_from([None, "stored", "float", BF16, Q4, Q8])
CHOICES = st.builds(
    Choice,
    FORMATS,
    st.sampled_from([None, "float", BF16]),
    st.sampled_from([None, "nearest", "mse"]),
    st.sampled_from([None, 0, 64]),
    st.sampled_from([None, 0, 16]),
).filter(lambda c: not (c.rotate and c.outliers))


def test_rotations_of_the_cache_fit_the_heads():
    kv4 = load_recipe("w4a8-g32,kv4").kv
    assert cache_type(kv4, 2, 128).rotate == 64
    assert cache_type(kv4, 2, 32).rotate == 32
    assert str(cache_type("bf16", 2, 80)) == "kv<2 x 80 x bf16>"


NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(
    NAMES.filter(bool),
    NAMES,
    CHOICES,
    st.lists(st.builds(Rule, CHOICES.filter(lambda c: c != Choice()), st.sampled_from(["head", "mlp.up"])), max_size=3),
)
def test_any_recipe_survives_its_text_form(name, description, weights, rules):
    recipe = Recipe(name, description, weights, tuple(rules), "bf16")
    assert read_recipe(recipe.to_toml(), "again") == recipe
