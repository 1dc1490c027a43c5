"""From sensitivities to a recipe: the best of what was compared is taken, and the recipe says exactly that again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ir
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, GroupedIntFormat
from passes.quantize.bit_choice import Assignment, BitChoice, BitProblem, Checked, choose
from passes.quantize.bit_recipe import candidates_of, pattern_of, recipe_of
from passes.quantize.bit_report import report_of
from passes.quantize.bits_solver import assess
from passes.quantize.recipe import load_recipe, read_recipe
from passes.quantize.sensitivity_table import Candidate, Entry, SensitivityTable
from passes.quantize.weight_groups import WeightGroup, joined_products

Q8 = GroupedIntFormat(8, 32, False, F32)
CANDIDATES = (
    *(Candidate(GroupedIntFormat(b, g), Q8) for b, g in ((2, 32), (4, 32), (4, 128), (8, 32))),
    Candidate(BF16),
)


def attention(layer: int) -> WeightGroup:
    stem = f"model.layers.{layer}.self_attn"
    tensors = tuple(f"{stem}.{p}_proj.weight" for p in "qkv")
    return WeightGroup(f"{stem}.qkv", "attention", ("attention.q", "attention.k", "attention.v"), tensors, (192, 128))


def experts(layer: int, count: int = 12) -> WeightGroup:
    stem = f"model.layers.{layer}.mlp.experts"
    tensors = tuple(f"{stem}.{e}.{p}_proj.weight" for p in ("gate", "up") for e in range(count))
    return WeightGroup(f"{stem}.gate_up", "experts", ("experts.gate", "experts.up"), tensors, (count, 128, 128))


def down(layer: int) -> WeightGroup:
    name = f"model.layers.{layer}.mlp.down_proj"
    return WeightGroup(name, "mlp", ("mlp.down",), (f"{name}.weight",), (128, 96))  # no groups of 128


HEAD = WeightGroup("model.embed_tokens", "head", ("head",), ("model.embed_tokens.weight",), (512, 128))
GROUPS = (*(make(layer) for layer in range(11) for make in (attention, experts, down)), HEAD)


def table_of(groups: tuple[WeightGroup, ...]) -> SensitivityTable:
    """Losses that fall with the bits, larger for the head and early layers."""
    table = SensitivityTable()
    for group in groups:
        gain = 5.0 if group.role == "head" else 1.0 / (1 + (group.layer or 0))
        for candidate in CANDIDATES:
            if candidate.fits(group):
                bits = 8 * candidate.weights.nbytes(group.shape) / group.count
                loss = gain * 4.0**-bits
                table.add([Entry(group.name, str(candidate), loss, loss, "measured")])
    return table


PROBLEM = BitProblem.of(GROUPS, CANDIDATES, table_of(GROUPS))


@given(st.lists(st.integers(0, 4), min_size=len(GROUPS), max_size=len(GROUPS)))
def test_a_recipe_says_the_choice_again(numbers: list[int]) -> None:
    picks = [n % len(g.choices) for n, g in zip(numbers, PROBLEM.problem, strict=True)]
    solution = assess(PROBLEM.problem, picks)
    choice = BitChoice(PROBLEM, 1 << 30, solution, None, (Checked("solver", solution, None),))
    recipe = recipe_of(choice)
    assert read_recipe(recipe.to_toml(), "again.toml") == recipe
    for group in GROUPS:
        wanted = choice.assignment[group.name]
        roles = group.parts if len(group.parts) > 1 else group.parts * len(group.tensors)
        for at, tensor in enumerate(group.tensors):
            found = recipe.choice(tensor, roles[at * len(roles) // len(group.tensors)])
            assert (found.format, found.activations) == (wanted.weights, wanted.activations)


@given(st.integers(0, 12), st.sets(st.integers(0, 30), min_size=1, max_size=4))
def test_patterns_fit_their_tensors_and_no_others(layer: int, others: set[int]) -> None:
    for make in (attention, experts, down):
        pattern = pattern_of(make(layer).tensors)
        assert all(re.fullmatch(pattern, t) for t in make(layer).tensors)
        for group in (g(other) for other in others - {layer} for g in (attention, experts, down)):
            assert not any(re.fullmatch(pattern, t) for t in group.tensors)
    assert re.fullmatch(pattern_of(("a.b+c", "d")), "a.b+c")


def test_budgets_are_kept_and_the_best_that_was_measured_is_taken() -> None:
    budget = int(PROBLEM.count * 4.5 / 8)
    modelled = choose(PROBLEM, budget)
    assert modelled.winner.name == "solver" and modelled.winner.solution.nbytes <= budget
    asked = []

    def measure(assignment: Assignment) -> float:
        asked.append(assignment)
        uniform = len(set(map(str, assignment.values()))) == 1
        return 0.25 if uniform else 0.5

    measured = choose(PROBLEM, budget, measure)
    assert measured.winner.name == str(CANDIDATES[1])  # as it was measured to be better, whatever the model says
    assert set(map(str, measured.assignment.values())) == {str(CANDIDATES[1])}
    assert len(asked) == len(measured.checked) >= 4
    assert all(c.solution.nbytes <= budget for c in measured.checked)
    assert measured.solved == modelled.solved


def test_room_for_bf16_gives_bf16() -> None:
    found = choose(PROBLEM, 2 * PROBLEM.count)
    assert {c.weights for c in found.assignment.values()} == {BF16}
    assert "enough for bf16" in report_of(found, "text", 5)[0]


def test_too_small_a_budget_is_refused() -> None:
    smallest = PROBLEM.smallest()
    assert choose(PROBLEM, smallest.budget).winner.solution.picks == smallest.winner.solution.picks
    with pytest.raises(DiagnosticError) as caught:
        choose(PROBLEM, smallest.budget - 1)
    assert str(smallest.budget) in caught.value.diagnostics[0].render()


def test_a_group_that_nothing_fits_is_named() -> None:
    with pytest.raises(DiagnosticError, match="rows of 96 weights"):
        BitProblem.of(GROUPS, CANDIDATES[2:3], table_of(GROUPS))


def test_the_report_accounts_for_everything() -> None:
    budget = int(PROBLEM.count * 4.25 / 8)
    choice = choose(PROBLEM, budget, lambda assignment: 0.125)
    text, facts = report_of(choice, "held_out.txt", 12345)
    assert sum(row["weights"] for row in facts["rows"]) == PROBLEM.count
    assert sum(row["bytes"] for row in facts["rows"]) == facts["bytes"] <= budget
    assert sum(row["loss"] for row in facts["rows"]) == pytest.approx(facts["modelled_loss"])
    assert sum(row["tensors"] for row in facts["rows"]) == sum(len(g.tensors) for g in GROUPS)
    assert facts["bound"] <= choice.solved.loss
    assert facts["more"]["modelled_loss"] < choice.solved.loss
    for words in ("4.2", "held_out.txt", "12345 bytes", "0.125", "taken", "10 % more bytes would buy", "head"):
        assert words in text


def test_candidates_are_those_of_the_recipes() -> None:
    default = candidates_of(None)
    assert len(set(default)) == len(default) and default[-1] == Candidate(BF16)
    assert {c.weights.bits for c in default} == {2, 3, 4, 5, 6, 8, 16}
    found = candidates_of("w4a16-g128,w3")
    assert Candidate(GroupedIntFormat(4, 128), BF16) in found
    assert GroupedIntFormat(3, 32, False, F16) in [c.weights for c in found]
    assert all(c.activations == BF16 for c in found if c.weights == GroupedIntFormat(4, 128))


def test_recipes_that_do_more_than_choose_formats_are_no_candidates(tmp_path: Path) -> None:
    path = tmp_path / "rotated.toml"
    path.write_text('[weights]\nformat = "q4_sym<group=32, scale=f16>"\nrotate = 32\n')
    with pytest.raises(DiagnosticError, match="rotations or outlier columns"):
        candidates_of(str(path))


def test_embedding_and_cache_of_the_base_are_kept() -> None:
    base = read_recipe('[[rule]]\nrole = "embedding"\nformat = "f16"\n[kv]\nformat = "f16"\n', "base.toml")
    recipe = recipe_of(PROBLEM.smallest(), base)
    assert recipe.kv == "f16"
    assert str(recipe.choice("model.embed_tokens.weight", "embedding").format) == "f16"
    assert recipe.choice("model.embed_tokens.weight", "head").format == GroupedIntFormat(2, 32)
    assert load_recipe("w4a8-g32").weights.format in [c.weights for c in candidates_of("w4a8-g32")]


QUANTIZED = """\
func @step(%x: tensor<4 x 32 x f32>) -> tensor<4 x 8 x f32> {
  %c = tensor.constant {symbol = @w.codes} : () -> tensor<8 x 32 x u8>
  %s = tensor.constant {symbol = @w.scales} : () -> tensor<8 x 1 x f16>
  %q = quant.assemble %c, %s {format = q4_sym<group=32, scale=f16>}
      : (tensor<8 x 32 x u8>, tensor<8 x 1 x f16>) -> tensor<8 x 32 x q4_sym<group=32, scale=f16>>
  %w = quant.dequantize %q : (tensor<8 x 32 x q4_sym<group=32, scale=f16>>) -> tensor<8 x 32 x f32>
  %y = gemm.matmul %x, %w : (tensor<4 x 32 x f32>, tensor<8 x 32 x f32>) -> tensor<4 x 8 x f32>
  return %y : tensor<4 x 8 x f32>
}
"""


def test_weights_that_are_low_bit_numbers_already_are_left_to_the_checkpoint() -> None:
    with pytest.raises(DiagnosticError, match="low-bit numbers already"):
        joined_products(ir.parse(QUANTIZED), {})
