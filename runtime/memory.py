"""Memory the native code works in: anonymous reservations and read-only file mappings.

`Reservation` is address space that costs nothing until a page is first written (demand paging); it tells how much of
it is resident and can give pages back. `FileMapping` is a file mapped read-only and page-aligned, shared with the page
cache, so that a second process pays nothing and a first token needs no copy. Both refuse sizes the system cannot map.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.errors import RuntimeDiagnostic

PAGE_BYTES = mmap.PAGESIZE
# Python 3.13 names the flag; the Linux value is the same on x86-64 and AArch64. Elsewhere anonymous memory is lazy too.
_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000 if os.uname().sysname == "Linux" else 0)
_MINCORE_CHUNK_BYTES = 1 << 30


class Reservation:
    """`nbytes` of zeroed anonymous memory, page-aligned, resident only where touched.

    `huge` asks for transparent huge pages: right for buffers that are used whole (fewer TLB misses), wrong for sparse
    ones (a touched byte would cost 2 MiB).
    """

    def __init__(self, nbytes: int, *, what: str, huge: bool = False) -> None:
        self.nbytes = max(PAGE_BYTES, -(-nbytes // PAGE_BYTES) * PAGE_BYTES)
        try:
            self._mapping = mmap.mmap(
                -1, self.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
            )  # fmt: skip
        except (OSError, ValueError, OverflowError) as fault:
            raise RuntimeDiagnostic(
                f"cannot reserve {self.nbytes} bytes of memory for {what}: {fault}",
                expected="address space for the whole of it (it is filled on demand)",
                hint="ask for less context or fewer sequences, or raise the limit (ulimit -v, vm.overcommit_memory)",
            ) from None
        if huge and hasattr(mmap, "MADV_HUGEPAGE"):
            try:
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
            except OSError:  # a kernel without huge pages: only speed is lost
                pass
        self._bytes = np.frombuffer(self._mapping, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def view(self) -> np.ndarray:
        """All bytes as a uint8 array. Invalid after `close`."""
        return self._bytes

    def committed_bytes(self) -> int:
        """Bytes of the reservation that are resident now, in whole pages."""
        resident = 0
        for offset in range(0, self.nbytes, _MINCORE_CHUNK_BYTES):
            length = min(_MINCORE_CHUNK_BYTES, self.nbytes - offset)
            pages = np.empty(length // PAGE_BYTES, dtype=np.uint8)
            if _mincore(self.address + offset, length, pages.ctypes.data) != 0:
                raise OSError(ctypes.get_errno(), "mincore failed on our own mapping")
            resident += int(np.count_nonzero(pages & 1)) * PAGE_BYTES
        return resident

    def discard(self, offset: int, nbytes: int) -> int:
        """Gives the whole pages inside [offset, offset + nbytes) back; they read as zero again. Returns their bytes."""
        first = -(-offset // PAGE_BYTES) * PAGE_BYTES
        last = (offset + nbytes) // PAGE_BYTES * PAGE_BYTES
        if last <= first:
            return 0
        # Not by the mapping's own method, which holds the interpreter lock for the milliseconds this can take.
        if _madvise(self.address + first, last - first, mmap.MADV_DONTNEED) != 0:
            raise OSError(ctypes.get_errno(), "madvise failed on our own mapping")
        return last - first

    def move(self, source: int, target: int, nbytes: int) -> bool:
        """Puts the pages of [source, source + nbytes) under [target, ...), whose own pages are given back.

        All in whole pages, the two apart. The source reads as zero afterwards. False, and nothing moved, where the
        system cannot: not Linux 5.7 or later, too many mappings, pages of several mappings before Linux 6.17.
        """
        flags = _MREMAP_MAYMOVE | _MREMAP_FIXED | _MREMAP_DONTUNMAP
        target += self.address
        return _mremap is not None and _mremap(self.address + source, nbytes, nbytes, flags, target) == target

    def close(self) -> None:
        """Unmaps. Native code must not run on it any more."""
        self._bytes = np.empty(0, dtype=np.uint8)
        self.address = 0
        _close(self._mapping)


class FileMapping:
    """A regular file mapped read-only. `descriptor` stays the caller's; the mapping outlives it."""

    def __init__(self, descriptor: int, nbytes: int, *, where: str) -> None:
        self.nbytes = nbytes
        try:
            self._mapping = mmap.mmap(descriptor, nbytes, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
        except (OSError, ValueError, OverflowError) as fault:
            raise RuntimeDiagnostic(
                f"cannot map {nbytes} bytes: {fault}", where=where, hint="raise the address space limit (ulimit -v)"
            ) from None
        self._bytes = np.frombuffer(self._mapping, dtype=np.uint8)
        self.address = int(self._bytes.ctypes.data)

    def view(self) -> np.ndarray:
        """All bytes as a read-only uint8 array. Invalid after `close`."""
        return self._bytes

    def read_ahead(self, but: Sequence[tuple[int, int]] = ()) -> None:
        """Asks the system to start reading the file in the background, but for some ranges (offset, bytes) that ascend
        and lie on pages; returns at once.

        Measured on ext4 (Linux 6.18): 1.5 ms for 2.2 GB when nothing is cached, nothing when it is. Huge-page advice
        and populating made no difference there, the page cache already holds large folios.
        """
        if not hasattr(mmap, "MADV_WILLNEED"):
            return
        at = 0
        for offset, nbytes in (*but, (len(self._mapping), 0)):
            if offset > at:
                self._mapping.madvise(mmap.MADV_WILLNEED, at, offset - at)
            at = offset + nbytes

    def close(self) -> None:
        """Unmaps. Native code must not run on it any more."""
        self._bytes = np.empty(0, dtype=np.uint8)
        self.address = 0
        _close(self._mapping)


def _close(mapping: mmap.mmap) -> None:
    try:
        mapping.close()
    except BufferError:  # a caller still holds a view: unmapped when the last one goes
        pass


def _bind(name: str, result: Any, *arguments: Any) -> Callable[..., Any]:
    """A function of the C library."""
    function = ctypes.CDLL(None, use_errno=True)[name]
    function.argtypes = arguments
    function.restype = result
    return function


_SIZE = ctypes.c_size_t
_mincore = _bind("mincore", ctypes.c_int, ctypes.c_void_p, _SIZE, ctypes.c_void_p)
_madvise = _bind("madvise", ctypes.c_int, ctypes.c_void_p, _SIZE, ctypes.c_int)
_MREMAP_MAYMOVE, _MREMAP_FIXED, _MREMAP_DONTUNMAP = 1, 2, 4  # of Linux
_mremap = (
    _bind("mremap", ctypes.c_void_p, ctypes.c_void_p, _SIZE, _SIZE, ctypes.c_int, ctypes.c_void_p)
    if os.uname().sysname == "Linux"
    else None
)
