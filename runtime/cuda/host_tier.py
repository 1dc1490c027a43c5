"""Weights on their way to a GPU from pinned host memory, and from the disk behind it.

`HostTier` has one block of pinned memory by a `HostPlan`. What the plan keeps is read once. A dense piece that it does
not keep is read into one of a few stages, in the order of use and ahead of it, also across the end of a step; its stage
is read into again when the copy to the GPU is over, which an event says. Experts that it does not keep come and go in
slots that all layers share, by `runtime.expert_cache`; those of one request are read at once and given as they come.

Reads are those of the streaming of CPUs: `runtime.weight_reader`, O_DIRECT by a few threads, repeated where the disk is
ill. The caller's own thread keeps the books. What cannot be read is one RuntimeDiagnostic at whoever waits for it; the
next request reads it anew. Ctrl-C comes through while a read is waited for, and leaves the books right.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.artifact import Artifact
from runtime.cuda.device import Device, host_view
from runtime.cuda.host_plan import LOAD_BYTES, PAGE_BYTES, HostPlan
from runtime.cuda.interrupts import let_interrupts_through, uninterrupted
from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import Entry, ExpertCache
from runtime.weight_reader import Pread, ReadCounters, ReadJob, WeightReader

READERS = 4
REQUEST_BYTES = 2 << 20


@dataclass
class _Stage:
    """A place for a dense piece. `sent` happens when its copy to the GPU is over."""

    at: int
    sent: Any
    sending: bool = False


class HostTier:
    """`copies` is the stream of dense pieces; `copies_of_experts` that of experts, for whoever has another one to set.
    `preadv` is the seam for faults."""

    def __init__(
        self, device: Device, artifact: Artifact, plan: HostPlan, copies: Any, *,
        policy: str = "lrfu", preadv: Pread = os.preadv,
    ) -> None:  # fmt: skip
        self.plan, self.copies_of_experts = plan, copies
        self._device, self._copies = device, copies
        self._pieces = artifact.manifest.weights.pieces
        self._image = dict(plan.image)
        self._layer = {piece: layer for layer, piece in enumerate(plan.cached)}
        self.reads = ReadCounters()  # what came from the disk, what was loaded once included
        self.stall_s = 0.0  # waited for reads
        self._block = 0
        self._reader: WeightReader | None = None
        self._stages: list[_Stage] = []
        self._free: deque[_Stage] = deque()  # of those that were sent, the oldest first
        self._coming: deque[tuple[int, _Stage, ReadJob]] = deque()  # dense pieces in the order of use
        self._cache = ExpertCache([1] * len(plan.cached), plan.slots, policy=policy) if plan.cached else None
        self._jobs: dict[Entry, ReadJob] = {}
        self._slot_of: dict[Entry, int] = {}
        self._unused = list(range(plan.slots))[::-1]
        try:
            with uninterrupted():
                self._block = device.allocate_pinned(plan.host_bytes, "the weights that stay on the host")
            for number in range(plan.stages):
                with uninterrupted():
                    self._stages.append(_Stage(plan.stages_at + number * plan.stage_bytes, device.new_event()))
            with uninterrupted():
                weights = artifact.manifest.weights
                self._reader = WeightReader(
                    str(artifact.path / weights.file), artifact.open_weights(), weights.bytes,
                    host_view(self._block, plan.host_bytes), threads=READERS, request_bytes=REQUEST_BYTES,
                    preadv=preadv,
                )  # fmt: skip
        except BaseException:
            self.close()
            raise
        self.reads = self._reader.counters
        self._free.extend(self._stages)

    # -- before the first step

    def load(self, staying: Sequence[tuple[int, int, int]]) -> None:
        """What stays: (offset in the file, bytes, address on the device) through the block to the device, then the
        image into it; returns when all is there."""
        half = min(LOAD_BYTES, self.plan.host_bytes) // 2 // PAGE_BYTES * PAGE_BYTES
        parts = [
            (offset + at, min(half, nbytes - at), address + at)
            for offset, nbytes, address in staying
            for at in range(0, nbytes, half)
        ]
        jobs: deque[ReadJob] = deque()
        for number in range(len(parts) + 1):
            if number < len(parts):
                offset, nbytes, _ = parts[number]
                jobs.append(self._submit(offset, nbytes, number % 2 * half, "resident"))
            if number:
                _, nbytes, address = parts[number - 1]
                jobs.popleft().wait()
                with uninterrupted():
                    self._device.copy_in(address, self._block + (number - 1) % 2 * half, nbytes, self._copies)
                    self._device.synchronize(self._copies)  # the other half is read meanwhile
        for piece, place in self.plan.image:
            info = self._pieces[piece]
            jobs.append(self._submit(info.offset, info.bytes, place, info.origin))
        for job in jobs:
            job.wait()
        self._read_ahead()

    def _submit(self, offset: int, nbytes: int, place: int, label: str, *, urgent: bool = False) -> ReadJob:
        assert self._reader is not None
        return self._reader.submit([(offset, nbytes)], label, urgent=urgent, place=place)

    def _wait(self, job: ReadJob) -> None:
        if job.done and job.fault is None:
            return
        started = time.perf_counter()
        try:
            job.wait(let_interrupts_through)
        finally:
            self.stall_s += time.perf_counter() - started

    # -- dense pieces

    def is_there(self, piece: int) -> bool:
        """Whether `dense` would give the piece at once."""
        return piece in self._image or bool(
            self._coming and self._coming[0][0] == piece and self._coming[0][2].done
        )  # fmt: skip

    def dense(self, piece: int) -> int:
        """Where a piece lies in pinned memory, when it is there; `sent` follows its copy."""
        if piece in self._image:
            return self._block + self._image[piece]
        if not self._coming or self._coming[0][0] != piece or self._coming[0][2].fault is not None:
            self._begin_at(piece)
        _, stage, job = self._coming[0]
        self._wait(job)
        return self._block + stage.at

    def sent(self, piece: int) -> None:
        """The copy of a piece was given to the stream: when it is over the place is read into again."""
        if piece in self._image:
            return
        _, stage, _ = self._coming[0]
        self._device.record(stage.sent, self._copies)
        stage.sending = True
        self._coming.popleft()
        self._free.append(stage)
        self._read_ahead(piece)

    def _read_ahead(self, after: int = -1) -> None:
        """Begins to read what follows, but into the place that was sent last: nobody waits for what is on its way."""
        staged = self.plan.staged
        while staged and len(self._free) > 1:
            last = self._coming[-1][0] if self._coming else after
            piece = staged[(staged.index(last) + 1) % len(staged)] if last >= 0 else staged[0]
            self._read_into_oldest(piece)

    def _read_into_oldest(self, piece: int) -> None:
        stage, info = self._free[0], self._pieces[piece]
        if stage.sending:
            self._device.synchronize_event(stage.sent)
            stage.sending = False
        self._coming.append((piece, stage, self._submit(info.offset, info.bytes, stage.at, info.origin)))
        self._free.popleft()

    def _begin_at(self, piece: int) -> None:
        """The reads that are under way are not those that are wanted, or failed: others from here on."""
        self._device.synchronize(self._copies)  # of a step that ended early, whose copies no event tells of
        while self._coming:
            _settle(self._coming[0][2])
            self._free.append(self._coming.popleft()[1])
        self._read_into_oldest(piece)
        self._read_ahead()

    # -- experts

    def experts(self, piece: int, wanted: Sequence[int]) -> Iterator[tuple[int, int]]:
        """(expert, where it lies in pinned memory) of all that are wanted, each when it is there.

        A place is good until the next request; copies from it are given to `copies_of_experts` before that.
        """
        unit = self._pieces[piece].unit
        if piece in self._image:
            for expert in wanted:
                yield expert, self._block + self._image[piece] + expert * unit
            return
        for first in range(0, len(wanted), self.plan.slots):
            self._device.synchronize(self.copies_of_experts)  # what reads the slots that are read into
            for expert in self._ask(piece, wanted[first : first + self.plan.slots]):
                entry = (self._layer[piece], expert)
                self._wait(self._jobs[entry])
                yield expert, self._block + self.plan.slots_at + self._slot_of[entry] * self.plan.slot_bytes

    def _ask(self, piece: int, part: Sequence[int]) -> list[int]:
        """Begins to read what is missing of as many experts as there are slots; those that are there come first."""
        assert self._cache is not None
        layer, info = self._layer[piece], self._pieces[piece]
        hits, misses = self._cache.lookup(layer, part)
        for entry in self._cache.admit(layer, misses):
            _settle(self._jobs.pop(entry))
            self._unused.append(self._slot_of.pop(entry))
        for expert in reversed((*hits, *misses)):  # what is urgent goes before what was: the first is asked for last
            entry = (layer, expert)
            slot = self._slot_of[entry] if entry in self._slot_of else self._unused[-1]
            job = self._jobs.get(entry)
            if job is None or job.fault is not None:
                place = self.plan.slots_at + slot * self.plan.slot_bytes
                label = f"{info.origin}.{expert}"
                self._jobs[entry] = self._submit(
                    info.offset + expert * info.unit, info.unit, place, label, urgent=True
                )  # fmt: skip
            if entry not in self._slot_of:
                self._slot_of[entry] = self._unused.pop()
        return [*hits, *misses]

    def on_disk(self, piece: int, experts: Sequence[int]) -> list[int]:
        """Those of some experts that would have to be read first: no read of them has ended."""
        if piece in self._image:
            return []
        entries = ((expert, self._jobs.get((self._layer[piece], expert))) for expert in experts)
        return [expert for expert, job in entries if job is None or not job.done or job.fault is not None]

    # -- reports

    def rate(self) -> float:
        """Bytes a second that the disk gave so far; 0 where nothing was read."""
        return self.reads.bytes / self.reads.busy_s if self.reads.busy_s > 0 else 0.0

    @property
    def lookups(self) -> tuple[int, int]:
        """Of experts in the slots: (asked for, there)."""
        return (self._cache.counters.lookups, self._cache.counters.hits) if self._cache is not None else (0, 0)

    def close(self) -> None:
        """Ends the reads, gives the memory back; no copy may be under way."""
        if self._reader is not None:
            self._reader.close()
        self._reader = None
        if self._device.lost:
            return
        for stage in self._stages:
            self._device.free_event(stage.sent)
        if self._block:
            self._device.free_pinned(self._block)
        self._block, self._stages = 0, []


def _settle(job: ReadJob) -> None:
    """Waits until nothing is read into the job's place any more, however it ended."""
    try:
        job.wait()
    except RuntimeDiagnostic:
        pass  # whoever needed it has been told
