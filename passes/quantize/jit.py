"""Loops compiled by numba, with their machine code kept under the user's cache directory.

`@jit` is numba.njit without the interpreter lock, so that threads of Python share the work. The machine code of one
process serves the next ones: beside other things that can be made again (`hw_targets.cache_dir`), unless
NUMBA_CACHE_DIR says where. Where nothing can be written, code is compiled in each process.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar, cast

import numba
from numba.core import config

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
