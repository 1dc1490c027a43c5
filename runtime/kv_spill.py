"""Sequences that no step uses, on disk instead of in memory, in the packed form that they have.

Takes a KV cache, a folder and the bytes that the cache may take. `make_room` is told which slots the next step uses and
how long they will be: sequences that do not fit beside them go to disk, the one that waited longest first, and those
that the step uses come back, bit for bit. Chunks lie at fixed places of a file without a name (`runtime.kv_file`), each
a checked record (`runtime.kv_chunks`).

While a sequence comes back its first positions may be computed again beside the reads, when that is sooner
(`runtime.load_or_compute`). What goes wrong never costs a sequence: a slot is given up in memory when all of it is
written, and its place in the file when all of it is back; an interrupt at any moment leaves it in one of the two. What
cannot be read is computed again, and the report says so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import CONTEXT_MULTIPLE, KVCache
from runtime.kv_chunks import BLOCKS, chunk_positions, record_bytes, write_record
from runtime.kv_file import BackingFile, Pwrite, default_directory
from runtime.kv_loader import RecordLoader, StoredRecord, bring_back, place, records_of
from runtime.load_or_compute import Prices, choose_split
from runtime.memory import Reservation
from runtime.weight_reader import Pread

ASSUMED_BYTES_PER_S = 1e9  # of a disk that was not used yet


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
    recomputed: int
    faults: tuple[str, ...]

    def __str__(self) -> str:
        text = (
            f"{self.spills} sequences went to disk ({self.bytes_written / 1e6:.1f} MB), {self.returns} came back in "
            f"{self.wait_s:.2f} s ({self.bytes_read / 1e6:.1f} MB read, {self.recomputed} positions computed again)"
        )
        return f"{text}, {len(self.faults)} of them after a fault: {self.faults[0]}" if self.faults else text


@dataclass
class Sequences:
    """What a spill asks its session. `filled` and `newest` i64 [slots] are the session's: positions written, and the
    last ever written (-1 for none). `recompute(slot, first, last)` computes those positions again. `prices` is given
    the rate of the disk and says what computing costs, None where that is not known yet.
    """

    filled: np.ndarray
    newest: np.ndarray
    recompute: Callable[[int, int, int], None]
    prices: Callable[[float], Prices | None]


class KVSpill:
    """The sequences of one cache that may be on disk. Used by one thread at a time."""

    def __init__(self, kv: KVCache, key: bytes, options: SpillOptions, sequences: Sequences) -> None:
        self.options, self._kv, self._key, self._sequences = options, kv, key, sequences
        self._filled, self._newest = sequences.filled, sequences.newest
        self.chunk = options.chunk or chunk_positions(kv.bytes_per_position)
        if self.chunk % CONTEXT_MULTIPLE or self.chunk < 0:
            raise RuntimeDiagnostic(
                f"chunks of {self.chunk} positions", expected=f"a multiple of {CONTEXT_MULTIPLE} positions"
            )
        chunks = -(-kv.capacity // self.chunk)
        self._slot_bytes = chunks * record_bytes(self.chunk * kv.bytes_per_position)
        self._slot_bytes += record_bytes(kv.ring_bytes(kv.capacity))
        directory = options.directory or default_directory()
        self._staging = Reservation(self._slot_bytes * kv.num_slots, what="the spilled KV cache")
        try:
            self._file = BackingFile(directory, self._staging, preadv=options.preadv, pwritev=options.pwritev)
        except BaseException:
            self._staging.close()
            raise
        self._loader = RecordLoader(kv, self._file.reader, self._file.reservation)
        self._away: dict[int, list[StoredRecord]] = {}
        self._last_used = [0] * kv.num_slots
        self._now = self._serial = self._spills = self._returns = 0
        self._wait_s = 0.0
        self._recomputed = 0
        self._faults: list[str] = []

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
        length = int(self._filled[slot]), int(self._newest[slot])
        start = slot * self._slot_bytes
        records = [
            replace(record, offset=start + record.offset)
            for record in records_of(self._kv, self._key, self._serial, self.chunk, *length)
        ]
        self._loader.settle()
        for record in records:
            memory = self._file.memory[record.offset : record.offset + record.nbytes]
            write_record(memory, record.name, place(self._kv, slot, record.name))
            try:
                self._file.write(record.offset, record.nbytes)
            finally:
                self._file.let_go(record.offset, record.nbytes)
        self._away[slot] = records
        self._kv.release(slot)
        self._spills += 1
        return sum(record.nbytes for record in records)

    def restore(self, slot: int) -> None:
        """Brings the slot's sequence back into memory, if it is on disk: a part is read, the rest computed again."""
        records = self._away.get(slot)
        if records is None:
            return
        filled = int(self._filled[slot])
        split = self._split([record for record in records if record.name.kind == BLOCKS])
        started_s = time.perf_counter()
        compute = partial(self._sequences.recompute, slot)
        try:
            computed, fault = bring_back(self._loader, slot, records, split, filled, compute)
        finally:
            self._filled[slot] = filled
            self._wait_s += time.perf_counter() - started_s
        self._recomputed += computed
        if fault is not None:
            self._faults.append(str(fault.why))
        self.drop(slot)
        self._returns += 1

    def _split(self, blocks: Sequence[StoredRecord]) -> int:
        """Up to where computing is worth it: nowhere, while nothing is known of what it costs."""
        reads = self._file.reader.counters.bytes
        seconds, nbytes = (self._loader.seconds, reads) if reads else (self._file.write_s, self._file.bytes_written)
        prices = self._sequences.prices(nbytes / seconds if seconds > 0 else ASSUMED_BYTES_PER_S)
        return choose_split([record.chunk for record in blocks], prices).split if prices is not None else 0

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
            self._recomputed,
            tuple(self._faults),
        )

    def close(self) -> None:
        """Ends the reads and the file."""
        self._loader.settle()
        self._file.close()
        self._staging.close()
