"""Weights copied into memory of huge pages, in place of a mapping of their file.

A mapping costs nothing to open and lies in pages as large as the page cache happened to find when the file was read or
written: on a machine whose memory is in pieces, mostly small ones, and a decode step then waits for tables of pages
(llama-1.1b in 4 bits: 20.9 ms a token with 4 % of the weights in huge pages, 18.0 ms with all). A copy takes the time
of reading the file once, and its bytes of memory for itself.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.memory import Reservation
from runtime.process_memory import available_bytes
from runtime.weight_reader import Pread

HUGE_PAGE_BYTES = 2 << 20
_AT_ONCE = 8 * HUGE_PAGE_BYTES  # that a thread reads; whole huge pages, so that no page is two threads'


class LoadedWeights:
    """`nbytes` of the file `descriptor`, read by `threads` threads; `but` are ranges (offset, bytes) that nobody reads.

    `descriptor` stays the caller's. Raises RuntimeDiagnostic when memory is short, a read fails or the file ends early.
    """

    def __init__(
        self,
        descriptor: int,
        nbytes: int,
        *,
        where: str,
        threads: int,
        but: Sequence[tuple[int, int]] = (),
        preadv: Pread = os.preadv,
    ) -> None:
        wanted, available = nbytes - sum(size for _, size in but), available_bytes()
        if wanted > available:
            raise RuntimeDiagnostic(
                f"{wanted} bytes of weights do not fit into {available} bytes of free memory",
                where=where,
                hint="leave them mapped (without --no-mmap), or stream them under a budget (--memory)",
            )
        self.nbytes = nbytes
        self._where, self._descriptor, self._preadv = where, descriptor, preadv
        self._memory = Reservation(nbytes + HUGE_PAGE_BYTES, what="weights", huge=True)
        first = -self._memory.address % HUGE_PAGE_BYTES
        self._bytes = self._memory.view()[first : first + nbytes]
        self.address = self._memory.address + first
        try:
            with ThreadPoolExecutor(max(1, threads)) as pool:
                list(pool.map(self._read, _pieces(nbytes, but)))
        except BaseException:
            self.close()
            raise

    def view(self) -> np.ndarray:
        """All bytes as a uint8 array. Invalid after `close`."""
        return self._bytes

    def close(self) -> None:
        """Gives the memory back. Native code must not run on it any more."""
        self._bytes = np.empty(0, dtype=np.uint8)
        self.address = 0
        self._memory.close()

    def _read(self, piece: tuple[int, int]) -> None:
        at, end = piece
        while at < end:
            try:
                got = self._preadv(self._descriptor, [self._bytes[at:end].data], at)
            except OSError as fault:
                raise RuntimeDiagnostic(f"cannot read the weights: {fault}", where=self._where) from fault
            if got == 0:
                raise RuntimeDiagnostic(
                    f"the weights end at byte {at}", where=self._where, expected=f"{self.nbytes} bytes"
                )
            at += got


def _pieces(nbytes: int, but: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(first byte, end) of the reads in ascending order, cut at multiples of `_AT_ONCE`."""
    found: list[tuple[int, int]] = []
    at = 0
    for offset, size in (*but, (nbytes, 0)):
        while at < offset:
            end = min(offset, (at // _AT_ONCE + 1) * _AT_ONCE)
            found.append((at, end))
            at = end
        at = offset + size
    return found
