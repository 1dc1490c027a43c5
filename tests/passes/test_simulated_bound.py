"""A simulated step is never below its closed form, whatever is in the caches: no slack but that of floats."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hw_targets.expert_outcomes import Lacking, even_misses
from ir.diagnostics import DiagnosticError
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.missed_experts import expected_misses
from passes.place.option import Option
from passes.place.outcome import Choice, evaluate
from passes.place.problem import Problem, Session
from passes.place.solve import choices_of
from passes.schedule.placed_plan import step_seconds
from tests.passes.place.machines import sparse, tight_machines


@st.composite
def groups(draw: st.DrawFn) -> Lacking:
    count = draw(st.sampled_from([1, 2, 8]))
    chances = expected_misses(count, draw(st.floats(0, 1)) ** draw(st.sampled_from([1, 8])))
    kinds = draw(st.sampled_from([(), tuple(min(i, 2) for i in range(count))]))
    return Lacking(draw(st.integers(1, 6)), chances, kinds)


@settings(max_examples=60, deadline=None)
@given(st.lists(groups(), min_size=1, max_size=3), st.integers(1, 5), st.integers(0, 99))
def test_as_many_are_drawn_as_are_expected(caches: list[Lacking], steps: int, seed: int) -> None:
    misses, weights = even_misses(caches, steps, seed)
    assert weights.min() > 0 and weights.sum() == pytest.approx(1.0, rel=1e-12) and misses.min() >= 0
    first = kinds_of_all = 0
    for group in caches:
        mine = misses[:, first : first + group.caches]
        assert mine.max() <= len(group.chances)
        first += group.caches
        kinds = np.array(group.kinds or (0,) * len(group.chances))
        for kind in sorted(set(kinds.tolist())):
            upto = np.concatenate([[0], np.cumsum(kinds == kind)])
            expected = group.caches * np.array(group.chances)[kinds == kind].sum()
            assert weights @ upto[mine].sum(axis=1) == pytest.approx(expected, rel=1e-7, abs=1e-7)
            kinds_of_all += 1
    assert len(misses) <= steps + kinds_of_all + 1
    again, same = even_misses(caches, steps, seed)
    assert (again == misses).all() and (same == weights).all()


def test_chances_that_are_none() -> None:
    with pytest.raises(ValueError, match="chances from 0 to 1"):
        even_misses([Lacking(1, (1.5,))], 1)


@st.composite
def mixtures(draw: st.DrawFn) -> tuple[Problem, Choice]:
    """A small mixture whose experts lie anywhere, mostly in slots, missing ones brought or computed where they lie; the
    rest stays in memory, layers that are alike maybe in two ways."""
    top_k, hit = draw(st.sampled_from([1, 2, 4])), draw(st.floats(0, 1))
    shape = sparse(draw(st.integers(1, 3)), experts=draw(st.sampled_from([8, 16])), top_k=top_k)
    batch = draw(st.sampled_from([1, 2, 5]))
    use = Session(256, batch, 64, 64, depth=draw(st.sampled_from([1, 2, 3])), micro_batches=draw(st.integers(1, batch)))
    machine = machine_of(draw(tight_machines()))
    problem = Problem(shape, machine, formats_of(""), use, cached=lambda *_: hit)
    choice: list[tuple[Option, int]] = []
    for found in choices_of(problem):
        if not found[0].part.experts:
            near = {unit.name: unit.tier for unit in machine.units}
            found = [o for o in found if o.mode == "resident" and o.home in machine.tiers]
            found = [o for o in found if not o.kv_home or o.kv_home == near[o.kv_unit]]
        elif draw(st.booleans()):
            found = [option for option in found if option.mode == "cached"]
        layers = found[0].part.count
        first = layers if found[0].part.experts else draw(st.integers(0, layers))
        choice += [(draw(st.sampled_from(found)), count) for count in (first, layers - first) if count]
    return problem, tuple(choice)


@settings(max_examples=25, deadline=None)
@given(mixtures(), st.integers(1, 4), st.integers(0, 9), st.sampled_from(["units", "even"]))
def test_no_step_of_a_mixture_is_shorter_than_its_closed_form(
    mixture: tuple[Problem, Choice], samples: int, seed: int, order: str
) -> None:
    problem, choice = mixture
    try:
        seconds = step_seconds(problem, choice, samples=samples, seed=seed, order=order)
    except DiagnosticError as fault:
        assert "stream through it at once" in str(fault)
        return
    assert seconds >= evaluate(problem, choice).decode.seconds * (1 - 1e-7)  # whole bytes and operations in the plan
