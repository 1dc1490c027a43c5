"""One sequence, or a few, whose KV cache is larger than the memory it may use: parts of layers come and go.

Takes the cache, the bytes that it may take and a folder. Behind the cache lies a file of its size without a name, byte
b of the one at byte b of the other (`runtime.kv_file`): address space is the table, and kernels do not know. A program
says which layer's keys and values it touches next (`plan.await_kv`). While everything fits nothing happens. Then the
newest positions of every layer stay, as many as there is room for beside one whole layer, and the older ones are read
before the layer's wait and given back behind it (`runtime.kv_books` decides). What leaves memory for the first time, or
changed, is written before.

Only whole pages of groups of 64 positions go: what is newer than the last full group and the ring of a low-bit cache
stay. Used by one thread at a time, the one that keeps the books of weights. What an interrupt left half done is thrown
away and read again; positions are given up only when the file has all of them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.kv_books import GROUP, KVBooks
from runtime.kv_cache import KVCache
from runtime.kv_file import BackingFile, Pwrite, default_directory
from runtime.manifest import ProgramInfo
from runtime.memory import PAGE_BYTES
from runtime.weight_reader import Pread, ReadJob

THREADS = 4  # that read: parts of heads are short requests, and a drive wants several at once


@dataclass(frozen=True)
class KVStreamOptions:
    """`limit_bytes`: what the cache may take in memory. `directory` None is a folder on disk. The system calls may be
    replaced: tests plant faults there."""

    limit_bytes: int
    directory: str | None = None
    preadv: Pread = os.preadv
    pwritev: Pwrite = os.pwritev


@dataclass(frozen=True)
class KVStreamReport:
    """Counts since the session was opened. `calls` are those in which something went, `layers` the most of which
    something did, `share` the largest part of the cache that did."""

    limit_bytes: int
    calls: int
    layers: int
    share: float
    read_bytes: int
    written_bytes: int
    stall_s: float
    retries: int

    def __str__(self) -> str:
        if not self.calls:
            return "the KV cache was in memory all the time"
        return (
            f"KV cache: at most {100 * self.share:.0f} % on disk, of {self.layers} layers, "
            f"{self.read_bytes / self.calls / 1e6:.1f} MB read a step "
            f"({self.read_bytes / 1e6:.1f} MB in {self.calls} steps, {self.written_bytes / 1e6:.1f} MB written), "
            f"waited {self.stall_s:.2f} s"
        )


class KVStreamer:
    """The layers of one cache. `filled` i64 [slots] is the session's: positions written."""

    def __init__(self, kv: KVCache, options: KVStreamOptions, filled: np.ndarray) -> None:
        self._kv, self.options, self._filled = kv, options, filled
        self._finished_jobs: list[ReadJob] | None = None  # while a profile is made
        self._stalls: list[tuple[str, float, float]] = []
        self._file = BackingFile(
            options.directory or default_directory(), kv.reservation, preadv=options.preadv, pwritev=options.pwritev,
            threads=THREADS, on_done=self._finished,
        )  # fmt: skip
        self._books = KVBooks(kv.layers, kv.num_slots)
        self._jobs: dict[
            tuple[int, int], list[tuple[int, ReadJob]]
        ] = {}  # by layer and slot: first group, newest first
        self._reach = np.zeros(kv.num_slots, np.int64)  # positions that may ever have been written since it was empty
        self._slots: list[int] = []  # of the call
        self._torn = False
        self._calls = self._most = 0
        self._share = self._stall_s = 0.0

    # -- one native call

    def begin(self, positions: np.ndarray, slots: np.ndarray) -> None:
        """A call with these tokens begins. Raises RuntimeDiagnostic where a single layer does not fit."""
        if self._torn:
            self._settle()
        with self._keeping():
            starts: dict[int, int] = {}
            ends: dict[int, int] = {}
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
                starts.setdefault(slot, position)
                ends[slot] = max(ends.get(slot, 0), position + 1)
            for slot in [slot for slot, position in starts.items() if position == 0]:
                self._filled[slot] = 0
                self.forget(slot)
                self._kv.release(slot)
            self._trim()
            self._slots = list(ends)
            self._choose(starts, ends, len(positions))
            for slot, end in ends.items():
                self._reach[slot] = max(int(self._reach[slot]), end)

    def _choose(self, starts: dict[int, int], ends: dict[int, int], tokens: int) -> None:
        """What goes in this call."""
        kv, limit = self._kv, self.options.limit_bytes
        lengths = {slot: int(n) for slot, n in enumerate(self._filled) if n}
        before = {slot: lengths.get(slot, 0) // GROUP for slot in ends}
        lengths |= {slot: max(end, lengths.get(slot, 0)) for slot, end in ends.items()}
        hot = sum(kv.hot_bytes(n) for n in lengths.values())
        room = kv.layers if not kv.group_bytes else max(0, limit - hot) // kv.group_bytes
        groups = {slot: n // GROUP for slot, n in lengths.items()}
        after = {slot: groups.pop(slot) for slot in ends}
        if kv.layers * (sum(after.values()) + sum(groups.values())) > room:
            for slot, n in groups.items():  # not needed now: all of it goes
                for layer in range(kv.layers):
                    self._give_up(layer, slot, n)
        else:
            room -= kv.layers * sum(groups.values())
        whole = sum(after.values())
        if kv.layers and (limit < hot or room < whole):
            raise RuntimeDiagnostic(
                f"one layer of the KV cache takes {whole * kv.group_bytes} bytes, and what always stays {hot}",
                expected=f"at most {limit} bytes in all, the limit of this session",
                hint="a smaller context, fewer sequences in a step, or more memory",
            )
        first = {slot: position // GROUP for slot, position in starts.items()}
        self._books.begin(before, first, after, room, tokens)
        going = self._books.division.going
        if any(going):
            self._calls += 1
            self._most = max(self._most, sum(n > 0 for n in going))
            self._share = max(self._share, sum(going) / (kv.layers * whole))

    def _trim(self) -> None:
        """Gives back what lies behind the end of sequences that went back."""
        kv = self._kv
        for slot in np.flatnonzero(self._reach > self._filled).tolist():
            end = -(-int(self._filled[slot]) // GROUP) * GROUP
            reach = min(kv.capacity, -(-int(self._reach[slot]) // GROUP) * GROUP + GROUP)
            for layer in range(kv.layers):
                spans = kv.full_pages(layer, slot, end), kv.full_pages(layer, slot, reach)
                for (_, kept), (_, last) in zip(*spans, strict=True):
                    if last > kept + PAGE_BYTES:  # a page may hold the end of what stays
                        kv.reservation.discard(kept + PAGE_BYTES, last - kept - PAGE_BYTES)
            gone = int(self._books.gone[:, slot].max(initial=0)) * GROUP  # comes back once more
            self._reach[slot] = max(int(self._filled[slot]), gone)

    def wanted(self, program: ProgramInfo) -> np.ndarray:
        """u8, one for each wait of the program: 1 where something is to be done."""
        if any(self._books.division.going):
            return np.ones(len(program.kv_awaits), np.uint8)
        return np.array([not self._books.is_there(layer) for layer in program.kv_awaits], np.uint8)

    def wait_for(self, layer: int) -> None:
        """Returns when the layer is in memory. Raises RuntimeDiagnostic."""
        with self._keeping():
            for goal in self._books.passes(layer):
                self._give_up(*goal)
            for goal in self._books.makes_room(layer):
                self._give_up(*goal)
            for slot in self._slots:
                if any(job.fault is not None for _, job in self._jobs.get((layer, slot), ())):
                    self._drop(layer, slot)
            self._read(layer)
        started_s = time.perf_counter()
        waits = any((layer, slot) in self._jobs for slot in self._slots)
        try:
            for slot in self._slots:
                jobs = self._jobs.get((layer, slot), [])
                while jobs:
                    first, job = jobs[0]
                    job.wait()
                    self._books.came(layer, slot, first)
                    del jobs[0]
                self._jobs.pop((layer, slot), None)
        finally:
            ended_s = time.perf_counter()
            self._stall_s += ended_s - started_s
            if waits and self._finished_jobs is not None:
                self._stalls.append((f"kv of layer {layer}", started_s, ended_s))

    def end(self) -> None:
        """The call is over: what goes of the last layer does, and the first of the next call are read."""
        if self._torn or not self._slots:
            return
        with self._keeping():
            served = self._books.current >= 0
            for goal in self._books.passes(-1):
                self._give_up(*goal)
            if served:
                self._read(-1)
            self._slots = []

    # -- reading

    def _read(self, layer: int) -> None:
        """Begins to read what the books say now that the program is at `layer`."""
        for number, slot, first, end in self._books.reads(layer):
            pages = zip(self._pages(number, slot, first), self._pages(number, slot, end), strict=True)
            ranges = [(start, stop - start) for (_, start), (_, stop) in pages if stop > start]
            job = self._file.reader.submit(ranges, f"kv of layer {number}")
            self._jobs.setdefault((number, slot), []).append((first, job))

    def _pages(self, layer: int, slot: int, groups: int) -> list[tuple[int, int]]:
        """By head, the whole pages of the first groups."""
        return self._kv.full_pages(layer, slot, groups * GROUP)

    def _discard(self, layer: int, slot: int, first: int, end: int) -> None:
        """Gives the memory of groups first..end back."""
        for (_, start), (_, stop) in zip(self._pages(layer, slot, first), self._pages(layer, slot, end), strict=True):
            if stop > start:
                self._kv.reservation.discard(start, stop - start)

    def _drop(self, layer: int, slot: int) -> None:
        """Throws away what is on its way."""
        for _, job in self._jobs.pop((layer, slot), ()):
            _settled(job)
        asked, gone = (int(array[layer, slot]) for array in (self._books.asked, self._books.gone))
        self._books.dropped(layer, slot)
        self._discard(layer, slot, asked, gone)

    # -- writing

    def _give_up(self, layer: int, slot: int, groups: int) -> None:
        """Writes what the file does not have of the first `groups`, and gives the memory back."""
        self._drop(layer, slot)
        had = int(self._books.gone[layer, slot])
        if groups <= had:
            return
        first, end = self._books.unwritten(layer, slot, groups)
        for (_, start), (_, stop) in zip(self._pages(layer, slot, first), self._pages(layer, slot, end), strict=True):
            if stop > start:
                self._file.write(start, stop - start)
        self._books.went(layer, slot, groups)
        self._discard(layer, slot, had, groups)

    # -- books

    def forget(self, slot: int) -> None:
        """The slot's sequence is over."""
        for layer, other in list(self._jobs):
            if other == slot:
                self._drop(layer, other)
        self._books.forget(slot)
        self._reach[slot] = 0

    def _settle(self) -> None:
        """Throws away what an interrupt left half done: reads begin anew."""
        self._file.reader.drain()
        self._jobs.clear()
        for layer, slot in np.argwhere(self._books.gone > 0).tolist():
            self._books.dropped(layer, slot)
            self._discard(layer, slot, 0, int(self._books.gone[layer, slot]))
        self._torn = False

    @contextmanager
    def _keeping(self) -> Iterator[None]:
        """Round every change of the books: what is left by an interrupt is torn."""
        self._torn = True
        try:
            yield
        except RuntimeDiagnostic:
            self._torn = False
            raise
        self._torn = False

    def whole_positions(self, slot: int) -> int:
        """Positions that the sequence of `slot` may have with all layers in memory, the others being there, too."""
        kv = self._kv
        others = [int(n) for other, n in enumerate(self._filled) if other != slot and n]
        left = self.options.limit_bytes - sum(kv.hot_bytes(n) + kv.layers * kv.layer_bytes(n) for n in others)
        low, high = 0, kv.capacity // GROUP
        while low < high:
            middle = (low + high + 1) // 2
            positions = middle * GROUP
            fits = kv.hot_bytes(positions) + kv.layers * kv.layer_bytes(positions) <= left
            low, high = (middle, high) if fits else (low, middle - 1)
        return low * GROUP

    def is_whole(self, slot: int) -> bool:
        """Whether all layers of the sequence are in memory."""
        return not self._books.gone[:, slot].any()

    def settle_reads(self) -> None:
        """Waits for what is being read ahead, so that a report counts all of it."""
        for jobs in list(self._jobs.values()):
            for _, job in list(jobs):
                _settled(job)

    def report(self) -> KVStreamReport:
        """What has happened so far."""
        reads = self._file.reader.counters
        return KVStreamReport(
            self.options.limit_bytes,
            self._calls,
            self._most,
            self._share,
            reads.bytes,
            self._file.bytes_written,
            self._stall_s,
            reads.retries + self._file.retries,
        )

    def record(self, on: bool) -> tuple[list[tuple[str, float, float, int]], list[tuple[str, float, float]]]:
        """Begins or ends to note each read and wait; at the end gives them, as `Profile` keeps them."""
        jobs, stalls = self._finished_jobs or [], self._stalls
        self._finished_jobs, self._stalls = ([] if on else None), []
        return [(job.label, job.started_s, job.ended_s, job.nbytes) for job in jobs], stalls

    def _finished(self, job: ReadJob) -> None:
        if self._finished_jobs is not None:
            self._finished_jobs.append(job)

    def close(self) -> None:
        """Ends the reads and the file."""
        self._file.close()


def _settled(job: ReadJob) -> None:
    """Waits until nothing writes to the job's memory any more, however it ended."""
    try:
        job.wait()
    except RuntimeDiagnostic:
        pass  # its memory is given back now
