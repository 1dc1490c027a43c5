"""Pages of weights that are done with, moved under what is read next.

Takes ranges of a reservation whose contents nobody needs any more (`give`) and puts their pages under a range that is
about to be read (`put_under`). A page that is given back to the system and taken again is zeroed and charged once more,
which costs more processor time than the read itself; moving it (`Reservation.move`) costs a hundredth of that. Where
the system cannot move pages they are given back, and reading takes new ones.

Ranges are cut as they are read, into requests, so that pages nearly always go from a request to another of the same
size. A plan's sizes hold for what is in use and in the pool together: whatever is taken beside the pool comes off it.
"""

from __future__ import annotations

import threading

from runtime.memory import Reservation

LEAST_BYTES = 64 << 10  # smaller parts are not worth a system call: given back


class PagePool:
    """Spent pages of `memory`. `request_bytes`: how ranges are cut when they are read. Safe for threads."""

    def __init__(self, memory: Reservation, request_bytes: int) -> None:
        self._memory, self._request_bytes = memory, request_bytes
        self._lock = threading.Lock()  # held while pages move: a range is never given and taken at the same time
        self._spent: dict[int, int] = {}  # offset -> bytes
        self._parts: dict[int, tuple[int, ...]] = {}  # offset of a request -> bytes of the parts that were moved there

    @property
    def spent_bytes(self) -> int:
        """What is in the pool."""
        return sum(self._spent.values())

    def give(self, offset: int, nbytes: int) -> None:
        """The contents of the range are done with. It was read, or was to be read, in one job."""
        end = offset + nbytes
        with self._lock:
            for start in range(offset, end, self._request_bytes):
                at, stop = start, min(start + self._request_bytes, end)
                for part in (*self._parts.pop(start, ()), stop - start):
                    part = min(part, stop - at)
                    self._put_back(at, part)
                    at += part

    def take_back(self, offset: int, nbytes: int) -> None:
        """The range is about to be read anew: pages of it that are still in the pool are given to the system."""
        with self._lock:
            for at in [at for at in self._spent if offset <= at < offset + nbytes]:
                self._memory.discard(at, self._spent.pop(at))

    def put_under(self, offset: int, nbytes: int) -> None:
        """Moves pages under a request, as many as there are; what it takes anew beside them, the pool gives back."""
        if not self._spent:
            return
        with self._lock:
            parts: list[int] = []
            at, end = offset, offset + nbytes
            while end - at >= LEAST_BYTES and self._spent:
                source = self._best(end - at)
                size = self._spent.pop(source)
                used = min(size, end - at)
                if not self._memory.move(source, at, used):
                    self._memory.discard(source, used)
                self._put_back(source + used, size - used)
                parts.append(used)
                at += used
            if parts:
                self._parts[offset] = tuple(parts)
            while at < end and self._spent:
                source = self._best(end - at)
                size = self._spent.pop(source)
                used = min(size, end - at)
                self._memory.discard(source, used)
                self._put_back(source + used, size - used)
                at += used

    def _put_back(self, offset: int, nbytes: int) -> None:
        if nbytes >= LEAST_BYTES:
            self._spent[offset] = nbytes
        elif nbytes:
            self._memory.discard(offset, nbytes)

    def _best(self, nbytes: int) -> int:
        """Where the smallest spent range of at least `nbytes` is, or the largest there is."""
        best, best_size = -1, 0
        for at, size in self._spent.items():
            if size == nbytes:
                return at
            if nbytes < size < best_size or best_size < min(size, nbytes):
                best, best_size = at, size
        return best

    def clear(self) -> None:
        """Gives everything to the system."""
        with self._lock:
            for at, size in self._spent.items():
                self._memory.discard(at, size)
            self._spent.clear()
            self._parts.clear()
