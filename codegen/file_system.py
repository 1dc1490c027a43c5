"""Two things that Python's `os` lacks: exchanging two directories, flushing a directory.

An exchange does nothing where the system lacks it; the caller is told by the return value.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def exchange_directories(first: Path, second: Path) -> bool:
    """Swaps what two paths name in one step: no reader finds either missing. False where that is not supported."""
    call = _c_function("renameat2")
    if call is None:
        return False
    return call(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0


def sync_directory(path: Path) -> None:
    """Makes the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@functools.cache
def _c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; None where there is none of this name."""
    return getattr(ctypes.CDLL(None, use_errno=True), name, None)
