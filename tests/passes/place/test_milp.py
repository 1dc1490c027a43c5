"""The mixed-integer program: how much a search may take, counted and not timed, and the gap of one that was ended."""

from __future__ import annotations

import dataclasses
from typing import Any

import highspy
import pytest

from passes.place import milp
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.milp import FEW_NODES, MANY_NODES, solve_counts
from passes.place.outcome import evaluate
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.solve import choices_of, solve
from tests.passes.place.machines import MIB, sparse, target


def mixture() -> Problem:
    """Two layers of 16 experts that take turns with two micro-batches, attention by the CPU."""
    machine = machine_of(target(vram=4 * MIB, dram=9 * MIB, link=3e8))
    shape, use = sparse(2, experts=16, top_k=1), Session(256, 2, 64, 64, micro_batches=2)
    base = Problem(shape, machine, formats_of(""), use, cached=lambda *_: 0.45)
    return dataclasses.replace(base, pins=(parse_pin("attention=cores", shape, machine),))


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, bool]]:
    """Of every search its nodes, its iterations of the simplex method, and whether it was ended by checks."""
    found: list[tuple[int, int, bool]] = []

    class Counted(highspy.Highs):
        def run(self, *given: Any) -> Any:
            status = super().run(*given)
            info, ended = self.getInfo(), self.getModelStatus() == highspy.HighsModelStatus.kInterrupt
            found.append((info.mip_node_count, info.simplex_iteration_count, ended))
            return status

    monkeypatch.setattr(highspy, "Highs", Counted)
    return found


def test_a_tiny_mixture_with_turns_takes_few_iterations(searches: list[tuple[int, int, bool]]) -> None:
    found = solve(mixture(), FEW_NODES)
    assert 1 <= len(searches) <= 16
    assert not any(ended for _, _, ended in searches)
    assert max(nodes for nodes, _, _ in searches) <= FEW_NODES
    assert sum(iterations for _, iterations, _ in searches) <= 20_000
    assert found.outcome.fits and found.gap <= 5e-3


def test_a_search_that_is_ended_keeps_its_word(
    searches: list[tuple[int, int, bool]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fewer checks than it wants: a worse choice, whose gap still holds the best; the same one every time."""
    problem = mixture()
    options = choices_of(problem)
    best = solve_counts(problem, options, nodes=MANY_NODES, within=0.0)
    assert best is not None and not searches[-1][2]
    lowest = evaluate(problem, best.choice).objective
    monkeypatch.setattr(milp, "_CHECKS", (1, 0))
    found = [solve_counts(problem, options, nodes=MANY_NODES, within=0.0) for _ in range(2)]
    assert searches[-1][2] and found[0] is not None and found[1] is not None
    assert found[0].gap > 0 and found[0].gap == found[1].gap
    assert [(o.label, n) for o, n in found[0].choice] == [(o.label, n) for o, n in found[1].choice]
    reached = evaluate(problem, found[0].choice).objective
    assert lowest * (1 - 1e-6) <= reached and reached * (1 - found[0].gap) <= lowest * (1 + 1e-3)
    monkeypatch.setattr(milp, "_CHECKS", (0, 0))
    assert solve_counts(problem, options) is None and searches[-1][2]
