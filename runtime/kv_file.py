"""A private file as large as a reservation, for memory that is to come back: byte b of the one is byte b of the other.

Takes a folder and a reservation, which stays the caller's. The file has no name, so that nothing is left when the
process ends, however it ends. Writing is direct (no page cache), in the caller's thread; reading is
`runtime.weight_reader`'s. Errors of the disk are tried again, a short write goes on where it stopped, and what cannot
be written ends in one RuntimeDiagnostic.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.memory import PAGE_BYTES, Reservation
from runtime.weight_reader import TRIES, Pread, ReadJob, WeightReader

Pwrite = Callable[[int, Sequence[memoryview], int], int]

_PAUSES_S = (0.01, 0.1, 0.5)
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_O_DIRECT = getattr(os, "O_DIRECT", 0)
_KEEP_SIZE_PUNCH_HOLE = 3  # FALLOC_FL_KEEP_SIZE | FALLOC_FL_PUNCH_HOLE
_WHAT = "the spilled KV cache"


def default_directory() -> str:
    """A folder on a disk: /tmp is often memory."""
    persistent = "/var/tmp"
    return persistent if os.access(persistent, os.W_OK) else tempfile.gettempdir()


class BackingFile:
    """An unnamed file, empty at first, behind `reservation`.

    `memory` is its bytes. `bytes_written` and `write_s` count what `write` did; reads are counted by `reader.counters`.
    """

    def __init__(
        self,
        directory: str,
        reservation: Reservation,
        *,
        preadv: Pread = os.preadv,
        pwritev: Pwrite = os.pwritev,
        threads: int = 2,
        on_done: Callable[[ReadJob], None] | None = None,
    ) -> None:
        self.where = directory
        self._pwritev = pwritev
        self.bytes_written, self.write_s, self.retries = 0, 0.0, 0
        self._descriptor = _unnamed(directory)
        self._direct = True
        self.reservation = reservation
        try:
            self._make_direct()
            self.reader = WeightReader(
                directory,
                os.open(f"/proc/self/fd/{self._descriptor}", os.O_RDONLY | os.O_CLOEXEC),
                reservation.nbytes,
                reservation.view(),
                threads=threads,
                preadv=preadv,
                on_done=on_done,
                what=_WHAT,
                hint="something else cut the file short",
                changes=True,
            )
        except BaseException:
            os.close(self._descriptor)
            raise

    @property
    def memory(self) -> np.ndarray:
        return self.reservation.view()

    def write(self, offset: int, nbytes: int) -> None:
        """Writes memory [offset, offset + nbytes), whole pages, to its place in the file. Raises RuntimeDiagnostic."""
        at, end, tries = offset, offset + nbytes, 0
        memory = self.memory.data
        started_s = time.perf_counter()
        while at < end:
            try:
                put = self._pwritev(self._descriptor, [memory[at:end]], at)
            except OSError as fault:
                if fault.errno == errno.EINTR:
                    continue
                if self._direct and fault.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                    self._make_buffered()
                    continue
                tries += 1
                if fault.errno in _FULL or tries >= TRIES:
                    raise self._refusal(fault) from None
                self.retries += 1
                time.sleep(_PAUSES_S[tries - 1])
                continue
            if put <= 0:
                raise self._refusal(OSError(errno.EIO, "nothing was written"))
            at += put
            if at < end and self._direct:
                at -= at % PAGE_BYTES  # a direct write begins on a page
                if put < PAGE_BYTES:
                    self._make_buffered()
        if not self._direct:  # what the page cache holds would count against the budget
            os.fdatasync(self._descriptor)
            os.posix_fadvise(self._descriptor, offset, nbytes, os.POSIX_FADV_DONTNEED)
        self.bytes_written += nbytes
        self.write_s += time.perf_counter() - started_s

    def read(self, offset: int, nbytes: int, label: str) -> ReadJob:
        """Begins to read the file's bytes into their place in memory."""
        return self.reader.submit([(offset, nbytes)], label)

    def let_go(self, offset: int, nbytes: int) -> None:
        """Gives the memory back; the file keeps its bytes."""
        self.reservation.discard(offset, nbytes)

    def forget(self, offset: int, nbytes: int) -> None:
        """Gives back memory and disk."""
        self.let_go(offset, nbytes)
        with contextlib.suppress(OSError, AttributeError):  # a file system without holes keeps the bytes until the end
            _fallocate(self._descriptor, _KEEP_SIZE_PUNCH_HOLE, offset, nbytes)

    def close(self) -> None:
        """Ends the reads, and the file."""
        if self._descriptor < 0:
            return
        self.reader.close()
        os.close(self._descriptor)
        self._descriptor = -1

    def _make_direct(self) -> None:
        import fcntl

        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) | _O_DIRECT)
        except OSError:
            self._direct = False
        self._direct = self._direct and bool(_O_DIRECT)

    def _make_buffered(self) -> None:
        import fcntl

        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & ~_O_DIRECT)
        self._direct = False

    def _refusal(self, fault: OSError) -> RuntimeDiagnostic:
        full = fault.errno in _FULL
        return RuntimeDiagnostic(
            f"{_WHAT} cannot be written: {fault.strerror or fault}",
            where=self.where,
            expected="room on that disk for the sequences that memory has no room for" if full else "",
            hint="make room there, or name a folder on another disk (--kv-dir)" if full else "check the disk (dmesg)",
        )


def _unnamed(directory: str) -> int:
    """A descriptor of a new file that only this process can see."""
    try:
        if not Path(directory).is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "no such folder")
        if hasattr(os, "O_TMPFILE"):
            with contextlib.suppress(OSError):  # not every file system has such files
                return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        descriptor, name = tempfile.mkstemp(prefix="stratum-kv-", dir=directory)
        os.unlink(name)
        return descriptor
    except OSError as fault:
        raise RuntimeDiagnostic(
            f"the KV cache cannot be spilled there: {fault.strerror or fault}",
            where=directory,
            expected="a folder that may be written to",
        ) from None


def _fallocate(descriptor: int, mode: int, offset: int, nbytes: int) -> None:
    """fallocate(2), which the standard library has only without a mode."""
    call = ctypes.CDLL(None, use_errno=True).fallocate
    if call(descriptor, mode, ctypes.c_int64(offset), ctypes.c_int64(nbytes)) != 0:
        raise OSError(ctypes.get_errno(), "fallocate")
