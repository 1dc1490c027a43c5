"""One sequence, or a few, whose KV cache is larger than the memory it may use: layers come and go between launches.

Takes the cache, the bytes that it may take and a folder. Behind the cache lies a file of its size without a name, byte
b of the one at byte b of the other (`runtime.kv_file`): address space is the table, and kernels do not know. A program
says which layer's keys and values it touches next (`plan.await_kv`). While everything fits nothing happens. Then some
layers stay and the others, spread evenly between them, are read before their wait and given back behind it, the next
one ahead of its own. What a step appended to a layer is written before the layer goes.

Only whole pages of positions that are full go: the newest 64 or more of every head and the ring of a low-bit cache
stay. Used by one thread at a time, the one that keeps the books of weights. What an interrupt left half done is thrown
away and read again; a layer is given up only when the file has all of it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.kv_cache import KVCache
from runtime.kv_file import BackingFile, Pwrite, default_directory
from runtime.manifest import ProgramInfo
from runtime.weight_reader import Pread, ReadJob

GROUP = 64  # positions that are written once at least: whole blocks and groups of keys that share scales
LAYERS_AT_ONCE = 2  # of those that go: the one in use, and the next


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
    """Counts since the session was opened. `calls` are those in which layers went, `layers` the most that did."""

    limit_bytes: int
    calls: int
    layers: int
    read_bytes: int
    written_bytes: int
    stall_s: float
    retries: int

    def __str__(self) -> str:
        if not self.calls:
            return "the KV cache was in memory all the time"
        return (
            f"KV cache: {self.layers} layers on disk, {self.read_bytes / self.calls / 1e6:.1f} MB read a step "
            f"({self.read_bytes / 1e6:.1f} MB in {self.calls} steps, {self.written_bytes / 1e6:.1f} MB written), "
            f"waited {self.stall_s:.2f} s"
        )


def going_layers(layers: int, fit: int) -> tuple[list[int], int]:
    """(those that go, ascending; how many of them may be in memory at once), where `fit` of all layers fit."""
    if fit >= layers:
        return [], LAYERS_AT_ONCE
    at_once = min(fit, LAYERS_AT_ONCE)
    order = sorted(range(layers), key=_reversed_bits)
    return sorted(order[: layers - fit + at_once]), at_once


class KVStreamer:
    """The layers of one cache. `filled` i64 [slots] is the session's: positions written."""

    def __init__(self, kv: KVCache, options: KVStreamOptions, filled: np.ndarray) -> None:
        self._kv, self.options, self._filled = kv, options, filled
        self._finished_jobs: list[ReadJob] | None = None  # while a profile is made
        self._stalls: list[tuple[str, float, float]] = []
        self._file = BackingFile(
            options.directory or default_directory(), kv.reservation, preadv=options.preadv, pwritev=options.pwritev,
            on_done=self._finished,
        )  # fmt: skip
        shape = (kv.layers, kv.num_slots)
        self._on_file = np.zeros(shape, np.int64)  # positions, by layer and slot, that the file has
        self._clean = np.zeros(shape, np.int64)  # of those, what memory has not changed since
        self._there = np.ones(shape, np.bool_)  # in memory
        self._jobs: dict[tuple[int, int], ReadJob] = {}
        self._ends: dict[int, int] = {}  # of the call: positions of its slots after it
        self._going: list[int] = []  # layers that do not stay
        self._current = -1
        self._torn = False
        self._calls = self._most = 0
        self._stall_s = 0.0
        self._at_once = LAYERS_AT_ONCE

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
            self._ends, self._current = ends, -1
            self._choose()
            for slot, position in starts.items():  # only now: what went just before is on file as it was
                np.minimum(self._clean[:, slot], position // GROUP * GROUP, out=self._clean[:, slot])

    def _choose(self) -> None:
        """Which layers go in this call."""
        kv, limit = self._kv, self.options.limit_bytes
        lengths = {slot: int(n) for slot, n in enumerate(self._filled) if n}
        lengths |= {slot: max(end, lengths.get(slot, 0)) for slot, end in self._ends.items()}
        hot = sum(kv.hot_bytes(n) for n in lengths.values())
        whole = {slot: kv.layer_bytes(n) for slot, n in lengths.items()}
        left = limit - hot
        idle = [slot for slot in lengths if slot not in self._ends]
        if sum(whole.values()) * kv.layers > left:
            for slot in idle:  # not needed now: all of it goes
                for layer in range(kv.layers):
                    self._give_up(layer, slot, int(self._filled[slot]))
        else:
            left -= sum(whole[slot] for slot in idle) * kv.layers
        layer_bytes = sum(whole[slot] for slot in self._ends)
        fit = kv.layers if not layer_bytes else left // layer_bytes
        if fit < min(1, kv.layers):
            raise RuntimeDiagnostic(
                f"one layer of the KV cache takes {layer_bytes} bytes, and what always stays {hot}",
                expected=f"at most {limit} bytes in all, the limit of this session",
                hint="a smaller context, fewer sequences in a step, or more memory",
            )
        self._going, self._at_once = going_layers(kv.layers, fit)
        if not self._going:
            return
        self._calls += 1
        self._most = max(self._most, len(self._going))
        for layer in reversed(self._going):
            if self._held() <= self._at_once:
                break
            for slot in self._ends:
                self._give_up(layer, slot, int(self._filled[slot]))

    def wanted(self, program: ProgramInfo) -> np.ndarray:
        """u8, one for each wait of the program: 1 where something is to be done."""
        if self._going:
            return np.ones(len(program.kv_awaits), np.uint8)
        slots = list(self._ends)
        return np.array([not self._there[layer, slots].all() for layer in program.kv_awaits], np.uint8)

    def wait_for(self, layer: int) -> None:
        """Returns when the layer is in memory. Raises RuntimeDiagnostic."""
        with self._keeping():
            self._pass(layer)
            self._submit(layer)
            self._ahead(layer)
        started_s = time.perf_counter()
        waits = any((layer, slot) in self._jobs for slot in self._ends)
        try:
            for slot in self._ends:
                job = self._jobs.get((layer, slot))
                if job is not None:
                    job.wait()
                    self._there[layer, slot] = True
                    del self._jobs[layer, slot]
        finally:
            ended_s = time.perf_counter()
            self._stall_s += ended_s - started_s
            if waits and self._finished_jobs is not None:
                self._stalls.append((f"kv of layer {layer}", started_s, ended_s))

    def end(self) -> None:
        """The call is over: the last layer goes, and the first of the next call are read."""
        if self._torn or not self._ends:
            return
        with self._keeping():
            last = self._current
            self._pass(-1)
            if last >= 0:
                self._ahead(last)
            self._ends = {}

    def _pass(self, layer: int) -> None:
        """The layer before is done with."""
        before, self._current = self._current, layer
        if before in self._going and before != layer:
            for slot, end in self._ends.items():
                self._give_up(before, slot, end)

    # -- reading

    def _submit(self, layer: int) -> None:
        for slot in self._ends:
            job = self._jobs.get((layer, slot))
            if self._there[layer, slot] or (job is not None and job.fault is None):
                continue
            spans = self._kv.full_pages(layer, slot, int(self._on_file[layer, slot]))
            ranges = [(first, end - first) for first, end in spans if end > first]
            self._jobs[layer, slot] = self._file.reader.submit(ranges, f"kv of layer {layer}")

    def _ahead(self, layer: int) -> None:
        """The next layers that go, as many as may be there at once."""
        later = [n for n in self._going if n > layer] + [n for n in self._going if n <= layer]
        for following in later:
            if self._held() >= self._at_once:
                return
            if following != layer or self._current != layer:
                self._submit(following)

    def _held(self) -> int:
        """Layers of those that go that are in memory or on their way."""
        slots = list(self._ends)
        return sum(
            bool(self._there[layer, slots].any()) or any((layer, slot) in self._jobs for slot in slots)
            for layer in self._going
        )

    # -- writing

    def _give_up(self, layer: int, slot: int, positions: int) -> None:
        """Writes what the file does not have of the first `positions`, and gives the memory back."""
        job = self._jobs.pop((layer, slot), None)
        if job is not None:
            _settled(job)
        pages, memory = self._kv.full_pages, self._kv.reservation
        had = pages(layer, slot, int(self._on_file[layer, slot]))
        if not self._there[layer, slot]:
            for first, end in had if job is not None else []:
                memory.discard(first, end - first)
            return
        full = positions // GROUP * GROUP
        now = pages(layer, slot, full)
        for (_, end), (_, clean) in zip(now, pages(layer, slot, int(self._clean[layer, slot])), strict=True):
            if end > clean:
                self._file.write(clean, end - clean)
        self._on_file[layer, slot] = self._clean[layer, slot] = full
        self._there[layer, slot] = False
        for (first, end), (_, old_end) in zip(now, had, strict=True):
            memory.discard(first, end - first)
            beyond = end + self._kv.tail_bytes  # of a sequence that went back
            if old_end > beyond:
                memory.discard(beyond, old_end - beyond)

    # -- books

    def forget(self, slot: int) -> None:
        """The slot's sequence is over."""
        for layer, other in list(self._jobs):
            if other == slot:
                _settled(self._jobs.pop((layer, other)))
        self._on_file[:, slot] = self._clean[:, slot] = 0
        self._there[:, slot] = True

    def _settle(self) -> None:
        """Throws away what an interrupt left half done: reads begin anew."""
        self._file.reader.drain()
        for layer, slot in list(self._jobs):
            del self._jobs[layer, slot]
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
        return bool(self._there[:, slot].all()) and not any(other == slot for _, other in self._jobs)

    def report(self) -> KVStreamReport:
        """What has happened so far."""
        reads = self._file.reader.counters
        return KVStreamReport(
            self.options.limit_bytes,
            self._calls,
            self._most,
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


def _reversed_bits(number: int) -> int:
    """An order in which any first few of 0, 1, 2, ... lie evenly among all."""
    return int(f"{number:016b}"[::-1], 2)
