"""Displays of progress: what is printed where, and how often."""

from __future__ import annotations

import io
import json

import pytest

from stratum import progress
from stratum.progress import JsonReporter, LineReporter, Reporter, make_reporter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_lines_come_now_and_then(clock: list[float]) -> None:
    stream = io.StringIO()
    with LineReporter(stream) as report:
        for done in range(0, 101, 10):
            report("weights", done << 20, 100 << 20, "bytes")
            clock[0] += 1.0
    lines = stream.getvalue().splitlines()
    assert lines[0] == "weights: 50 % (50 MiB of 100 MiB, 10 MiB/s)"
    assert lines[1] == "weights: 100 % (100 MiB of 100 MiB, 10 MiB/s)"
    assert lines[2] == "weights: done in 11.0 s (100 MiB, 9.09 MiB/s)"
    assert len(lines) == 3


def test_each_stage_ends_before_the_next(clock: list[float]) -> None:
    stream = io.StringIO()
    with LineReporter(stream) as report:
        report("passes", 0, 3, "passes")
        clock[0] += 0.5
        report("code", 0, 0)
    assert stream.getvalue().splitlines() == ["passes: done in 0.5 s", "code: done in 0.0 s"]


def test_compiling_interrupts_a_stage(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """What was interrupted goes on at its own rate; seconds of compiling are summed up, and told once to people."""

    def play(report: Reporter) -> None:
        with report:
            report("weights", 0, 8 << 20, "bytes")
            for part in (1, 2):
                clock[0] += 1.0
                report("compiling", 0, 0)
                clock[0] += 20.0
                report("weights", (4 * part - 2) << 20, 8 << 20, "bytes")
            clock[0] += 2.0
            report("weights", 8 << 20, 8 << 20, "bytes")

    stream = io.StringIO()
    play(LineReporter(stream))
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("compiling: loops for the weights") and len(lines) == 3
    assert lines[1:] == ["compiling: done in 40.0 s", "weights: done in 4.0 s (8 MiB, 2 MiB/s)"]
    play(JsonReporter())
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    told = [(e["event"], e["stage"]) for e in events if e["event"] != "progress"]
    compiled = [("stage", "compiling"), ("stage_done", "compiling")]
    assert told == [("stage", "weights"), *compiled, *compiled, ("stage_done", "weights")]
    assert [e["seconds"] for e in events if e["event"] == "stage_done"] == [20.0, 20.0, 4.0]


def test_a_stage_may_end_while_loops_are_compiled(clock: list[float]) -> None:
    stream = io.StringIO()
    with LineReporter(stream) as report:
        report("passes", 0, 0)
        report("compiling", 0, 0)
        clock[0] += 3.0
        report("code", 0, 0)
        report("compiling", 0, 0)
    lines = stream.getvalue().splitlines()
    assert lines[1:3] == ["compiling: done in 3.0 s", "passes: done in 0.0 s"] and lines[-1] == "code: done in 0.0 s"


def test_json_events_are_one_object_a_line(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with JsonReporter() as report:
        report("weights", 0, 8, "bytes")
        clock[0] += 1.0
        report("weights", 2, 8, "bytes")
    report.event("done", path="ü")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [e["event"] for e in events] == ["stage", "progress", "stage_done", "done"]
    assert events[1]["fraction"] == 0.25 and events[1]["stage"] == "weights"
    assert events[3]["path"] == "ü"


def test_quiet_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    report = make_reporter(quiet=True)
    with report:
        report("weights", 1, 2, "bytes")
        report.event("done")
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_kind_of_display() -> None:
    assert type(make_reporter(quiet=True)) is Reporter
    assert type(make_reporter(as_json=True)) is JsonReporter
    assert type(make_reporter()) is LineReporter  # stderr is no terminal here


def test_bar_on_a_terminal(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with make_reporter() as report:
        report("weights", 0, 100, "bytes")
        clock[0] += 1.0
        report("weights", 100, 100, "bytes")
    assert type(report).__name__ == "BarReporter"


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "0.977 KiB"), (1536, "1.5 KiB"), (5 << 20, "5 MiB"), (3 << 60, "3.07e+03 PiB")],
)
def test_format_bytes(amount: float, text: str) -> None:
    assert progress.format_bytes(amount) == text


@pytest.mark.parametrize(("number", "text"), [(12, "12"), (5_600_000, "5.60 M"), (1.1e9, "1.10 B"), (2e12, "2.00 T")])
def test_format_count(number: float, text: str) -> None:
    assert progress.format_count(number) == text
