"""The table of predictions: errors and summary, the page between its markers, configurations that are enough."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.prediction.configurations import RUNS, Case, Run
from bench.prediction.report import BEGIN, END, PAGE, Row, figures, put

RUN = Run("some", "w3", "1GiB", (Case("decode", 128, 4), Case("prefill", 512)))


def test_errors_are_told() -> None:
    rows = [
        Row(RUN, RUN.cases[0], 0.011, 0.010, "dram read", 0.5, 0.25, 2e6, 3e6, 1.25e9),
        Row(RUN, RUN.cases[1], 1.0, 2.0, "cores"),
    ]
    text = figures(rows, "a machine")
    assert "2 configurations: median error 30.0%, worst 50.0% (some w3, pp 512); 1 within 10 %, 1 within 25 %" in text
    assert "| tg x4 @ 128 | 11.00 | 10.00 | +10.0% | dram read | 50.0% / 25.0% | 3 / 2 at 1.25 GB/s |" in text
    assert "| pp 512 | 1000 | 2000 | -50.0% | cores |  |  |" in text
    with pytest.raises(ValueError, match="nothing"):
        figures([], "a machine")


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
