"""Memory as the tile interpreter sees it: bounds are checked, and so is what threads do to each other.

A `Memory` is the bytes of one array, shared by the threads of a team. Each byte remembers who wrote and who read it
since the last barrier; a write that meets another thread's access in the same phase is a race, whatever the values and
whichever of the two comes first.
A `BufferView` is what one thread's buffer value holds: memory, first byte, what it may touch, element format, thread.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from ir.formats import PlainFormat

_NOBODY = 0  # marks of bytes; that of a thread is its number and one
_SEVERAL = 255
_UNDEFINED = 0xCB  # scratch begins as this byte: 0xCBCBCBCB is -2.67e7 as f32, easy to see in a result


class KernelFault(Exception):
    """A kernel or program did what it must not do: touched memory out of bounds or in a race with another thread,
    or left the threads of its team at different barriers."""


@dataclass(frozen=True)
class _Marks:
    """What one thread leaves and looks for. A byte's mark becomes `when_read[mark]` when the thread reads it."""

    own: bytes
    nobody_or_own: bytes
    when_read: bytes


@cache
def _marks_of(thread: int) -> _Marks:
    own = thread + 1
    if own >= _SEVERAL:
        raise ValueError(f"expected fewer than {_SEVERAL - 1} threads, got thread {thread}")
    when_read = bytes(own if mark in (_NOBODY, own) else _SEVERAL for mark in range(256))
    return _Marks(bytes([own]), bytes([_NOBODY, own]), when_read)


class Memory:
    """The bytes of an array. `shared`: by threads whose races are to be found."""

    def __init__(self, array: np.ndarray, name: str = "buffer", shared: bool = True) -> None:
        self.bytes = array.reshape(-1).view(np.uint8)
        self.name = name
        self.shared = shared
        self._notes = threading.Lock()  # two threads that touch a byte at once both leave their mark
        self.new_phase()

    def new_phase(self) -> None:
        """Forgets who touched what: a barrier has ordered it."""
        size = self.bytes.size if self.shared else 0
        self.writer, self.reader = bytearray(size), bytearray(size)  # a mark for each byte

    def note_read(self, where: slice, thread: int) -> None:
        """Raises KernelFault when another thread has written there in this phase."""
        if not self.shared:
            return
        marks = _marks_of(thread)
        with self._notes:
            self._refuse_others(self.writer, marks, where, "reads", "written")
            self.reader[where] = self.reader[where].translate(marks.when_read)

    def note_write(self, where: slice, thread: int) -> None:
        """Raises KernelFault when another thread has touched these bytes in this phase."""
        if not self.shared:
            return
        marks = _marks_of(thread)
        with self._notes:
            self._refuse_others(self.writer, marks, where, "writes", "written")
            self._refuse_others(self.reader, marks, where, "writes", "read")
            self.writer[where] = marks.own * (where.stop - where.start)

    def _refuse_others(self, touched: bytearray, marks: _Marks, where: slice, does: str, done: str) -> None:
        who = touched[where]
        if others := who.translate(None, marks.nobody_or_own):
            thread, at = marks.own[0] - 1, where.start + who.index(others[0])
            raise KernelFault(f"thread {thread} {does} {self.name} at byte {at}, {done} by another in this phase")


class BufferView:
    """A buffer value: elements of `element` from byte `start` of `memory` on, as thread `thread` sees them.

    `bounds` are the bytes [first, last) that may be touched, the whole of the memory by default.
    """

    def __init__(
        self,
        memory: Memory,
        element: PlainFormat,
        start: int = 0,
        thread: int = 0,
        bounds: tuple[int, int] | None = None,
    ) -> None:
        self.memory = memory
        self.element = element
        self.start = start
        self.thread = thread
        self.bounds = bounds or (0, memory.bytes.size)
        self.released = False
        self.width = element.dtype.itemsize

    @classmethod
    def undefined(cls, size: int, element: PlainFormat) -> BufferView:
        """Fresh private memory, filled with a pattern that no kernel should rely on."""
        return cls(
            Memory(np.full(size * element.dtype.itemsize, _UNDEFINED, np.uint8), "scratch", shared=False), element
        )

    def _range(self, index: int, count: int, what: str) -> slice:
        first = self.start + index * self.width
        last = first + count * self.width
        low, high = self.bounds
        if first < low or last > high:
            message = f"{what} of bytes {first}..{last} of {self.memory.name}, outside of {low}..{high}"
            raise KernelFault(message)
        if first % self.width:  # native code is told that elements are aligned to their size
            raise KernelFault(f"{what} of {self.element} at byte {first} of {self.memory.name}, which is not aligned")
        return slice(first, last)

    def load(self, index: int, lanes: int) -> Any:
        where = self._range(index, lanes, "read")
        self.memory.note_read(where, self.thread)
        values = self.memory.bytes[where].copy().view(self.element.dtype)
        return values if lanes > 1 else values[0]

    def store(self, index: int, value: Any) -> None:
        values = np.ascontiguousarray(np.atleast_1d(value), self.element.dtype)
        where = self._range(index, len(values), "write")
        self.memory.note_write(where, self.thread)
        self.memory.bytes[where] = values.view(np.uint8)

    def load_masked(self, index: int, mask: np.ndarray) -> np.ndarray:
        values = np.zeros(len(mask), self.element.dtype)
        for lane in np.flatnonzero(mask):
            values[lane] = self.load(index + int(lane), 1)
        return values

    def store_masked(self, index: int, value: np.ndarray, mask: np.ndarray) -> None:
        for lane in np.flatnonzero(mask):
            self.store(index + int(lane), value[lane])

    def offset(self, index: int) -> BufferView:
        return BufferView(self.memory, self.element, self.start + index * self.width, self.thread, self.bounds)

    def view(self, element: PlainFormat) -> BufferView:
        return BufferView(self.memory, element, self.start, self.thread, self.bounds)
