"""The bits solver: its optimum is that of trying everything, its bound holds, and budgets that are too small say so."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from passes.quantize.bits_solver import Choice, Group, assess, smallest_bytes, solve, uniform_solutions

losses = st.one_of(st.just(0.0), st.floats(1e-9, 1e3), st.integers(0, 5).map(float))
choices = st.lists(
    st.builds(Choice, st.sampled_from(["q2", "q3", "q4", "q8"]), st.integers(0, 40), losses), min_size=1, max_size=4
)
problems = st.lists(choices, min_size=1, max_size=5).map(
    lambda lists: [Group(f"g{i}", tuple(c)) for i, c in enumerate(lists)]
)


def least_loss(groups: list[Group], budget: int) -> float:
    """By trying every assignment."""
    every = (assess(groups, picks) for picks in itertools.product(*(range(len(g.choices)) for g in groups)))
    return min((s.loss for s in every if s.nbytes <= budget), default=math.inf)


@given(problems, st.integers(0, 160))
def test_optimum_is_that_of_trying_everything(groups: list[Group], budget: int) -> None:
    wanted = least_loss(groups, budget)
    if math.isinf(wanted):
        assert smallest_bytes(groups) > budget
        with pytest.raises(DiagnosticError):
            solve(groups, budget)
        return
    found = solve(groups, budget)
    assert found == assess(groups, found.picks, found.bound)
    assert found.nbytes <= budget
    assert found.loss == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert found.bound <= wanted * (1 + 1e-9)
    assert found.gap <= 1e-9 or wanted < 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_optimum_where_choices_compete(seed: int) -> None:
    """Sizes and losses of which the relaxation alone seldom finds the best assignment."""
    rng = random.Random(seed)
    for _ in range(25):
        groups = [
            Group(
                f"g{i}",
                tuple(
                    Choice(f"q{j}", size, rng.uniform(0.8, 1.2) / (1 + size))
                    for j, size in enumerate(rng.sample(range(3, 60), 4))
                ),
            )
            for i in range(5)
        ]
        low, high = smallest_bytes(groups), sum(max(c.nbytes for c in g.choices) for g in groups)
        budget = rng.randint(low, high)
        found = solve(groups, budget)
        assert found.loss == pytest.approx(least_loss(groups, budget), rel=1e-9)
        assert found.nbytes <= budget and found.gap == 0


@given(problems, st.integers(0, 160), st.integers(0, 40))
def test_more_room_never_loses_more(groups: list[Group], budget: int, more: int) -> None:
    if smallest_bytes(groups) <= budget:
        assert solve(groups, budget + more).loss <= solve(groups, budget).loss * (1 + 1e-9)


@given(problems, st.integers(0, 160))
def test_no_uniform_assignment_within_the_budget_is_better(groups: list[Group], budget: int) -> None:
    for uniform in uniform_solutions(groups).values():
        if uniform.nbytes <= budget:
            assert solve(groups, budget).loss <= uniform.loss * (1 + 1e-9)


@given(problems)
def test_room_for_all_gives_each_its_least_loss(groups: list[Group]) -> None:
    found = solve(groups, 10_000)
    assert found.loss == math.fsum(min(c.loss for c in g.choices) for g in groups)
    assert found.gap == 0.0


def model(layers: int, seed: int) -> list[Group]:
    """A model of `layers` layers whose losses fall fourfold with every bit, each group with a weight of its own."""
    rng = random.Random(seed)
    groups = []
    for layer in range(layers):
        for part, size in (("qkv", 6 << 20), ("o", 4 << 20), ("gate_up", 22 << 20), ("down", 11 << 20)):
            gain = math.exp(rng.gauss(0, 1))
            made = [
                Choice(f"q{b}g{g}", size * b // 8 + size // g * 2, gain * 4.0**-b * rng.uniform(1, 1.3) * g**0.25)
                for b in (2, 3, 4, 5, 6, 8)
                for g in (32, 64, 128)
            ]
            groups.append(Group(f"layers.{layer}.{part}", (*made, Choice("bf16", 2 * size, 0.0))))
    return groups


@pytest.mark.parametrize("budget_bits", [2.3, 3.5, 4.25, 6.0])
def test_large_models_are_solved_near_their_bound(budget_bits: float) -> None:
    groups = model(48, seed=7)
    size = sum(g.choices[-1].nbytes for g in groups) // 2
    budget = int(size * budget_bits / 8)
    found = solve(groups, budget)
    assert found.nbytes <= budget
    assert found.gap < 1e-4
    assert found == solve(groups, budget)
    assert all(found.loss <= u.loss for u in uniform_solutions(groups).values() if u.nbytes <= budget)


def test_a_budget_below_the_smallest_size_names_it() -> None:
    groups = [Group("a", (Choice("q2", 100, 1.0), Choice("q4", 200, 0.5))), Group("b", (Choice("q2", 50, 1.0),))]
    with pytest.raises(DiagnosticError) as caught:
        solve(groups, 149)
    assert "150 bytes or more" in str(caught.value.diagnostics[0].render())
    assert solve(groups, 150).picks == (0, 0)


def test_a_limit_on_nodes_leaves_a_bound_that_holds() -> None:
    groups = model(48, seed=3)
    budget = sum(g.choices[-1].nbytes for g in groups) // 5
    quick, full = solve(groups, budget, max_nodes=1), solve(groups, budget)
    assert quick.bound <= full.loss * (1 + 1e-9) <= quick.loss * (1 + 2e-9)


def test_choices_are_checked() -> None:
    with pytest.raises(ValueError, match="finite loss"):
        Group("a", (Choice("q2", 1, math.nan),))
    with pytest.raises(ValueError, match="no choice"):
        Group("a", ())
