"""Dense weights that pass through a GPU: two places in turn, one on its way while the other is used.

`DenseWindow` copies pieces by a stream of its own; events say when a copy is there and when a place is no longer read.
The last pieces of a step are followed by the first ones of the next. Where the host has to read a piece from the disk
first, its copy begins when it is there: at the next launch that the host acts at, or, at the latest, when it is needed.

Where the host decides nothing within a step, its copies can be captured with its launches: `captured` goes round that.
The copies' stream then begins behind the step's and ends before it; what a captured step does depends only on which
pieces lie in the places before it (`state`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from runtime.cuda.device import Device
from runtime.cuda.host_tier import HostTier
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_report import HybridReport
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import PieceInfo
from runtime.manifest_fields import REBUILD_HINT


@dataclass
class _Place:
    """A place of the window. `piece` is there or on its way; `used`: the step reads it, and has not said it is done."""

    address: int
    ready: Any
    free: Any
    piece: int = -1
    used: bool = False
    read: bool = False  # since it was filled: `free` tells when that is over
    seen: bool = False  # the step's stream is behind `ready`


@dataclass(frozen=True)
class StepCopies:
    """What a captured step does to the books."""

    pieces: tuple[int, ...]  # in the places, behind it
    dense_bytes: int
    dense_copies: int


class DenseWindow:
    """The places of a plan from `region` on. `stream` is that of the steps, `copies` that of the copies; `events` has
    two for each place and two more, and stays the caller's."""

    def __init__(
        self, device: Device, stream: Any, copies: Any, pieces: Sequence[PieceInfo], plan: HbmPlan, *,
        region: int, host: HostTier, report: HybridReport, events: Sequence[Any],
    ) -> None:  # fmt: skip
        self._device, self._stream, self._copies, self._pieces = device, stream, copies, pieces
        self._streamed, self._host, self._report = plan.streamed, host, report
        self._number = {piece: number for number, piece in enumerate(plan.streamed)}
        self._places = [
            _Place(region + offset, *events[2 * n : 2 * n + 2]) for n, offset in enumerate(plan.window_offsets)
        ]
        self._fork, self._join = events[2 * len(self._places) :]
        self._next = 0 if plan.streamed else -1  # of the pieces: what is copied when it can be, -1 for none

    def passes(self, piece: int) -> bool:
        """Whether a piece is one of the window's."""
        return piece in self._number

    def address(self, piece: int) -> int:
        """Of its place: always the same."""
        return self._place(self._number[piece]).address

    def _place(self, number: int) -> _Place:
        return self._places[number % len(self._places)]

    def begin_step(self) -> None:
        """The step before has been given to the stream whole."""
        for place in self._places:
            if place.used:
                self._mark_free(place)

    def wait_for(self, piece: int) -> None:
        """The step's stream waits for a piece; the next one begins to come as soon as its place is free."""
        number = self._number[piece]
        place = self._place(number)
        self._fill(number)
        if not place.seen:
            self._device.wait(self._stream, place.ready)
        place.used = place.read = place.seen = True
        self._next = (number + 1) % len(self._streamed)
        self.follow()

    def follow(self) -> None:
        """Begins the copy of the next piece, if nothing keeps it: a place in use, or a read that is not over."""
        if self._next < 0 or self._place(self._next).used or not self._host.is_there(self._streamed[self._next]):
            return
        self._fill(self._next)
        self._next = -1

    def _fill(self, number: int) -> None:
        """Starts to copy a piece to its place, behind what still reads there."""
        piece, device, place = self._streamed[number], self._device, self._place(number)
        if place.piece == piece:
            return
        if place.used:
            origin = self._pieces[place.piece].origin
            raise RuntimeDiagnostic(
                f"the weights of {origin} are still used when those of {self._pieces[piece].origin} need their place",
                expected="programs that are done with a piece two pieces later", hint=REBUILD_HINT,
            )  # fmt: skip
        source, nbytes = self._host.dense(piece), self._pieces[piece].bytes
        if place.read:
            device.wait(self._copies, place.free)
        place.piece = -1  # until all of it is under way
        device.copy_in(place.address, source, nbytes, self._copies)
        device.record(place.ready, self._copies)
        self._host.sent(piece)
        place.piece, place.used, place.read, place.seen = piece, False, False, False
        self._report.dense_bytes += nbytes
        self._report.dense_copies += 1

    def done(self, piece: int) -> None:
        """No later launch of this step reads a piece."""
        for place in self._places:
            if place.piece == piece and place.used:
                self._mark_free(place)

    def _mark_free(self, place: _Place) -> None:
        """Work that was given to the step's stream until now is all that reads a place."""
        self._device.record(place.free, self._stream)
        place.used = False

    # -- captured steps

    @property
    def state(self) -> tuple[int, ...]:
        """Pieces in the places."""
        return tuple(place.piece for place in self._places)

    def settle(self) -> None:
        """What the step's stream is given from now on is behind all copies; no step is under way."""
        for place in self._places:
            if place.piece >= 0 and not place.seen:
                self._device.wait(self._stream, place.ready)
            place.seen, place.used, place.read = True, False, False

    @contextmanager
    def captured(self) -> Iterator[list[StepCopies]]:
        """Round the capture of a step, behind `settle`: the list has what it does, when the block ends. The books are
        those of before: nothing was done."""
        before, report, made = self.state, self._report, list[StepCopies]()
        counts = report.dense_bytes, report.dense_copies, report.steps
        try:
            if self._places:
                self._device.record(self._fork, self._stream)
                self._device.wait(self._copies, self._fork)
            yield made
            if self._places:
                self._device.record(self._join, self._copies)
                self._device.wait(self._stream, self._join)
            made.append(StepCopies(self.state, report.dense_bytes - counts[0], report.dense_copies - counts[1]))
        finally:
            self._set(before)
            report.dense_bytes, report.dense_copies, report.steps = counts

    def replayed(self, step: StepCopies) -> None:
        """A captured step was given to the stream."""
        self._set(step.pieces)
        self._report.steps += 1
        self._report.dense_bytes += step.dense_bytes
        self._report.dense_copies += step.dense_copies

    def forget(self) -> None:
        """Nothing is in the places, as nobody knows how far a step came; it is over."""
        self._set((-1,) * len(self._places))

    def _set(self, pieces: tuple[int, ...]) -> None:
        """Which pieces are there, and nothing is under way but behind the step's stream."""
        for place, piece in zip(self._places, pieces, strict=True):
            place.piece, place.used, place.read, place.seen = piece, False, False, True
        self._next = -1
