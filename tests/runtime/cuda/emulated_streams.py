"""Streams of an emulated GPU: work is done as late, as early or in as odd an order as streams and events allow.

An `Operation` runs after those it `follows`. Which of those that may run comes next is the `Order`'s choice: "eager"
runs each when it is given, "lazy" nothing before somebody waits for it and then only what that needs, "shuffled" any.
Each operation says which bytes it read and wrote; two that no stream, event or wait of the host puts in order and of
which one writes what the other touches are a `Hazard`, in whatever order they ran.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from tests.runtime.cuda.emulated_memory import EmulationFault

Ranges = list[tuple[int, int]]  # first byte, end
Work = Callable[[], tuple[Ranges, Ranges]]  # gives what was read and what was written


class Hazard(EmulationFault):
    """Two operations touch the same bytes, one writes, and nothing says which comes first."""


@dataclass
class Operation:
    """One piece of work in a stream. `clock`: how far each stream has come before it begins."""

    name: str
    stream: int
    number: int
    follows: list[Operation]
    clock: dict[int, int]
    work: Work | None
    seconds: float
    done: bool = False
    ended: float = 0.0
    touched: tuple[Ranges, Ranges] = field(default_factory=lambda: ([], []))

    def after(self, other: Operation) -> bool:
        """Whether `other` is over when this begins."""
        return self.clock.get(other.stream, -1) >= other.number


class Streams:
    """All streams of a GPU."""

    def __init__(self, order: str = "lazy", seed: int = 0) -> None:
        assert order in ("eager", "lazy", "shuffled")
        self.order, self._random = order, Random(seed)
        self.last: dict[int, Operation | None] = {}
        self._clocks: dict[int, dict[int, int]] = {}
        self._host: dict[int, int] = {}  # what the host has seen the end of
        self._numbers: dict[int, int] = {}
        self._waits: dict[int, list[Operation]] = {}  # of a stream, for the next operation
        self.pending: list[Operation] = []
        self._past: list[Operation] = []
        self._next = 1

    def make(self) -> int:
        """A new stream."""
        stream, self._next = self._next, self._next + 1
        self.last[stream], self._clocks[stream], self._waits[stream] = None, {}, []
        self._numbers[stream] = 0
        return stream

    def drop(self, stream: int) -> None:
        """Its work goes on."""
        del self.last[stream], self._waits[stream]

    def give(self, stream: int, name: str, work: Work | None, seconds: float = 0.0) -> Operation:
        """Puts work at the end of a stream."""
        last = self.last[stream]
        number = self._numbers[stream]
        self._numbers[stream] = number + 1
        clock = _joined(self._clocks[stream], self._host)
        waits = self._waits[stream]
        for waited in waits:
            clock = _joined(clock, waited.clock, {waited.stream: waited.number})
        follows = [*([last] if last is not None else []), *waits]
        operation = Operation(name, stream, number, follows, clock, work, seconds)
        self._waits[stream] = []
        self._clocks[stream] = _joined(clock, {stream: number})
        self.last[stream] = operation
        self.pending.append(operation)
        if self.order == "eager":
            self.finish(operation)
        elif self.order == "shuffled":
            for _ in range(self._random.randrange(3)):
                self._run_any(self.pending)
        return operation

    def wait(self, stream: int, event: Operation) -> None:
        """The next operation of the stream begins after `event`."""
        self._waits[stream].append(event)

    def seen(self, operation: Operation) -> None:
        """The host waits for it."""
        self.finish(operation)
        self._host = _joined(self._host, operation.clock, {operation.stream: operation.number})
        if not self.pending:
            self._past = [past for past in self._past if self._host.get(past.stream, -1) < past.number]

    def seen_all(self) -> None:
        """The host waits for everything."""
        while self.pending:
            self._run_any(self.pending)
        for operation in self._past:
            self._host = _joined(self._host, {operation.stream: operation.number})
        self._past = []

    def finish(self, operation: Operation) -> None:
        """Runs what it needs, and it."""
        while not operation.done:
            if self.order == "shuffled":
                self._run_any(self.pending)
                continue
            next_one = operation
            while unfinished := [before for before in next_one.follows if not before.done]:
                next_one = unfinished[-1]
            self._run(next_one)

    def _run_any(self, among: list[Operation]) -> None:
        ready = [one for one in among if all(before.done for before in one.follows)]
        if ready:
            self._run(self._random.choice(ready))

    def _run(self, operation: Operation) -> None:
        operation.done = True  # also when it faults: nobody waits for it again
        self.pending.remove(operation)
        began = max((before.ended for before in operation.follows), default=0.0)
        operation.ended = began + operation.seconds
        operation.follows = []
        if operation.work is None:
            return
        operation.touched = operation.work()
        operation.work = None
        for other in self._past:
            if not operation.after(other) and not other.after(operation):
                _check_apart(operation, other)
        self._past.append(operation)


def _check_apart(a: Operation, b: Operation) -> None:
    (reads_a, writes_a), (reads_b, writes_b) = a.touched, b.touched
    for mine, theirs in ((writes_a, reads_b + writes_b), (reads_a, writes_b)):
        for start, stop in mine:
            for first, end in theirs:
                if start < end and first < stop:
                    raise Hazard(
                        f"{a.name} (stream {a.stream}) and {b.name} (stream {b.stream}) both touch "
                        f"{min(stop, end) - max(start, first)} bytes, one writes, and no event is between them"
                    )


def _joined(*clocks: dict[int, int]) -> dict[int, int]:
    made: dict[int, int] = {}
    for clock in clocks:
        for stream, number in clock.items():
            made[stream] = max(number, made.get(stream, -1))
    return made
