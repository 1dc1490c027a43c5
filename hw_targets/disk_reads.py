"""Direct reads of a scratch file: how fast a drive reads blocks of one size with so many requests in flight.

`ScratchFile(directory, nbytes)` has no name as soon as it exists, so that nothing stays behind however the process
ends. `read_blocks(file, block, threads, seconds)` reads random aligned blocks past the page cache and gives samples of
(seconds, bytes so far); `sustained(samples)` and `burst(samples)` say what they mean. Many drives, and nearly every
rented one, read the first gigabytes after a rest faster than they can go on; only the second rate is one to plan with.

Threads are Python's; the interpreter's lock is free during each read. Above about 100,000 requests a second this
would measure the interpreter.
"""

from __future__ import annotations

import contextlib
import errno
import math
import mmap
import os
import random
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from ir.diagnostics import DiagnosticError

Samples = list[tuple[float, int]]
PAGE = 4096
_WRITE_BYTES = 4 << 20
_SAMPLE_SECONDS = 0.02
_REQUESTS = 8  # of each thread, unless the limit is over
_STEADY = 0.9  # the last quarter reads at least so much of the one before
_BURST = 1.15  # this much faster than the sustained rate is a burst


class ScratchFile:
    """An unnamed file of `nbytes` random bytes in `directory`, open for direct reads; a context manager.

    `tell(done, total)` is called while it is written. `write_seconds` is what writing took. DiagnosticError when there
    is no room, or when the file system takes no direct reads.
    """

    def __init__(self, directory: Path, nbytes: int, tell: Callable[[int, int], None] | None = None) -> None:
        self.directory = directory
        self.nbytes = nbytes // _WRITE_BYTES * _WRITE_BYTES or _WRITE_BYTES
        self.write_seconds = 0.0
        self._check_room()
        self.descriptor = self._open()
        try:
            self._fill(tell or (lambda done, total: None))
        except BaseException as fault:
            os.close(self.descriptor)
            if isinstance(fault, OSError):
                raise DiagnosticError(f"cannot write a scratch file: {fault.strerror}", where=str(directory)) from None
            raise

    def __enter__(self) -> ScratchFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.descriptor)

    def _check_room(self) -> None:
        try:
            room = os.statvfs(self.directory)
        except OSError as fault:
            raise DiagnosticError(f"cannot use the directory: {fault.strerror}", where=str(self.directory)) from None
        free, keep = room.f_bavail * room.f_frsize, max(256 << 20, room.f_blocks * room.f_frsize // 50)
        if free < self.nbytes + keep:
            raise DiagnosticError(
                f"no room for a scratch file of {self.nbytes >> 20} MiB: {free >> 20} MiB are free",
                where=str(self.directory),
                expected=f"{(self.nbytes + keep) >> 20} MiB, so that {keep >> 20} MiB stay free",
                hint="a smaller --size, or another directory on the same drive",
            )

    def _open(self) -> int:
        direct = getattr(os, "O_DIRECT", 0)
        unnamed = getattr(os, "O_TMPFILE", 0)
        if not direct:
            raise DiagnosticError("this system has no direct reads", where=str(self.directory))
        try:
            if unnamed:
                with contextlib.suppress(OSError):
                    return os.open(self.directory, os.O_RDWR | direct | unnamed, 0o600)
            handle, name = tempfile.mkstemp(dir=self.directory, prefix=".calibrate-")
            try:
                return os.open(name, os.O_RDWR | direct)
            finally:
                os.unlink(name)
                os.close(handle)
        except OSError as fault:
            what = "takes no direct reads" if fault.errno == errno.EINVAL else f"takes no file: {fault.strerror}"
            raise DiagnosticError(
                f"the file system {what}", where=str(self.directory), hint="name a directory on the drive itself"
            ) from None

    def _fill(self, tell: Callable[[int, int], None]) -> None:
        """Random bytes, shifted from block to block: neither compressed nor found to be the same."""
        pool = mmap.mmap(-1, 2 * _WRITE_BYTES)
        pool.write(os.urandom(2 * _WRITE_BYTES))
        started = time.perf_counter()
        with memoryview(pool) as view:
            for at in range(0, self.nbytes, _WRITE_BYTES):
                start = at // _WRITE_BYTES * 37 * PAGE % _WRITE_BYTES
                with view[start : start + _WRITE_BYTES] as part:
                    written = os.pwrite(self.descriptor, part, at)
                if written != _WRITE_BYTES:
                    raise OSError(errno.ENOSPC, "the file system is full")
                tell(at + written, self.nbytes)
        os.fsync(self.descriptor)
        self.write_seconds = time.perf_counter() - started
        pool.close()


def read_blocks(
    file: ScratchFile, block: int, threads: int, seconds: float, limit: float = 0.0, ceiling: float = math.inf
) -> Samples:
    """Reads for `seconds`, and on until the rate is settled or `limit` seconds are over; a sample each 20 ms or so.

    Settled: steady, and no burst above `ceiling` bytes/s. `block` is a multiple of 4096 and not larger than the file.
    Each thread has one request in flight.
    """
    counts = [0] * threads
    faults: list[OSError] = []
    stop = threading.Event()

    def work(index: int) -> None:
        chooser = random.Random(index)
        places = file.nbytes // block
        buffer = mmap.mmap(-1, block)
        try:
            while not stop.is_set():
                counts[index] += os.preadv(file.descriptor, [buffer], chooser.randrange(places) * block)
        except OSError as fault:
            faults.append(fault)
        finally:
            buffer.close()

    workers = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(threads)]
    started = time.perf_counter()
    samples: Samples = [(0.0, 0)]
    try:
        for worker in workers:
            worker.start()
        while True:
            time.sleep(min(_SAMPLE_SECONDS, seconds / 8))
            now = time.perf_counter() - started
            samples.append((now, sum(counts)))
            enough = samples[-1][1] >= _REQUESTS * threads * block
            settled = enough and is_steady(samples) and rate_between(samples, 0.75, 1.0) <= _BURST * ceiling
            if faults or now >= max(limit, seconds) or (now >= seconds and settled):
                break
    finally:
        stop.set()
        for worker in workers:
            worker.join()
    samples.append((time.perf_counter() - started, sum(counts)))  # with the requests that were still in flight
    if faults:
        raise DiagnosticError(f"reading the scratch file failed: {faults[0].strerror}", where=str(file.directory))
    return samples


def rate_between(samples: Samples, start: float, end: float) -> float:
    """Bytes/s between two shares of the whole time: (0.5, 1.0) is the last half."""
    total = samples[-1][0]
    first = min(samples, key=lambda s: abs(s[0] - start * total))
    last = min(samples, key=lambda s: abs(s[0] - end * total))
    return (last[1] - first[1]) / (last[0] - first[0]) if last[0] > first[0] else 0.0


def is_steady(samples: Samples) -> bool:
    """Whether the last quarter reads about as fast as the one before."""
    return rate_between(samples, 0.75, 1.0) >= _STEADY * rate_between(samples, 0.5, 0.75)


def sustained(samples: Samples) -> float:
    """Bytes/s of the last half, or of the last quarter where the rate fell in between."""
    rate = rate_between(samples, 0.5 if is_steady(samples) else 0.75, 1.0)
    return rate or rate_between(samples, 0.0, 1.0)  # of so few requests that none ended in that time


def spread(samples: Samples) -> float:
    """(best - worst) / best of four equal parts of the last half."""
    parts = [rate_between(samples, 0.5 + i / 8, 0.5 + (i + 1) / 8) for i in range(4)]
    return (max(parts) - min(parts)) / max(parts) if max(parts) > 0 else 0.0


def burst(samples: Samples, windows: int = 40) -> tuple[float, int] | None:
    """(bytes/s, bytes) read before the rate fell to the sustained one; None where there was no such start."""
    settled = sustained(samples)
    rates = [rate_between(samples, i / windows, (i + 1) / windows) for i in range(windows)]
    fast = 0
    while fast < windows and rates[fast] > _BURST * settled:
        fast += 1
    if fast == 0 or settled <= 0:
        return None
    rate = rate_between(samples, 0.0, fast / windows)
    return rate, int(rate * samples[-1][0] * fast / windows)
