"""Reads ranges of a file (weights, spilled KV) straight from the disk into their place in memory, on a few threads.

Takes an open file and a reservation as large as the file: byte b of the file goes to byte b of the reservation, so a
read needs no copy and an offset means the same everywhere. (Or any memory, where each job says its place.) Reads are
O_DIRECT (no page cache, which would count against the memory of the process a second time); where a file system refuses
that, buffered, with the cached pages dropped behind. The interpreter lock is free while a thread reads.

A short read goes on where it stopped. EIO and the like are tried again a few times. What cannot be read ends in one
RuntimeDiagnostic, kept with the job, for whoever waits for it.
"""

from __future__ import annotations

import errno
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT

PAGE_BYTES = 4096
TRIES = 4
_PAUSES_S = (0.01, 0.1, 0.5)
_LATCH_S = 0.05  # between looks at a job whose latch an interrupted waiter kept
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP, errno.EFAULT)  # of O_DIRECT; the last for memory of some drivers

Pread = Callable[[int, Sequence[memoryview], int], int]


class ReadJob:
    """Ranges that were asked for together. `wait` returns when all are there, or raises what went wrong."""

    __slots__ = ("_latch", "_left", "done", "ended_s", "fault", "label", "nbytes", "started_s")

    def __init__(self, label: str, nbytes: int, requests: int) -> None:
        self.label, self.nbytes = label, nbytes
        self.fault: RuntimeDiagnostic | None = None
        self.started_s = self.ended_s = 0.0
        self.done = not requests
        self._left = requests
        self._latch = threading.Lock()  # held until the end; an Event could be left locked by an interrupt
        self._latch.acquire()

    def wait(self, meanwhile: Callable[[], None] | None = None) -> None:
        """`meanwhile` is called now and then; what it raises ends the wait, not the job."""
        while not self.done:
            if meanwhile is not None:
                meanwhile()
            if self._latch.acquire(timeout=_LATCH_S):
                self._latch.release()  # for others that wait
        if self.fault is not None:
            raise self.fault

    def finish_one(self, fault: RuntimeDiagnostic | None, started_s: float) -> bool:
        """Called by the pool, under its lock; True for the last."""
        self.started_s = min(self.started_s or started_s, started_s)
        self.fault = self.fault or fault
        self._left -= 1
        if self._left:
            return False
        self.ended_s = time.perf_counter()
        self.done = True
        self._latch.release()
        return True


@dataclass
class ReadCounters:
    """Since the pool was made. `busy_s` is the time in which at least one read was in flight."""

    bytes: int = 0
    requests: int = 0
    retries: int = 0
    short_reads: int = 0
    busy_s: float = 0.0

    @property
    def gigabytes_per_s(self) -> float:
        return self.bytes / self.busy_s / 1e9 if self.busy_s > 0 else 0.0


class WeightReader:
    """Threads that read one file. `descriptor` is taken over: `close` closes it.

    `memory` is the reservation's bytes, or those of any memory where `submit` says the places. `preadv` may be replaced
    (tests plant faults there). `direct` is False where reads are buffered. `prepare` is called with (offset, bytes) of
    each request before it is read, by the thread that reads: it finds pages for it. `what` the file holds and `hint`,
    what to do when it is cut short, go to diagnostics. `changes`: somebody writes to it meanwhile; otherwise a file
    that is written to ends its reads, for what was read before belongs to other bytes.
    """

    def __init__(
        self,
        path: str,
        descriptor: int,
        nbytes: int,
        memory: np.ndarray,
        *,
        threads: int = 3,
        request_bytes: int = 1 << 20,
        preadv: Pread = os.preadv,
        prepare: Callable[[int, int], None] | None = None,
        on_done: Callable[[ReadJob], None] | None = None,
        what: str = "the weights",
        hint: str = REBUILD_HINT,
        changes: bool = False,
    ) -> None:
        self.path, self.nbytes = path, nbytes
        self._what, self._hint = what, hint
        self.preadv = preadv
        self.counters = ReadCounters()
        self._descriptor, self.direct = _direct(descriptor)
        self._written_ns = None if changes else os.fstat(descriptor).st_mtime_ns
        self._memory: memoryview = memory.data
        self._request_bytes = max(PAGE_BYTES, request_bytes // PAGE_BYTES * PAGE_BYTES)
        self._prepare, self._on_done = prepare, on_done
        self._requests: deque[tuple[int, int, int, ReadJob]] = deque()  # offset, bytes, place, job
        self._lock = threading.Lock()
        # One item a request wakes a thread. Not a condition: an interrupt of the caller inside of its methods leaves it
        # locked, or counting a thread as waiting that is not, and then nobody comes for a request.
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._in_flight, self._busy_since = 0, 0.0
        self._closed = False
        self._threads: list[threading.Thread] = []
        try:
            for number in range(threads):
                thread = threading.Thread(target=self._work, name=f"stratum-reader-{number}", daemon=True)
                self._threads.append(thread)
                start_thread(thread)
        except BaseException:  # an interrupt, too: those that began end
            self._closed = True
            self._wake(threads)
            os.close(self._descriptor)
            raise

    def submit(
        self,
        ranges: Sequence[tuple[int, int]],
        label: str,
        *,
        urgent: bool = False,
        place: int | None = None,
    ) -> ReadJob:
        """Begins to read [offset, offset + bytes) ranges of whole pages; urgent ones go before what is waiting.

        `place`: where in the memory the ranges go, one behind the other, on a page; None: each at its own offset.
        """
        parts: list[tuple[int, int, int]] = []
        for offset, nbytes in ranges:
            goal = offset if place is None else place
            for at in range(0, nbytes, self._request_bytes):
                parts.append((offset + at, min(self._request_bytes, nbytes - at), goal + at))
            place = None if place is None else place + nbytes
        job = ReadJob(label, sum(nbytes for _, nbytes in ranges), len(parts))
        with self._lock:
            if self._closed:
                raise RuntimeDiagnostic(f"the file of {self._what} is closed", where=self.path)
            self._wake(len(parts))  # first: a thread that finds nothing is harmless, a request without a thread is not
            if urgent:
                self._requests.extendleft((*part, job) for part in reversed(parts))
            else:
                self._requests.extend((*part, job) for part in parts)
        return job

    def _wake(self, count: int) -> None:
        for _ in range(count):
            self._wakes.put(None)

    def drain(self) -> None:
        """Returns when nothing is waiting or in flight any more."""
        with self._lock:
            for at, size, _, job in self._requests:
                job.finish_one(RuntimeDiagnostic(f"the read of {size} bytes at {at} was given up"), 0.0)
            self._requests.clear()
        while self._in_flight:
            time.sleep(0.001)

    def close(self) -> None:
        """Drops what is waiting, ends the reads in flight, closes the file."""
        with self._lock:
            self._closed = True
            closed = RuntimeDiagnostic(f"the file of {self._what} was closed while it was read", where=self.path)
            for *_, job in self._requests:
                job.finish_one(closed, time.perf_counter())
            self._requests.clear()
            self._wake(len(self._threads))
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._memory = memoryview(b"")
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _work(self) -> None:
        while True:
            self._wakes.get()
            with self._lock:
                if self._closed:
                    return
                if not self._requests:
                    continue
                at, size, place, job = self._requests.popleft()
                started_s = time.perf_counter()
                if self._in_flight == 0:
                    self._busy_since = started_s
                self._in_flight += 1
            fault: RuntimeDiagnostic | None = None
            if job.fault is None:
                try:
                    if self._prepare is not None:
                        self._prepare(at, size)
                    self._read(at, size, place)
                except RuntimeDiagnostic as error:
                    fault = error
                except Exception as error:  # noqa: BLE001 - a thread that died would leave its waiter for ever
                    fault = RuntimeDiagnostic(f"reading {self._what} failed: {error}", where=self.path)
            with self._lock:
                self._in_flight -= 1
                now_s = time.perf_counter()
                self.counters.busy_s += now_s - self._busy_since
                self._busy_since = now_s
                self.counters.requests += 1
                self.counters.bytes += 0 if fault else size
                last = job.finish_one(fault, started_s)
            if last and self._on_done is not None:
                self._on_done(job)

    def _read(self, at: int, size: int, place: int) -> None:
        """All of one range, however many system calls that takes."""
        end, tries, moved = at + size, 0, place - at
        while at < end:
            try:
                got = self.preadv(self._descriptor, [self._memory[at + moved : end + moved]], at)
            except OSError as fault:
                if fault.errno == errno.EINTR:
                    continue
                if self.direct and fault.errno in _REFUSALS:
                    self._read_buffered()
                    continue
                tries += 1
                if tries >= TRIES:
                    raise self._refusal(fault, at) from None
                self.counters.retries += 1
                time.sleep(_PAUSES_S[tries - 1])
                continue
            if got <= 0:
                raise self._cut(at)
            if not self.direct:
                os.posix_fadvise(self._descriptor, at, got, os.POSIX_FADV_DONTNEED)
            at += got
            if at < end:
                self.counters.short_reads += 1
                # A direct read begins on a page: what came of the last one is read again.
                at -= at % PAGE_BYTES if self.direct else 0
                if got < PAGE_BYTES and self.direct:
                    self._read_buffered()
        found = os.fstat(self._descriptor)
        if self._written_ns not in (None, found.st_mtime_ns):
            raise self._cut(found.st_size) if found.st_size < self.nbytes else self._changed()

    def _cut(self, size: int) -> RuntimeDiagnostic:
        return RuntimeDiagnostic(
            f"{self._what} end at byte {size} instead of {self.nbytes}",
            where=self.path,
            expected="the file as it was when it was opened",
            hint=self._hint,
        )

    def _changed(self) -> RuntimeDiagnostic:
        return RuntimeDiagnostic(
            f"the file of {self._what} was written to while it was read",
            where=self.path,
            expected="the file as it was when it was opened",
            hint="begin again, and write files that are in use under another name first",
        )

    def _read_buffered(self) -> None:
        """From here on through the page cache."""
        import fcntl

        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)
        self.direct = False

    def _refusal(self, fault: OSError, at: int) -> RuntimeDiagnostic:
        return RuntimeDiagnostic(
            f"{self._what} cannot be read at byte {at}: {fault.strerror or fault} (tried {TRIES} times)",
            where=self.path,
            hint="check the disk (dmesg), or use another one",
        )


def start_thread(thread: threading.Thread) -> None:
    """Raises RuntimeDiagnostic where the system has no room for it."""
    try:
        thread.start()
    except RuntimeError as fault:
        raise RuntimeDiagnostic(
            f"no thread that reads could begin: {fault}",
            hint="raise the limit of threads (ulimit -u, or pids.max of the container)",
        ) from None


_O_DIRECT = getattr(os, "O_DIRECT", 0)


def _direct(descriptor: int) -> tuple[int, bool]:
    """The descriptor set to O_DIRECT where the file system takes it."""
    import fcntl

    if not _O_DIRECT:
        return descriptor, False
    try:
        flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
        fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT)
    except OSError:
        return descriptor, False
    return descriptor, True
