"""What the kernels' time stamps mean: a table by semantic name and a Perfetto (Chrome trace-event) file.

A `Profile` collects one record a native call: the program, the sizes of its batch and two cycle counts (start, end) for
each launch and thread. Together with the manifest's launch list that gives time, bandwidth and arithmetic rate by
kernel and by the part of the model it belongs to. Cycles become seconds by reading the counter and `perf_counter`
together at the profile's start and end.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import ProgramInfo

_LAYER_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class StepRecord:
    """One native call. `cycles` is int64 [launches, threads, 2]: start, end; `started_s`, `ended_s` by perf_counter."""

    program: ProgramInfo
    tokens: int
    rows: int
    cycles: np.ndarray
    started_s: float
    ended_s: float


@dataclass(frozen=True)
class OpRow:
    """One line of the table: all launches of one kernel at one place of the model.

    `seconds` is wall time, first thread in to last thread out, summed over the calls; `fraction` is of the native
    time of all steps. The rates are 0 where the manifest states no work.
    """

    origin: str
    kernel: str
    calls: int
    seconds: float
    fraction: float
    gigabytes_per_s: float
    gigaflops: float


class Profile:
    """Collects the records of a session while profiling is on; see `Session.profile`.

    `place` says where steps ran, `tracks` names the threads, where they are not those of this process.
    """

    def __init__(
        self, threads: int, counter: Callable[[], int], *, place: str = "", tracks: tuple[str, ...] = ()
    ) -> None:
        self.threads = threads
        self._place = place or f"on {threads} threads"
        self._tracks = tracks or tuple(f"thread {thread}" for thread in range(threads))
        self.steps: list[StepRecord] = []
        self.reads: list[tuple[str, float, float, int]] = []  # what, start and end by perf_counter, bytes
        self.stalls: list[tuple[str, float, float]] = []  # what steps waited for
        self._counter = counter
        self._first = _read_together(counter)
        self._last: tuple[int, float] | None = None

    def buffer(self, program: ProgramInfo) -> np.ndarray:
        """A zeroed buffer for one call of `program`, int64 [launches, threads, 2]."""
        return np.zeros((max(1, len(program.launches)), self.threads, 2), dtype=np.int64)

    def add(self, record: StepRecord) -> None:
        """Keeps one call's record."""
        self.steps.append(record)

    def finish(self) -> None:
        """Ends the profile: takes the second reading of both clocks."""
        self._last = _read_together(self._counter)

    def seconds(self, cycles: np.ndarray) -> np.ndarray:
        """Cycle counts as perf_counter seconds, float64, same shape."""
        cycles_per_s, (cycle0, second0) = self._rate(), self._first
        return (np.asarray(cycles, dtype=np.int64) - cycle0) / cycles_per_s + second0

    def _rate(self) -> float:
        """Cycles a second. The readings must lie apart: a profile shorter than a millisecond waits for it."""
        while self._last is None or self._last[1] - self._first[1] < 1e-3:
            self._last = _read_together(self._counter)
        elapsed_cycles = self._last[0] - self._first[0]
        if elapsed_cycles <= 0:
            raise RuntimeDiagnostic("the cycle counter of this CPU does not run; no profile can be made")
        return elapsed_cycles / (self._last[1] - self._first[1])

    def rows(self, *, by_layer: bool = False) -> list[OpRow]:
        """The table, longest first. Layers are folded together (`layers.*.mlp`) unless `by_layer`."""
        calls: dict[tuple[str, str], int] = {}
        totals: dict[tuple[str, str], np.ndarray] = {}  # seconds, bytes, floating-point operations
        native_s = 0.0
        for step in self.steps:
            native_s += step.ended_s - step.started_s
            for launch, (start_s, end_s) in zip(step.program.launches, self._intervals(step), strict=False):
                origin = launch.origin if by_layer else _LAYER_NUMBER.sub("*", launch.origin)
                key = (origin, launch.name)
                calls[key] = calls.get(key, 0) + 1
                work = np.array([end_s - start_s, launch.bytes, launch.flops_per_token * step.tokens])
                totals[key] = totals.get(key, 0.0) + work
        table = []
        for key, (seconds, moved, flops) in totals.items():
            per_s = 1e-9 / seconds if seconds > 0 else 0.0
            fraction = seconds / native_s if native_s > 0 else 0.0
            table.append(OpRow(*key, calls[key], float(seconds), float(fraction), moved * per_s, flops * per_s))
        return sorted(table, key=lambda row: (-row.seconds, row.origin, row.kernel))

    def table(self, *, by_layer: bool = False, limit: int = 40) -> str:
        """The table as text for a terminal, at most `limit` lines of ops."""
        rows = self.rows(by_layer=by_layer)
        native_s = sum(step.ended_s - step.started_s for step in self.steps)
        accounted_s = sum(row.seconds for row in rows)
        width = max([len("origin"), *(len(row.origin) for row in rows[:limit])])
        kernel_width = max([len("kernel"), *(len(row.kernel) for row in rows[:limit])])
        head = f"{'time':>10}  {'%':>5}  {'calls':>7}  {'GB/s':>8}  {'GFLOP/s':>9}"
        lines = [f"{'origin':<{width}}  {'kernel':<{kernel_width}}  {head}"]
        for row in rows[:limit]:
            lines.append(
                f"{row.origin or '-':<{width}}  {row.kernel:<{kernel_width}}  {row.seconds * 1e3:>7.3f} ms  "
                f"{row.fraction * 100:>5.1f}  {row.calls:>7}  {row.gigabytes_per_s:>8.2f}  {row.gigaflops:>9.2f}"
            )
        if len(rows) > limit:
            rest = sum(row.seconds for row in rows[limit:])
            lines.append(f"... {len(rows) - limit} more rows, {rest * 1e3:.3f} ms")
        lines.append(
            f"{len(self.steps)} native steps, {native_s * 1e3:.3f} ms {self._place}; "
            f"{max(0.0, native_s - accounted_s) * 1e3:.3f} ms outside kernels"
        )
        return "\n".join(lines)

    def _intervals(self, step: StepRecord) -> np.ndarray:
        """[launches, 2] seconds: the first thread's start and the last thread's end of each launch."""
        seconds = self.seconds(step.cycles)
        return np.stack([seconds[:, :, 0].min(axis=1), seconds[:, :, 1].max(axis=1)], axis=1)

    def events(self) -> Iterator[dict[str, object]]:
        """Trace events: names of the tracks, one event a step (track 0), one a launch and thread (tracks 1...)."""
        pid = os.getpid()
        yield _metadata("process_name", pid, 0, "stratum")
        yield _metadata("thread_name", pid, 0, "steps")
        for thread in range(self.threads):
            yield _metadata("thread_name", pid, thread + 1, self._tracks[thread])
        origin_s = self.steps[0].started_s if self.steps else 0.0
        for step in self.steps:
            sizes = {"tokens": step.tokens, "rows": step.rows}
            yield _complete(step.program.name, "step", pid, 0, step.started_s, step.ended_s, origin_s, sizes)
            seconds = self.seconds(step.cycles)
            for index, launch in enumerate(step.program.launches):
                for thread in range(self.threads):
                    start_s, end_s = seconds[index, thread].tolist()
                    name = launch.origin or launch.name
                    arguments = {"kernel": launch.name, "launch": index}
                    yield _complete(name, launch.name, pid, thread + 1, start_s, end_s, origin_s, arguments)

    def stream_events(self) -> Iterator[dict[str, object]]:
        """Trace events of what was read (weights, keys, values): reads on tracks as they overlap, waits on one."""
        if not self.reads and not self.stalls:
            return
        pid, first = os.getpid(), self.threads + 1
        origin_s = self.steps[0].started_s if self.steps else 0.0
        yield _metadata("thread_name", pid, first, "waits for reads")
        for name, start_s, end_s in sorted(self.stalls, key=lambda stall: stall[1]):
            yield _complete(name, "wait", pid, first, start_s, end_s, origin_s, {})
        ends: list[float] = []
        for name, start_s, end_s, nbytes in sorted(self.reads, key=lambda read: read[1]):
            track = next((i for i, end in enumerate(ends) if end <= start_s), len(ends))
            if track == len(ends):
                ends.append(0.0)
                yield _metadata("thread_name", pid, first + 1 + track, f"reads {track}")
            ends[track] = end_s
            yield _complete(name, "read", pid, first + 1 + track, start_s, end_s, origin_s, {"bytes": nbytes})

    def write_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the events as a JSON file that ui.perfetto.dev and chrome://tracing open."""
        try:
            with Path(path).open("w", encoding="utf-8") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [')
                for index, event in enumerate(itertools.chain(self.events(), self.stream_events())):
                    file.write(",\n" if index else "\n")
                    json.dump(event, file)
                file.write("\n]}\n")
        except OSError as fault:
            raise RuntimeDiagnostic(
                f"cannot write the trace: {fault.strerror}", where=str(path), hint="name a writable file: --trace FILE"
            ) from None


def _read_together(counter: Callable[[], int]) -> tuple[int, float]:
    """(cycles, perf_counter seconds) of one moment: the tightest of several readings, so no preemption lies between."""
    best = None
    for _ in range(16):
        before = time.perf_counter()
        cycles = counter()
        after = time.perf_counter()
        if best is None or after - before < best[0]:
            best = (after - before, cycles, (before + after) / 2)
    assert best is not None
    return best[1], best[2]


def _metadata(kind: str, pid: int, tid: int, name: str) -> dict[str, object]:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


def _complete(
    name: str, category: str, pid: int, tid: int, start_s: float, end_s: float, origin_s: float, arguments: dict
) -> dict[str, object]:
    """A complete event; ts and dur in microseconds, three decimals (one nanosecond)."""
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": pid,
        "tid": tid,
        "ts": round((start_s - origin_s) * 1e6, 3),
        "dur": round(max(0.0, end_s - start_s) * 1e6, 3),
        "args": arguments,
    }
