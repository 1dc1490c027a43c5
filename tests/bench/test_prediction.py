"""The table of predictions: errors and summary, the page between its markers, configurations that are enough."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.prediction.configurations import RUNS, Case, Run
from bench.prediction.machine import Moment, between, host_of, usual
from bench.prediction.report import BEGIN, END, PAGE, InTurns, Row, figures, put

RUN = Run("some", "w3", "1GiB", (Case("decode", 128, 4), Case("prefill", 512)))


def test_errors_are_told() -> None:
    rows = [
        Row(RUN, RUN.cases[0], 0.011, 0.010, "dram read", 0.5, 0.25, 2e6, 3e6, 1.25e9, 31.25e9),
        Row(RUN, RUN.cases[1], 1.0, 2.0, "cores"),
    ]
    text = figures(rows, "a machine")
    assert "2 configurations: median error 30.0%, worst 50.0% (some w3, pp 512); 1 within 10 %, 1 within 25 %" in text
    assert "| tg x4 @ 128 | 11.00 | 10.00 | +10.0% | dram read | 31.2 | 50.0% / 25.0% | 3 / 2 at 1.25 GB/s |" in text
    assert "| pp 512 | 1000 | 2000 | -50.0% | cores |  |  |  |" in text
    with pytest.raises(ValueError, match="nothing"):
        figures([], "a machine")


RATES = st.floats(1e9, 1e11)
MOMENTS = st.builds(Moment, RATES, RATES, RATES, RATES, RATES)


@given(st.lists(MOMENTS, min_size=1, max_size=20))
def test_the_usual_moment_lies_among_them(moments: list[Moment]) -> None:
    """And reading as much in each takes as long as it took in all."""
    found = usual(moments)
    for field in dataclasses.fields(Moment):
        values = [getattr(moment, field.name) for moment in moments]
        assert min(values) * (1 - 1e-9) <= getattr(found, field.name) <= max(values) * (1 + 1e-9)
    assert len(moments) / found.read == pytest.approx(sum(1.0 / moment.read for moment in moments))


@given(MOMENTS, MOMENTS)
def test_around_a_turn_peaks_are_the_best_and_rates_are_means(before: Moment, after: Moment) -> None:
    found = between(before, after)
    assert found == between(after, before)
    assert (found.i8, found.bf16) == (max(before.i8, after.i8), max(before.bf16, after.bf16))
    assert 2.0 / found.drive == pytest.approx(1.0 / before.drive + 1.0 / after.drive)


def test_what_nobody_measured_is_not_stated() -> None:
    nothing = dataclasses.replace(Moment(32e9, 4e11, i8=1.8e12), drive=0.0)
    assert usual([nothing, Moment(32e9, 4e11)]).i8 == pytest.approx(0.9e12)  # half of two: no such machine
    assert usual([nothing]).drive == 0.0
    assert (
        host_of(nothing, 2) == "host{dram.read=32.000GB/s,cores.peak.f32=200.000GFLOP/s,cores.peak.i8=900.000GFLOP/s}"
    )


def test_seconds_of_turns() -> None:
    """A disturbed step does not count where steps are alike; where reads of one serve the next all count."""
    turns = [[1.0, 1.0, 9.0], [2.0, 2.0, 2.0]]
    assert InTurns(turns, [], {"stream": ""}).seconds == 1.5
    assert InTurns(turns, [], {"stream": "{}"}).seconds == pytest.approx(17 / 6)


def test_the_page_keeps_what_is_around(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    put("new", page)
    assert page.read_text() == f"before\n{BEGIN}\n\nnew\n\n{END}\nafter\n"
    page.write_text("no markers")
    with pytest.raises(ValueError, match="markers"):
        put("new", page)
    assert BEGIN in PAGE.read_text() and END in PAGE.read_text()


def test_configurations_cover_what_matters() -> None:
    cases = [(run, case) for run in RUNS for case in run.cases]
    assert len(cases) >= 24 and len(set(cases)) == len(cases)
    assert {case.batch for _, case in cases} == {1, 4, 8} and {case.phase for _, case in cases} == {"decode", "prefill"}
    assert {run.recipe for run in RUNS} >= {"bf16", "w8a8", "w4a8-g32", "w3"}
    assert {128, 1024, 2048} <= {case.depth for _, case in cases} and any(run.memory for run in RUNS)
    assert all(run.context >= case.context for run, case in cases)
