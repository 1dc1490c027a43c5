"""The table of predictions beside measurements, and its page: median and worst error, errors by bound."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.measure import table
from bench.prediction.configurations import Case, Run
from bench.prediction.machine import Moment

PAGE = Path(__file__).parents[2] / "docs" / "prediction.md"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


@dataclass(frozen=True)
class InTurns:
    """A case measured: `turns` are the seconds of the steps of each turn, `moments` what the machine had around each,
    `counts` what was read and found in all of them."""

    turns: list[list[float]]
    moments: list[Moment]
    counts: dict[str, Any]

    @property
    def seconds(self) -> float:
        """Of a step: the mean over the turns, whose steps all count alike where reads of one serve the next, else of
        each turn the median one."""
        middle = statistics.fmean if self.counts["stream"] else statistics.median
        return statistics.fmean(middle(turn) for turn in self.turns)


@dataclass(frozen=True)
class Row:
    """One case: seconds as predicted and measured, what bounds it by the plan; the rest where the runtime counts it."""

    run: Run
    case: Case
    predicted: float
    measured: float
    bound: str
    predicted_hits: float | None = None
    measured_hits: float | None = None
    measured_bytes: float | None = None
    predicted_bytes: float | None = None
    read_rate: float | None = None  # of the drive between the turns, bytes/s
    memory_rate: float | None = None  # of memory between the turns, bytes/s
    samples: dict[str, Any] = field(default_factory=dict, compare=False)

    @property
    def error(self) -> float:
        """Predicted over measured, less one."""
        return self.predicted / self.measured - 1.0

    @property
    def name(self) -> str:
        """What is done: `tg x4 @ 128`, `pp 512`."""
        many = f" x{self.case.batch}" if self.case.batch > 1 else ""
        return f"pp {self.case.depth}" if self.case.phase == "prefill" else f"tg{many} @ {self.case.depth}"


def figures(rows: Sequence[Row], machine: str) -> str:
    """Markdown: a summary and the table. Raises ValueError without rows."""
    if not rows:
        raise ValueError("nothing was measured")
    errors = [abs(row.error) for row in rows]
    worst = max(rows, key=lambda row: abs(row.error))
    lines = [
        machine,
        "",
        f"{len(rows)} configurations: median error {statistics.median(errors):.1%}, worst {max(errors):.1%} "
        f"({worst.run.model} {worst.run.recipe}, {worst.name}); "
        f"{sum(e <= 0.1 for e in errors)} within 10 %, {sum(e <= 0.25 for e in errors)} within 25 %.",
        "",
    ]
    cells = [
        (
            row.run.model, row.run.recipe, row.run.memory or "-", row.name, _ms(row.predicted), _ms(row.measured),
            f"{row.error:+.1%}", row.bound,
            f"{row.memory_rate / 1e9:.1f}" if row.memory_rate else "", _hits(row), _reads(row),
        )
        for row in rows
    ]  # fmt: skip
    heads = ["model", "format", "budget", "phase", "predicted ms", "measured ms", "error", "bound",
             "memory GB/s", "hits predicted / measured", "MB read predicted / measured"]  # fmt: skip
    return "\n".join([*lines, table(heads, cells)])


def put(text: str, page: Path = PAGE) -> None:
    """Writes the figures between the markers of the page."""
    old = page.read_text(encoding="utf-8")
    head, found, rest = old.partition(BEGIN)
    _, closed, tail = rest.partition(END)
    if not found or not closed:
        raise ValueError(f"{page} has no markers {BEGIN} and {END}")
    page.write_text(f"{head}{BEGIN}\n\n{text}\n\n{END}{tail}", encoding="utf-8")


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}" if seconds < 0.1 else f"{seconds * 1e3:.0f}"


def _hits(row: Row) -> str:
    if not row.measured_hits or row.predicted_hits is None:
        return ""
    return f"{row.predicted_hits:.1%} / {row.measured_hits:.1%}"


def _reads(row: Row) -> str:
    if row.measured_bytes is None or row.predicted_bytes is None:
        return ""
    rate = f" at {row.read_rate / 1e9:.2f} GB/s" if row.read_rate else ""
    return f"{row.predicted_bytes / 1e6:.0f} / {row.measured_bytes / 1e6:.0f}{rate}"
