"""Reads records of a file into the KV cache, a few ahead, on a thread of its own while the caller computes.

Takes the cache, a reader and the reservation that is as large as the file. `RecordLoader.start` begins; `finish` waits,
and says which record was the first that could not be used, and why. A record is copied to the cache only when it is
whole (`runtime.kv_chunks`); what it took on the way is given back at once.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import CONTEXT_MULTIPLE, KVCache
from runtime.kv_chunks import BLOCKS, RING, RecordName, read_record, record_bytes, record_fault
from runtime.load_or_compute import StoredChunk
from runtime.memory import Reservation
from runtime.weight_reader import ReadJob, WeightReader, start_thread

READS_AHEAD = 3  # records in memory at a time


@dataclass(frozen=True)
class StoredRecord:
    """Where a record lies in the file, what it is, and the bytes of what it holds."""

    name: RecordName
    offset: int
    payload: int

    @property
    def nbytes(self) -> int:
        """In the file."""
        return record_bytes(self.payload)

    @property
    def chunk(self) -> StoredChunk:
        """As `runtime.load_or_compute` takes it."""
        return StoredChunk(self.name.first, self.name.last, self.nbytes)


@dataclass(frozen=True)
class LoadFault:
    """The first record that is not in the cache, and why."""

    record: StoredRecord
    why: RuntimeDiagnostic


class _Load:
    """What one `start` began. Its thread holds `busy`, and does nothing any more once it is `stopped`: an interrupt may
    leave it to come later, or never."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self.stopped = False


class RecordLoader:
    """Copies records into one slot at a time. `reservation` byte b is where byte b of the file is read to."""

    def __init__(self, kv: KVCache, reader: WeightReader, reservation: Reservation) -> None:
        self._kv, self._reader, self._memory = kv, reader, reservation
        self._thread: threading.Thread | None = None
        self._load = _Load()
        self._fault: LoadFault | None = None
        self._torn = False
        self.seconds = 0.0  # reading, checking and copying, all loads together

    def start(self, slot: int, records: Sequence[StoredRecord]) -> None:
        """Begins to load; nobody else may touch those positions of the slot until `finish`."""
        self.settle()
        unfinished = RuntimeDiagnostic("reading the stored KV cache was given up", where=self._reader.path)
        self._fault = LoadFault(records[0], unfinished) if records else None
        self._load, self._torn = _Load(), True
        self._thread = threading.Thread(
            target=self._run, args=(self._load, slot, list(records)), name="stratum-kv-loader", daemon=True
        )
        start_thread(self._thread)

    def finish(self) -> LoadFault | None:
        """Waits for the end; None when all is there."""
        if self._thread is not None:
            self._thread.join()
        self._thread, self._torn = None, self._fault is not None
        return self._fault

    def settle(self) -> None:
        """Ends what an error or interrupt left going on."""
        self._load.stopped = True
        with self._load.busy:  # not by the thread, which cannot be joined where its start was interrupted
            self._thread = None
        if self._torn:
            self._reader.drain()
            self._memory.discard(0, self._memory.nbytes)
            self._torn = False

    def _run(self, load: _Load, slot: int, records: list[StoredRecord]) -> None:
        """The thread."""
        with load.busy:
            if not load.stopped:
                self._take_all(load, slot, records)

    def _take_all(self, load: _Load, slot: int, records: list[StoredRecord]) -> None:
        started_s = time.perf_counter()
        jobs: list[ReadJob] = []
        for number, record in enumerate(records):
            try:
                while len(jobs) < min(len(records), number + READS_AHEAD):
                    ahead = records[len(jobs)]
                    jobs.append(self._reader.submit([(ahead.offset, ahead.nbytes)], "kv"))
                jobs[number].wait()
                if load.stopped:
                    return
                self._take(slot, record)
            except RuntimeDiagnostic as why:
                self._fault = LoadFault(record, why)
                return
        self._fault = None
        self.seconds += time.perf_counter() - started_s

    def _take(self, slot: int, record: StoredRecord) -> None:
        memory = self._memory.view()[record.offset : record.offset + record.nbytes]
        fault = record_fault(memory, record.name, record.payload)
        if fault:
            raise RuntimeDiagnostic(
                f"a stored part of the KV cache {fault}",
                where=self._reader.path,
                expected=f"positions {record.name.first}..{record.name.last} as they were written",
                hint="the file was changed, or the disk returned other bytes than it was given",
            )
        read_record(memory, place(self._kv, slot, record.name))
        self._memory.discard(record.offset, record.nbytes)


def bring_back(
    loader: RecordLoader,
    slot: int,
    records: Sequence[StoredRecord],
    split: int,
    positions: int,
    compute: Callable[[int, int], None],
) -> tuple[int, LoadFault | None]:
    """Fills `slot` with `positions` positions: computes [0, split) while the records from there on are read.

    `compute(first, last)` computes positions. What cannot be read is computed too. Gives how many were computed, and
    the fault.
    """
    rings = [record for record in records if record.name.kind == RING]
    blocks = [record for record in records if record.name.kind != RING and record.name.first >= split]
    loader.start(slot, blocks)
    try:
        if split:
            compute(0, split)
    finally:
        fault = loader.finish()
    if fault is None and rings:  # now that nothing is computed that writes to it
        loader.start(slot, rings)
        fault = loader.finish()
    if fault is None:
        return split, None
    loader.settle()
    # What is computed after a ring that was not read would read it.
    first = 0 if rings else fault.record.name.first
    compute(first, positions)
    return split + positions - first, fault


def place(kv: KVCache, slot: int, name: RecordName) -> np.ndarray:
    """The bytes of a record in the cache: a view u8 [layers, heads, bytes]."""
    if name.kind == RING:
        return kv.ring(slot, name.last - 1)
    return kv.blocks(slot, name.first, name.first + whole_groups(name.last - name.first))


def records_of(kv: KVCache, key: bytes, serial: int, chunk: int, filled: int, newest: int) -> Iterator[StoredRecord]:
    """The records of a sequence, one behind the other from byte 0: its chunks, then its ring where there is one."""
    at = 0
    for first in range(0, filled, chunk):
        last = min(first + chunk, filled)
        name = RecordName(key, serial, BLOCKS, first, last)
        record = StoredRecord(name, at, whole_groups(last - first) * kv.bytes_per_position)
        yield record
        at += record.nbytes
    if kv.ring_positions:
        yield StoredRecord(RecordName(key, serial, RING, 0, newest + 1), at, kv.ring_bytes(newest))


def whole_groups(positions: int) -> int:
    """Rounded up to what the cache counts in."""
    return -(-positions // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
