"""What a simulation gives: when every op of a plan began and ended, what bounded the whole, what memory it took.

`write_trace` makes a file in the trace-event format of Chrome that ui.perfetto.dev opens: one track a unit and a
resource, one counter a memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ir.diagnostics import DiagnosticError


@dataclass(frozen=True)
class OpTime:
    """One op: what it is, on which track (unit or link) it is shown, its seconds, and what limited it longest."""

    name: str
    track: str
    start: float
    end: float
    limit: str


@dataclass(frozen=True)
class Timeline:
    """`seconds` of the whole plan.

    `busy` is the time at full speed of each resource, and the time at work of each unit. `critical` are the seconds of
    the longest chain of ops that waited for one another, by what limited them, longest first; `bound` is the first of
    these. `memory` is, by tier, (time, bytes taken) whenever that changes; `peak_bytes` is the most.
    """

    seconds: float
    ops: tuple[OpTime, ...]
    busy: dict[str, float]
    critical: dict[str, float]
    memory: dict[str, tuple[tuple[float, int], ...]]

    @property
    def bound(self) -> str:
        """The resource that most of the critical path went to; "nothing" for a plan that takes no time."""
        return next(iter(self.critical), "nothing")

    @property
    def peak_bytes(self) -> dict[str, int]:
        """The most that each tier held at once."""
        return {place: max(nbytes for _, nbytes in changes) for place, changes in self.memory.items()}

    def utilisation(self, resource: str) -> float:
        """The share of the whole in which a resource or unit worked."""
        return self.busy.get(resource, 0.0) / self.seconds if self.seconds else 0.0

    def table(self, limit: int = 12) -> str:
        """For a terminal: the critical path and the busiest resources."""
        width = max([len("resource"), *(len(name) for name in (*self.critical, *self.busy))])
        lines = [f"{'resource':<{width}}  {'critical ms':>11}  {'busy ms':>9}  {'busy %':>6}"]
        order = sorted(
            {**self.busy, **self.critical}, key=lambda n: (-self.critical.get(n, 0.0), -self.busy.get(n, 0.0), n)
        )
        for name in order[:limit]:
            on_path, busy = self.critical.get(name, 0.0) * 1e3, self.busy.get(name, 0.0) * 1e3
            lines.append(f"{name:<{width}}  {on_path:>11.3f}  {busy:>9.3f}  {self.utilisation(name) * 100:>6.1f}")
        lines.append(f"{self.seconds * 1e3:.3f} ms, bound by {self.bound}")
        return "\n".join(lines)

    def events(self) -> Iterator[dict[str, object]]:
        """Trace events: names of the tracks, one event an op, one counter a change of memory."""
        tracks = {name: i for i, name in enumerate(dict.fromkeys(op.track for op in self.ops))}
        yield {"ph": "M", "name": "process_name", "pid": 0, "tid": 0, "args": {"name": "stratum, simulated"}}
        for name, number in tracks.items():
            yield {"ph": "M", "name": "thread_name", "pid": 0, "tid": number, "args": {"name": name}}
        for op in self.ops:
            yield {
                "ph": "X",
                "name": op.name,
                "cat": op.limit,
                "pid": 0,
                "tid": tracks[op.track],
                "ts": round(op.start * 1e6, 3),
                "dur": round((op.end - op.start) * 1e6, 3),
                "args": {"bound": op.limit},
            }
        for place, changes in self.memory.items():
            for at, nbytes in changes:
                yield {"ph": "C", "name": place, "pid": 0, "ts": round(at * 1e6, 3), "args": {"bytes": nbytes}}

    def write_trace(self, path: str | Path) -> None:
        """Writes the events as JSON. Raises DiagnosticError when the file cannot be written."""
        try:
            with Path(path).open("w", encoding="utf-8") as file:
                file.write('{"displayTimeUnit": "ms", "traceEvents": [')
                for index, event in enumerate(self.events()):
                    file.write(",\n" if index else "\n")
                    json.dump(event, file)
                file.write("\n]}\n")
        except OSError as fault:
            raise DiagnosticError(f"cannot write the trace: {fault.strerror}", where=str(path)) from None
