"""The disk: what it gives by itself, the page cache, the read-ahead of the system."""

from __future__ import annotations

import contextlib
import math
import mmap
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

REQUEST_BYTES = 1 << 20
SCATTERED = 4  # requests, about an expert
SECONDS = 5.0  # drives of clouds give more in the first seconds, so only the second half counts


def disk_bytes_per_s(path: Path, *, scattered: bool, threads: int = 3, seconds: float = SECONDS) -> float:
    """What O_DIRECT reads of 1 MiB get out of the file in the second half of the time: one after the other, or
    `scattered` over it in runs of four, as experts are read."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    run = SCATTERED if scattered else 1
    size = max(1, os.fstat(descriptor).st_size // (run * REQUEST_BYTES))  # runs
    stride = next(n for n in range(size * 5 // 8, 2 * size + 2) if math.gcd(n, size) == 1) if scattered else 1
    start = time.perf_counter()
    half, stop = start + seconds / 2, start + seconds
    read = [0] * threads

    def work(thread: int) -> None:
        buffer = mmap.mmap(-1, REQUEST_BYTES)
        at = thread
        while (now := time.perf_counter()) < stop:
            number, part = divmod(at, run)
            place = (number * stride % size * run + part) * REQUEST_BYTES
            got = os.preadv(descriptor, [memoryview(buffer)], place)
            read[thread] += got if now >= half else 0
            at += threads

    workers = [threading.Thread(target=work, args=(n,)) for n in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    os.close(descriptor)
    return sum(read) / (time.perf_counter() - half)


def forget(path: Path) -> None:
    """Drops the file from the page cache: cached pages would not be charged to the group."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@contextlib.contextmanager
def read_ahead(device: str, kib: int | None) -> Iterator[None]:
    """The block device's read-ahead meanwhile; None leaves it."""
    setting = Path(f"/sys/block/{device}/queue/read_ahead_kb")
    if kib is None:
        yield
        return
    before = setting.read_text()
    setting.write_text(str(kib))
    try:
        yield
    finally:
        setting.write_text(before)


def read_by(process: int) -> int:
    """Bytes that a process had fetched from storage so far, by reading or by touching mapped files."""
    lines = Path(f"/proc/{process}/io").read_text().splitlines()
    return next(int(line.partition(":")[2]) for line in lines if line.startswith("read_bytes"))
