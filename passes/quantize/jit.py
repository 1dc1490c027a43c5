"""Loops compiled by numba, with their machine code kept under the user's cache directory.

`@jit` is numba.njit without the interpreter lock, so that threads of Python share the work. The machine code of one
process serves the next ones: beside other things that can be made again (`hw_targets.cache_dir`), unless
NUMBA_CACHE_DIR says where. Where nothing can be written, code is compiled in each process. `watch_compiling` tells when
that happens: for the first build on a machine it takes longer than the weights.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import numba
from numba.core import config, event

from hw_targets.cache_dir import cache_root

_CONFIG: Any = config  # a module whose names are those of environment variables
Function = TypeVar("Function", bound=Callable[..., object])


def jit(function: Function) -> Function:
    """The function, compiled when it is first called with arguments of new types."""
    if not os.environ.get("NUMBA_CACHE_DIR"):
        _CONFIG.CACHE_DIR = str(cache_root() / "numba")
    try:
        return cast("Function", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
    except (RuntimeError, OSError):  # there is no folder that can be written
        return cast("Function", numba.njit(nogil=True, error_model="numpy")(function))


@contextmanager
def watch_compiling(tell: Callable[[bool], None]) -> Iterator[None]:
    """`tell(True)` when a loop begins to be compiled in any thread, `tell(False)` when the last one has ended."""
    with event.install_listener("numba:compile", _Compiling(tell)):
        yield


class _Compiling(event.Listener):
    """Counts the loops that are compiled at once: one may need another."""

    def __init__(self, tell: Callable[[bool], None]) -> None:
        self.tell, self.lock, self.running = tell, threading.RLock(), 0

    def on_start(self, event: object) -> None:
        self._count(1)

    def on_end(self, event: object) -> None:
        self._count(-1)

    def _count(self, change: int) -> None:
        with self.lock:
            before, self.running = self.running, self.running + change
            if bool(before) != bool(self.running):
                self.tell(bool(self.running))


def thread_count() -> int:
    """Threads that a loop may use: NUMBA_NUM_THREADS, or the cores of this process."""
    return int(_CONFIG.NUMBA_NUM_THREADS)


def run_in_threads(work: Callable[[int, int], None], count: int, unit: int) -> None:
    """`work(first, last)` for ranges that cover 0 .. count, each of a multiple of `unit` but the last; in any order."""
    threads = thread_count()
    pieces = max(1, min(-(-count // unit), threads * 4))
    step = max(1, math.ceil(math.ceil(count / pieces) / unit)) * unit
    ranges = [(first, min(first + step, count)) for first in range(0, count, step)]
    if threads == 1 or len(ranges) <= 1:
        for first, last in ranges:
            work(first, last)
        return
    with ThreadPoolExecutor(threads) as pool:
        for done in [pool.submit(work, *piece) for piece in ranges]:
            done.result()
