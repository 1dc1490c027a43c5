"""Sequences that no step uses, on disk instead of in memory, in the packed form that they have.

Takes a KV cache, a folder and the bytes that the cache may take. `make_room` is told which slots the next step uses and
how long they will be: sequences that do not fit beside them go to disk, the one that waited longest first, and those
that the step uses come back, bit for bit. Chunks lie at fixed places of a file without a name (`runtime.kv_file`), each
a checked record (`runtime.kv_chunks`).

What goes wrong never costs a sequence: a slot is given up in memory when all of it is written, and its place in the
file when all of it is back. An interrupt at any moment leaves it in one of the two.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import CONTEXT_MULTIPLE, KVCache
from runtime.kv_chunks import (
    BLOCKS,
    RING,
    RecordName,
    chunk_positions,
    read_record,
    record_bytes,
    record_fault,
    write_record,
)
from runtime.kv_file import BackingFile, Pwrite, default_directory
from runtime.weight_reader import Pread, ReadJob

READS_AHEAD = 3  # records in memory while a sequence comes back


@dataclass(frozen=True)
class SpillOptions:
    """`limit_bytes`: what the cache may take in memory, None for no limit (then sequences go when `spill` says so).

    `directory` None is a folder on disk. `chunk` positions a record, a multiple of 64, 0 for about 2 MiB. The system
    calls may be replaced: tests plant faults there.
    """

    limit_bytes: int | None = None
    directory: str | None = None
    chunk: int = 0
    preadv: Pread = os.preadv
    pwritev: Pwrite = os.pwritev


@dataclass(frozen=True)
class SpillReport:
    """Counts since the session was opened: sequences that went and came, and what that cost on the disk."""

    spills: int
    returns: int
    bytes_written: int
    write_s: float
    bytes_read: int
    wait_s: float
    on_disk_bytes: int
    retries: int

    def __str__(self) -> str:
        return (
            f"{self.spills} sequences went to disk ({self.bytes_written / 1e6:.1f} MB), "
            f"{self.returns} came back ({self.bytes_read / 1e6:.1f} MB in {self.wait_s:.2f} s)"
        )


@dataclass(frozen=True)
class _Record:
    """Where a record lies in the file, and what it is."""

    name: RecordName
    offset: int
    payload: int

    @property
    def nbytes(self) -> int:
        return record_bytes(self.payload)


class KVSpill:
    """The sequences of one cache that may be on disk. Used by one thread at a time.

    `filled` and `newest` i64 [slots] are the session's: positions written, and the last ever written (-1 for none).
    """

    def __init__(self, kv: KVCache, key: bytes, options: SpillOptions, filled: np.ndarray, newest: np.ndarray) -> None:
        self.options, self._kv, self._key = options, kv, key
        self._filled, self._newest = filled, newest
        self.chunk = options.chunk or chunk_positions(kv.bytes_per_position)
        if self.chunk % CONTEXT_MULTIPLE or self.chunk < 0:
            raise RuntimeDiagnostic(
                f"chunks of {self.chunk} positions", expected=f"a multiple of {CONTEXT_MULTIPLE} positions"
            )
        self._chunk_bytes = record_bytes(self.chunk * kv.bytes_per_position)
        self._chunks = -(-kv.capacity // self.chunk)
        self._slot_bytes = self._chunks * self._chunk_bytes + record_bytes(kv.ring_bytes(kv.capacity))
        directory = options.directory or default_directory()
        self._file = BackingFile(
            directory, self._slot_bytes * kv.num_slots, preadv=options.preadv, pwritev=options.pwritev
        )
        self._away: dict[int, list[_Record]] = {}
        self._last_used = [0] * kv.num_slots
        self._now = self._serial = self._spills = self._returns = 0
        self._wait_s = 0.0
        self._reading = False

    def is_away(self, slot: int) -> bool:
        """Whether the slot's sequence is on disk."""
        return slot in self._away

    def make_room(self, slots: np.ndarray, positions: np.ndarray) -> None:
        """Before a step of these tokens: all that it reads is in memory after this.

        Raises RuntimeDiagnostic where the step alone is more than the limit, where the disk is full or ill; every
        sequence is still there then.
        """
        self._now += 1
        ends: dict[int, int] = {}
        begins: dict[int, None] = {}  # anew: nothing old is read
        for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
            ends[slot] = max(ends.get(slot, 0), position + 1)
            self._last_used[slot] = self._now
            if position == 0:
                begins[slot] = None
        if self.options.limit_bytes is not None:
            needed = sum(self._bytes(slot, end, new=slot in begins) for slot, end in ends.items())
            self._spill_down_to(self.options.limit_bytes, needed, ends)
        for slot in ends:
            if slot in begins:
                self._filled[slot], self._newest[slot] = 0, -1
                self.drop(slot)
                self._kv.release(slot)
            self.restore(slot)

    def _spill_down_to(self, limit: int, needed: int, ends: Mapping[int, int]) -> None:
        """Sequences that are not in `ends` go until those, which take `needed` bytes, fit."""
        if needed > limit:
            raise RuntimeDiagnostic(
                f"the {len(ends)} sequences of a step take {needed} bytes of KV cache",
                expected=f"at most {limit} bytes, the limit of this session",
                hint="step fewer sequences together, or allow more memory",
            )
        idle = {
            slot: self._bytes(slot, 0, new=False)
            for slot in np.flatnonzero(self._filled).tolist()
            if slot not in ends and slot not in self._away
        }
        left = sum(idle.values())
        for slot in sorted(idle, key=lambda s: self._last_used[s]):
            if needed + left <= limit:
                return
            self.spill(slot)
            left -= idle[slot]

    def _bytes(self, slot: int, end: int, *, new: bool) -> int:
        """What the slot takes in memory once it has `end` positions, those of before included unless it is `new`."""
        most = end if new else max(end, int(self._newest[slot]) + 1)
        return self._kv.used_bytes(most, most - 1)

    def spill(self, slot: int) -> int:
        """Writes the slot's sequence and gives its memory back; returns the bytes written, 0 where there are none."""
        if not self._filled[slot] or slot in self._away:
            return 0
        self._serial += 1
        records = list(self._records(slot, int(self._filled[slot]), int(self._newest[slot])))
        self._settle()
        for record in records:
            memory = self._file.memory[record.offset : record.offset + record.nbytes]
            write_record(memory, record.name, self._place(slot, record))
            try:
                self._file.write(record.offset, record.nbytes)
            finally:
                self._file.let_go(record.offset, record.nbytes)
        self._away[slot] = records
        self._kv.release(slot)
        self._spills += 1
        return sum(record.nbytes for record in records)

    def restore(self, slot: int) -> None:
        """Brings the slot's sequence back into memory, if it is on disk. Raises RuntimeDiagnostic; it stays there."""
        records = self._away.get(slot)
        if records is None:
            return
        self._settle()
        self._reading = True
        jobs: list[ReadJob] = []
        for number, record in enumerate(records):
            while len(jobs) < min(len(records), number + READS_AHEAD):
                ahead = records[len(jobs)]
                jobs.append(self._file.read(ahead.offset, ahead.nbytes, f"sequence {slot}"))
            self._take(slot, record, jobs[number])
        self._reading = False
        self.drop(slot)
        self._returns += 1

    def drop(self, slot: int) -> None:
        """Forgets what is on disk of the slot."""
        for record in self._away.pop(slot, []):
            self._file.forget(record.offset, record.nbytes)

    def report(self) -> SpillReport:
        """What has happened so far."""
        reads = self._file.reader.counters
        on_disk = sum(record.nbytes for records in self._away.values() for record in records)
        return SpillReport(
            self._spills,
            self._returns,
            self._file.bytes_written,
            self._file.write_s,
            reads.bytes,
            self._wait_s,
            on_disk,
            reads.retries + self._file.retries,
        )

    def close(self) -> None:
        """Ends the reads and the file."""
        self._file.close()

    def _take(self, slot: int, record: _Record, job: ReadJob) -> None:
        """Waits for a record and copies it to its place."""
        started_s = time.perf_counter()
        try:
            job.wait()
        finally:
            self._wait_s += time.perf_counter() - started_s
        memory = self._file.memory[record.offset : record.offset + record.nbytes]
        fault = record_fault(memory, record.name, record.payload)
        if fault:
            raise RuntimeDiagnostic(
                f"what was spilled of the sequence in slot {slot} {fault}",
                where=self._file.where,
                expected=f"positions {record.name.first}..{record.name.last} as they were written",
                hint="the disk returned other bytes than it was given: release the slot and start it again",
            )
        read_record(memory, self._place(slot, record))
        self._file.let_go(record.offset, record.nbytes)

    def _settle(self) -> None:
        """Nothing that a failed or interrupted return began is in flight any more."""
        if self._reading:
            self._file.reader.drain()
            self._file.let_go(0, self._file.reservation.nbytes)
            self._reading = False

    def _records(self, slot: int, filled: int, newest: int) -> Iterator[_Record]:
        start = slot * self._slot_bytes
        for number, first in enumerate(range(0, filled, self.chunk)):
            last = min(first + self.chunk, filled)
            name = RecordName(self._key, self._serial, BLOCKS, first, last)
            yield _Record(
                name, start + number * self._chunk_bytes, _rounded(last - first) * self._kv.bytes_per_position
            )
        if self._kv.ring_positions:
            name = RecordName(self._key, self._serial, RING, 0, newest + 1)
            yield _Record(name, start + self._chunks * self._chunk_bytes, self._kv.ring_bytes(newest))

    def _place(self, slot: int, record: _Record) -> np.ndarray:
        """The bytes of a record in the cache: a view u8 [layers, heads, bytes]."""
        name = record.name
        if name.kind == RING:
            return self._kv.ring(slot, name.last - 1)
        return self._kv.blocks(slot, name.first, name.first + _rounded(name.last - name.first))


def _rounded(positions: int) -> int:
    return -(-positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
