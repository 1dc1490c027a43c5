"""Progress of long work: a bar on a terminal, plain lines elsewhere, JSON events for programs, or nothing.

A `Progress` is called as `progress(stage, done, total, unit)`; `unit` is `bytes` or the plural of what is counted, and
`total` 0 means unknown. Stages come one after the other; `close` ends the last one. The stage "compiling" interrupts
another, which then goes on as if no time had passed. Display goes to stderr, so that stdout holds results only; JSON
events go to stdout, one object a line.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Protocol, TextIO

_LINE_SECONDS = 5.0  # between two plain lines of one stage
_BAR_SECONDS = 0.1
_EVENT_SECONDS = 0.25
COMPILING = "compiling"
_EXPLAINED = "loops for the weights of this build, once on a machine"


class Progress(Protocol):
    """What long work calls."""

    def __call__(self, stage: str, done: float, total: float, unit: str = "") -> None: ...


class Reporter:
    """Base of the displays: knows when a stage began and when it was last shown. This one shows nothing."""

    interval_s = 0.0

    def __init__(self) -> None:
        self.stage = ""
        self.started = 0.0
        self._shown = 0.0
        self._last: tuple[float, float, str] = (0.0, 0.0, "")
        self._outer: tuple[str, float, tuple[float, float, str]] | None = None  # interrupted: its seconds, what it did
        self._compiled = 0.0  # seconds in all

    def __call__(self, stage: str, done: float, total: float, unit: str = "") -> None:
        now = time.monotonic()
        if stage != self.stage:
            self._change(stage, now, total, unit)
        self._last = (done, total, unit)
        if now - self._shown >= self.interval_s:
            self._shown = now
            self.update(stage, done, total, unit, now - self.started)

    def _change(self, stage: str, now: float, total: float, unit: str) -> None:
        if stage == COMPILING and self.stage:
            self._outer = self.stage, now - self.started, self._last
            self.stage, self.started, self._shown = COMPILING, now - self._compiled, now
            self.begin(COMPILING, total, unit)
            return
        outer = self._resume(now)
        if stage != outer:
            self._end_stage()
            self.stage, self.started, self._shown = stage, now, now
            self.begin(stage, total, unit)

    def _resume(self, now: float) -> str:
        """Goes back to what compiling interrupted; its name, "" for none."""
        if self._outer is None:
            return ""
        before, self._compiled = self._compiled, now - self.started
        self.pause(COMPILING, self._compiled - before)
        (self.stage, spent, self._last), self._outer = self._outer, None
        self.started, self._shown = now - spent, now
        return self.stage

    def _end_stage(self) -> None:
        self._resume(time.monotonic())
        if self._compiled:
            seconds, self._compiled = self._compiled, 0.0
            self.end(COMPILING, 0.0, 0.0, "", seconds)
        if self.stage:
            done, total, unit = self._last
            self.end(self.stage, done, total, unit, time.monotonic() - self.started)
            self.stage = ""

    def close(self) -> None:
        """Ends the running stage."""
        self._end_stage()

    def __enter__(self) -> Reporter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def event(self, kind: str, **fields: Any) -> None:
        """A single happening, for programs; people are told in other words by the verb itself."""

    def begin(self, stage: str, total: float, unit: str) -> None: ...

    def pause(self, stage: str, seconds: float) -> None: ...

    def update(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None: ...

    def end(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None: ...


class LineReporter(Reporter):
    """`weights: 42 % (1.2 GiB of 2.9 GiB, 310 MiB/s)`, a line now and then, and one at the end of each stage."""

    interval_s = _LINE_SECONDS

    def __init__(self, stream: TextIO | None = None) -> None:
        super().__init__()
        self.stream = stream or sys.stderr

    def begin(self, stage: str, total: float, unit: str) -> None:
        if stage == COMPILING and not self._compiled:
            print(f"{stage}: {_EXPLAINED}", file=self.stream, flush=True)

    def update(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        print(f"{stage}: {describe(done, total, unit, seconds)}", file=self.stream, flush=True)

    def end(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        amount = f" ({amount_text(done, unit)}{rate_text(done, unit, seconds)})" if unit == "bytes" and done else ""
        print(f"{stage}: done in {seconds:.1f} s{amount}", file=self.stream, flush=True)


class BarReporter(Reporter):
    """A bar of rich that redraws in place; each finished stage leaves one line."""

    interval_s = _BAR_SECONDS

    def __init__(self) -> None:
        super().__init__()
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
        )
        self._tasks: dict[str, Any] = {}

    def begin(self, stage: str, total: float, unit: str) -> None:
        self._bar.start()
        text = _EXPLAINED if stage == COMPILING else ""
        self._tasks[stage] = self._bar.add_task(stage, total=total or None, text=text)

    def pause(self, stage: str, seconds: float) -> None:
        self._bar.remove_task(self._tasks.pop(stage))

    def update(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        if stage == COMPILING:
            return
        self._bar.update(
            self._tasks[stage],
            completed=done,
            total=total or None,
            text=describe(done, total, unit, seconds, percent=False),
        )

    def end(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        if stage in self._tasks:
            self._bar.remove_task(self._tasks.pop(stage))
        amount = f", {amount_text(done, unit)}{rate_text(done, unit, seconds)}" if unit == "bytes" and done else ""
        self._console.print(f"[green]✓[/] {stage:<12} {seconds:.1f} s{amount}", highlight=False)

    def close(self) -> None:
        super().close()
        self._bar.stop()


class JsonReporter(Reporter):
    """One JSON object a line on stdout: `{"event": "progress", "stage": ..., "fraction": ..., ...}`."""

    interval_s = _EVENT_SECONDS

    def begin(self, stage: str, total: float, unit: str) -> None:
        self.event("stage", stage=stage, total=total, unit=unit)

    def update(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        fraction = min(1.0, done / total) if total else None
        self.event(
            "progress", stage=stage, fraction=fraction, done=done, total=total, unit=unit, seconds=round(seconds, 3)
        )

    def pause(self, stage: str, seconds: float) -> None:
        self.event("stage_done", stage=stage, done=0.0, unit="", seconds=round(seconds, 3))

    def end(self, stage: str, done: float, total: float, unit: str, seconds: float) -> None:
        if stage == COMPILING:
            return  # told at each pause
        self.event("stage_done", stage=stage, done=done, unit=unit, seconds=round(seconds, 3))

    def event(self, kind: str, **fields: Any) -> None:
        print(json.dumps({"event": kind, **fields}, ensure_ascii=False), flush=True)


def make_reporter(*, quiet: bool = False, as_json: bool = False) -> Reporter:
    """The display that suits this process: JSON when asked, nothing when quiet, a bar on a terminal, else lines."""
    if as_json:
        return JsonReporter()
    if quiet:
        return Reporter()
    return BarReporter() if sys.stderr.isatty() else LineReporter()


def describe(done: float, total: float, unit: str, seconds: float, *, percent: bool = True) -> str:
    """`42 % (1.2 GiB of 2.9 GiB, 310 MiB/s)`."""
    inner = f"{amount_text(done, unit)} of {amount_text(total, unit)}" if total else amount_text(done, unit)
    inner += rate_text(done, unit, seconds)
    return f"{100 * min(1.0, done / total):.0f} % ({inner})" if percent and total else inner


def amount_text(amount: float, unit: str) -> str:
    """`1.2 GiB` or `12 passes`."""
    return format_bytes(amount) if unit == "bytes" else f"{amount:g} {unit}".rstrip()


def rate_text(done: float, unit: str, seconds: float) -> str:
    """`, 310 MiB/s` for bytes; nothing for what is merely counted."""
    return f", {format_bytes(done / seconds)}/s" if unit == "bytes" and seconds > 0.05 else ""


def format_bytes(amount: float) -> str:
    """`1.2 GiB`, in powers of 1024, three significant digits."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(amount) < 1000 or unit == "PiB":
            return f"{amount:.3g} {unit}" if unit != "B" else f"{amount:.0f} B"
        amount /= 1024
    raise AssertionError("unreachable: the loop returns at its last unit")


def format_count(number: float) -> str:
    """`1.10 B`, `5.6 M`: a number of parameters, in powers of 1000."""
    for limit, suffix in ((1e12, " T"), (1e9, " B"), (1e6, " M"), (1e3, " K")):
        if number >= limit:
            return f"{number / limit:.2f}{suffix}"
    return f"{number:g}"
