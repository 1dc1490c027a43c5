"""Runs an artifact whose weights are not all in memory: keeps some, reads the others when a program comes to them.

Takes an artifact and a `StreamPlan`. Gives the address that native code reads weights at: a reservation as large as the
file, of which only what is in memory takes memory. Virtual memory is the table that says where things lie; kernels do
not know that anything is missing, because the program waits (`plan.await_*`) before it reads.

A thread of its own keeps the books, so that an interrupt of the caller can never leave them half done; others read.
Dense pieces that are not resident are read in the order of the program, ahead of it by as much as the window takes,
also while the caller chooses a token. Experts live in a cache (`runtime.expert_cache`); when a step has so many tokens
that every expert will be used, the next layer's are read while this one computes.
"""

from __future__ import annotations

import os
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from runtime.artifact import Artifact
from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import Entry, ExpertCache
from runtime.manifest import PAGE_BYTES, PieceInfo, ProgramInfo
from runtime.memory import Reservation
from runtime.stream_plan import StreamPlan
from runtime.stream_report import StreamReport
from runtime.weight_reader import Pread, ReadJob, WeightReader

ALL_EXPERTS_USED = 3  # choices an expert from which on a step is taken to use all experts of a layer


class WeightStreamer:
    """The weights of one session under a budget. `preadv` is the seam where tests plant faults."""

    def __init__(self, artifact: Artifact, plan: StreamPlan, *, preadv: Pread = os.preadv) -> None:
        manifest = artifact.manifest
        plan.check(manifest)
        self.plan, self.manifest = plan, manifest
        self.pieces = manifest.weights.pieces
        self.resident = frozenset(plan.resident)
        self.expert_pieces = [n for n, piece in enumerate(self.pieces) if piece.kind == "experts"]
        self._layer_of = {piece: layer for layer, piece in enumerate(self.expert_pieces)}
        units = [self.pieces[n].unit for n in self.expert_pieces]
        self.cache = ExpertCache(units, plan.expert_bytes, policy=plan.policy, scope=plan.scope) if units else None
        self.stall_s = 0.0
        self.jobs: list[ReadJob] | None = None  # finished reads, while a profile is made
        self.stalls: list[tuple[str, float, float]] = []
        self._memory = Reservation(manifest.weights.bytes, what="the weights")
        try:
            self._reader = WeightReader(
                str(artifact.path / manifest.weights.file),
                artifact.open_weights(),
                manifest.weights.bytes,
                self._memory.view(),
                threads=plan.threads,
                request_bytes=plan.request_bytes,
                preadv=preadv,
                on_done=self._finished,
            )
        except BaseException:
            self._memory.close()
            raise
        self._books = _Books(self, self._reader, self._memory)
        self._requests: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="stratum-streamer", daemon=True)
        self._thread.start()

    @property
    def address(self) -> int:
        """Where byte 0 of the weights file is, or would be."""
        return self._memory.address

    def load(self) -> None:
        """Reads what stays; returns when it is there."""
        pieces = [self.pieces[n] for n in sorted(self.resident)]
        self._reader.submit([(piece.offset, piece.bytes) for piece in pieces], "resident").wait()

    def wanted(self, program: ProgramInfo) -> bytes:
        """One byte for each wait of the program: 1 where something may have to be read."""
        return bytes(int(wait.piece not in self.resident) for wait in program.awaits)

    def begin(self, ids: Sequence[int]) -> None:
        """A native call begins; returns when the rows of its ids are in memory."""
        self._wait(self._ask(lambda: self._books.rows(ids)), "rows")

    def wait_for(self, program: ProgramInfo, number: int, experts: Sequence[int]) -> None:
        """Wait `number` of the program; `experts` are the ids that its layer chose. Raises RuntimeDiagnostic."""
        wait = program.awaits[number]
        piece = self.pieces[wait.piece]
        layer = self._layer_of.get(wait.piece)
        if layer is None:
            self._wait(self._ask(lambda: self._books.dense(wait.piece, wait.done)), piece.origin)
            return
        self._wait(self._ask(lambda: self._books.experts(layer, experts, wait.done)), piece.origin)
        if len(experts) >= ALL_EXPERTS_USED * (piece.bytes // piece.unit) and layer + 1 < len(self.expert_pieces):
            self._requests.put(lambda: self._books.ahead(layer + 1))

    def end(self) -> None:
        """The native call is over: what it used may go, what the next one needs first is read."""
        self._requests.put(self._books.end)

    def report(self) -> StreamReport:
        """What has happened so far."""
        return StreamReport.of(self, self._reader)

    def memory_bytes(self) -> int:
        """What the weights take in memory now."""
        return self._memory.committed_bytes()

    def close(self) -> None:
        """Ends the threads and gives the memory back."""
        if self._memory.address == 0:
            return
        self._requests.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join()
        self._reader.close()
        self._memory.close()

    def _ask(self, work: Callable[[], list[ReadJob]]) -> list[ReadJob]:
        """Has the books' thread do `work`; gives the reads to wait for."""
        reply = _Reply()

        def answer() -> None:
            try:
                reply.jobs = work()
            except RuntimeDiagnostic as fault:
                reply.fault = fault
            except Exception as error:  # noqa: BLE001 - the thread must live, and the caller must hear of it
                reply.fault = RuntimeDiagnostic(f"streaming weights failed: {type(error).__name__}: {error}")
            reply.ready.set()

        self._requests.put(answer)
        reply.ready.wait()
        if reply.fault is not None:
            raise reply.fault
        return reply.jobs

    def _wait(self, jobs: list[ReadJob], label: str) -> None:
        if not jobs:
            return
        started_s = time.perf_counter()
        try:
            for job in jobs:
                job.wait()
        finally:
            ended_s = time.perf_counter()
            self.stall_s += ended_s - started_s
            if self.jobs is not None:
                self.stalls.append((label, started_s, ended_s))

    def _finished(self, job: ReadJob) -> None:
        if self.jobs is not None:
            self.jobs.append(job)

    def _serve(self) -> None:
        while (work := self._requests.get()) is not None:
            work()


class _Reply:
    """What the books' thread answers."""

    def __init__(self) -> None:
        self.ready = threading.Event()
        self.jobs: list[ReadJob] = []
        self.fault: Any = None


class _Books:
    """What is in memory, and what is on its way. Used by one thread only."""

    def __init__(self, owner: WeightStreamer, reader: WeightReader, memory: Reservation) -> None:
        self._reader, self._memory = reader, memory
        self._pieces, self._plan, self._cache = owner.pieces, owner.plan, owner.cache
        self._resident = owner.resident
        self._expert_pieces = owner.expert_pieces
        self._order = [n for n, p in enumerate(self._pieces) if p.kind == "dense" and n not in owner.resident]
        self._cursor = 0  # in `_order`: what is read next
        self._held: dict[int, ReadJob] = {}
        self._held_bytes = 0
        self._live: dict[int, None] = {}  # waited for in this call, not done with
        self._experts: dict[Entry, ReadJob] = {}
        self._tables = [p for n, p in enumerate(self._pieces) if p.kind == "rows" and n not in owner.resident]
        self._pages: dict[int, ReadJob] = {}  # first byte of a page of a table

    # -- dense pieces

    def dense(self, piece: int, done: Sequence[int]) -> list[ReadJob]:
        """`piece` is needed, `done` are not any more."""
        self._done(done)
        job = self._held.get(piece)
        if job is None or job.fault is not None:
            # The call before ended early, or a read failed: begin again from here.
            for other in [n for n in self._held if n not in self._live or n == piece]:
                self._drop(other)
            self._cursor = self._order.index(piece)
        self._live[piece] = None
        self._fill(needed=piece)
        job = self._held[piece]
        return [] if job.done and job.fault is None else [job]

    def _done(self, pieces: Sequence[int]) -> None:
        for piece in pieces:
            self._live.pop(piece, None)
            if piece in self._held:
                self._drop(piece)

    def _drop(self, piece: int) -> None:
        info, job = self._pieces[piece], self._held.pop(piece)
        _settle(job)
        self._memory.discard(info.offset, info.bytes)
        self._held_bytes -= info.bytes

    def _fill(self, needed: int = -1) -> None:
        """Reads ahead as far as the window takes; `needed` in any case."""
        for _ in range(len(self._order)):
            piece = self._order[self._cursor]
            info = self._pieces[piece]
            if piece in self._held:
                return
            room = self._held_bytes + info.bytes <= self._plan.window_bytes
            if not room and (needed in self._held or needed < 0):
                return
            self._held[piece] = self._reader.submit([(info.offset, info.bytes)], info.origin)
            self._held_bytes += info.bytes
            self._cursor = (self._cursor + 1) % len(self._order)

    def end(self) -> None:
        """The call is over."""
        self._done(list(self._live))
        if self._order and not any(job.fault for job in self._held.values()):
            self._fill()

    # -- experts

    def experts(self, layer: int, ids: Sequence[int], done: Sequence[int]) -> list[ReadJob]:
        """The experts that a layer chose."""
        assert self._cache is not None
        self._done(done)
        if self._order:
            self._fill()
        hits, misses = self._cache.lookup(layer, ids)
        self._give_up(self._cache.admit(layer, misses))
        waiting = []
        for expert in (*hits, *misses):
            job = self._experts.get((layer, expert))
            if job is None or job.fault is not None:
                job = self._experts[layer, expert] = self._submit(layer, expert, urgent=True)
            if not job.done:
                waiting.append(job)
        return waiting

    def ahead(self, layer: int) -> None:
        """Reads the experts of a layer that is sure to use them all, as many as fit beside those in use."""
        assert self._cache is not None
        info = self._pieces[self._expert_pieces[layer]]
        before = self._pieces[self._expert_pieces[layer - 1]]
        capacity = self._cache.capacity_bytes // (len(self._expert_pieces) if self._plan.scope == "layer" else 1)
        room = max(0, capacity - (before.bytes if self._plan.scope == "global" else 0)) // info.unit
        count = info.bytes // info.unit
        have = [e for e in range(count) if self._cache.is_resident(layer, e)]
        missing = [e for e in range(count) if not self._cache.is_resident(layer, e)][: max(0, room - len(have))]
        self._give_up(self._cache.admit(layer, missing))
        for expert in missing:
            if self._cache.is_resident(layer, expert):
                self._experts[layer, expert] = self._submit(layer, expert, urgent=False)

    def _submit(self, layer: int, expert: int, *, urgent: bool) -> ReadJob:
        info = self._pieces[self._expert_pieces[layer]]
        place = (info.offset + expert * info.unit, info.unit)
        return self._reader.submit([place], f"{info.origin}.{expert}", urgent=urgent)

    def _give_up(self, entries: Sequence[Entry]) -> None:
        for layer, expert in entries:
            job = self._experts.pop((layer, expert), None)
            if job is not None:
                _settle(job)
                info = self._pieces[self._expert_pieces[layer]]
                self._memory.discard(info.offset + expert * info.unit, info.unit)

    # -- tables

    def rows(self, ids: Sequence[int]) -> list[ReadJob]:
        """The pages that hold these rows."""
        waiting: list[ReadJob] = []
        for table in self._tables:
            wanted = _pages_of(table, ids)
            if (len(self._pages) + len(wanted)) * PAGE_BYTES > self._plan.rows_bytes:
                self._forget_rows(keep=frozenset(wanted))
            missing = [page for page in wanted if (job := self._pages.get(page)) is None or job.fault is not None]
            if missing:
                job = self._reader.submit(_ranges(missing), table.origin, urgent=True)
                self._pages.update(dict.fromkeys(missing, job))
            waiting += [self._pages[page] for page in wanted if not self._pages[page].done]
        return list(dict.fromkeys(waiting))

    def _forget_rows(self, keep: frozenset[int]) -> None:
        gone = sorted(page for page in self._pages if page not in keep)
        for page in gone:
            _settle(self._pages.pop(page))
        for start, size in _ranges(gone):
            self._memory.discard(start, size)


def _settle(job: ReadJob) -> None:
    """Waits until nothing writes to the job's memory any more, however it ended."""
    try:
        job.wait()
    except RuntimeDiagnostic:
        pass  # whoever needed it has been told; its memory is given back now


def _pages_of(table: PieceInfo, ids: Sequence[int]) -> list[int]:
    """First bytes of the pages that hold rows `ids`, ascending."""
    pages: dict[int, None] = {}
    for row in sorted(dict.fromkeys(ids)):
        first = table.offset + row * table.unit
        start = first // PAGE_BYTES * PAGE_BYTES
        pages.update(dict.fromkeys(range(start, first + table.unit, PAGE_BYTES)))
    return list(pages)


def _ranges(pages: Sequence[int]) -> list[tuple[int, int]]:
    """Neighbouring pages as (offset, bytes)."""
    ranges: list[tuple[int, int]] = []
    for page in pages:
        if ranges and sum(ranges[-1]) == page:
            ranges[-1] = (ranges[-1][0], ranges[-1][1] + PAGE_BYTES)
        else:
            ranges.append((page, PAGE_BYTES))
    return ranges
