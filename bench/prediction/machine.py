"""What this machine can do between two turns of a case: memory, products and, for budgets, the drive.

    with Machine(threads=2) as machine:
        before = machine.now()              # a quarter of a second
        ...                                 # a turn of the case
        after = machine.now()
    host_of(usual([between(before, after), ...]), threads=2)  # "host{dram.read=31.5GB/s,...}"

A shared machine reads its memory at 30 GB/s or at 50, for about a second each, so nothing measured once says anything
of a case. Memory and products are measured by a child that is kept (`bench.peers.limits_child`), in huge pages, as
weights files are mapped; the best of a few runs counts, as in a calibration. The drive is measured by the process of
the case itself (`bench.prediction.drive`): how fast it is depends on the pages that it reads into, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import fmean, median

from bench.peers.child import Engine
from hw_targets import load as load_target

LEAST_HUGE = 0.9  # of the memory that is read: a file of weights has all in huge pages (docs/codegen.md)


@dataclass(frozen=True)
class Moment:
    """Rates of all threads just now: bytes/s of memory and of the drive, operations/s by element; 0: not measured."""

    read: float
    f32: float
    bf16: float = 0.0
    i8: float = 0.0
    drive: float = 0.0


class Machine:
    """Measures; ends its child when left."""

    def __init__(self, threads: int) -> None:
        command = [sys.executable, "-m", "bench.peers.limits_child", "--threads", str(threads)]
        self._child = Engine("limits", command)
        self._child.ask({"do": "rates"})  # memory is touched for the first time
        #: Of the memory that is read, what the system put in huge pages.
        self.huge_share = float(self._child.ask({"do": "huge"})["share"])

    def now(self) -> Moment:
        """Just now, without the drive."""
        runs = self._child.ask({"do": "rates"})
        return Moment(**{field.name: max(runs.get(field.name, [0.0])) for field in fields(Moment)})

    def __enter__(self) -> Machine:
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.close()


def between(before: Moment, after: Moment) -> Moment:
    """What a turn between the two had: the mean seconds of a byte, the best of peaks, which are only ever measured too
    low."""
    return _joined((before, after), max)


def usual(moments: Sequence[Moment]) -> Moment:
    """Of many turns: the mean seconds of a byte, as a case's seconds are a mean, and the median peak."""
    return _joined(moments, median)


def _joined(moments: Sequence[Moment], peak: Callable[[Sequence[float]], float]) -> Moment:
    columns = {field.name: [getattr(moment, field.name) for moment in moments] for field in fields(Moment)}
    return Moment(**{
        name: _harmonic(rates) if name in ("read", "drive") else peak(rates) for name, rates in columns.items()
    })  # fmt: skip


def _harmonic(rates: Sequence[float]) -> float:
    return 1.0 / fmean(1.0 / rate for rate in rates) if all(rates) else 0.0


def host_of(moment: Moment, threads: int) -> str:
    """The target `host` with these figures."""
    parts = [f"dram.read={moment.read / 1e9:.3f}GB/s"]
    for element in ("f32", "bf16", "i8"):
        rate = getattr(moment, element)
        if rate:
            parts.append(f"cores.peak.{element}={rate / threads / 1e9:.3f}GFLOP/s")
    store = load_target("host").store()
    if moment.drive and store is not None:
        parts.append(f"{store.name}.read={moment.drive / 1e9:.3f}GB/s")
    return f"host{{{','.join(parts)}}}"
