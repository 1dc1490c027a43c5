"""Memory as threads of a grid see it: bounds and alignment are checked, and what threads do to each other.

Every access is made by all threads at once, with an array of places, one for each thread. Each unit of a few bytes
remembers who wrote and who read it and in which phase of that thread's block; a barrier begins a new phase. Two
accesses race when two threads make them, one writes, and they are of different blocks or of one phase. Bytes that an
asynchronous copy is to bring are touched by nobody before its thread has waited for it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import PlainFormat
from ir.grid_banks import extra_passes
from ir.tile_memory_model import KernelFault

NOBODY, _SEVERAL = -1, -2
_UNDEFINED = 0xCB  # memory that nobody has written, as in `ir.tile_memory_model`
WIDEST = 16  # bytes of the widest access of one thread


class GridThreads:
    """Who runs: `blocks` blocks of `threads` threads, numbered through. `active` are those at this place.

    `bank_conflicts` counts the passes that accesses of shared memory took beyond one (`ir.grid_banks`).
    """

    def __init__(self, blocks: int, threads: int) -> None:
        self.blocks, self.threads, self.total = blocks, threads, blocks * threads
        self.active = np.ones(self.total, bool)
        self.block_of = np.repeat(np.arange(blocks), threads)
        self.phase = np.zeros(blocks, np.int64)
        self.bank_conflicts = 0

    def name(self, thread: int) -> str:
        return f"thread {thread % self.threads} of block {thread // self.threads}"


class GridMemory:
    """Bytes shared by all threads ("global"), by those of a block ("shared") or by nobody ("private").

    `array` of global memory is changed in place. The others have `size` bytes for each block or thread.
    """

    def __init__(
        self, who: GridThreads, space: str, name: str, *, array: np.ndarray | None = None, size: int = 0, unit: int = 1
    ) -> None:
        self.who, self.space, self.name, self.unit = who, space, name, unit
        owners = {"global": 1, "shared": who.blocks, "private": who.total}[space]
        if array is not None:
            self.bytes = array.reshape(-1).view(np.uint8)
            self.size = self.bytes.size
        else:
            self.size = -(-size // WIDEST) * WIDEST
            self.bytes = np.full(owners * self.size, _UNDEFINED, np.uint8)
        owner = {"global": np.zeros(who.total, np.int64), "shared": who.block_of, "private": np.arange(who.total)}
        self.base = owner[space] * self.size
        self.words = self.bytes.view(f"u{unit}")
        units = 0 if space == "private" else self.words.size
        self.writer, self.reader = np.full(units, NOBODY, np.int32), np.full(units, NOBODY, np.int32)
        self.reader_block = np.full(units, NOBODY, np.int32)
        self.written_in, self.read_in = np.zeros(units, np.int32), np.zeros(units, np.int32)
        self.copied_by = np.full(units, NOBODY, np.int32)  # threads whose copies are under way
        held = units if space == "shared" else 0
        self.unfenced = np.full(held, NOBODY, np.int32)  # who wrote what products of warpgroups do not know of yet
        self.product_reads = np.zeros(held, np.int16)  # products of warpgroups that are under way and read it
        self.products = 0

    def places(self, start: np.ndarray, width: int, align: int, what: str, who: np.ndarray) -> np.ndarray:
        """Units [threads, width / unit] of the accesses of `who` that begin at the bytes `start`, one for each."""
        outside = (start < 0) | (start + width > self.size)
        if outside.any():
            at = int(outside.argmax())
            first = int(start[at])
            message = f"{what} of bytes {first}..{first + width} of {self.name}, outside of 0..{self.size}"
            raise KernelFault(f"{self.who.name(int(who[at]))}: {message}")
        crooked = start % align != 0
        if crooked.any():
            at = int(crooked.argmax())
            message = f"{what} of {width} bytes at byte {start[at]} of {self.name}, which is no multiple of {align}"
            raise KernelFault(f"{self.who.name(int(who[at]))}: {message}")
        return ((self.base[who] + start) // self.unit)[:, None] + np.arange(width // self.unit)

    def note_read(self, units: np.ndarray, who: np.ndarray, by_warps: bool = False) -> None:
        """Raises KernelFault when another thread has written there and no barrier is between.

        `by_warps`: what a thread reads goes to the others of its warp too.
        """
        if self.space == "private":
            return
        me = who[:, None]
        block, phase = self._now(who)
        self._refuse_copies(units, me, "reads")
        self._refuse_writers(units, me, block, phase, "reads", by_warps)
        known_block = self.reader_block[units]
        here_now = (known_block == block) & (self.read_in[units] == phase)
        reader = np.where(by_warps | (here_now & (self.reader[units] != me)), _SEVERAL, me)
        self._mark(self.reader, units, reader)
        self._mark(
            self.reader_block, units, np.where((known_block != NOBODY) & (known_block != block), _SEVERAL, block)
        )
        self.read_in[units] = np.broadcast_to(phase, units.shape)

    def note_write(self, units: np.ndarray, who: np.ndarray) -> None:
        """Raises KernelFault when another thread has touched these bytes and no barrier is between."""
        if self.space == "private":
            return
        me = who[:, None]
        block, phase = self._now(who)
        self._refuse_copies(units, me, "writes")
        if self.products:
            self._refuse(self.product_reads[units] > 0, units, me, "writes", "", "read by a product that goes on")
        if self.space == "shared":
            self.unfenced[units] = np.broadcast_to(me, units.shape)
        self._refuse_writers(units, me, block, phase, "writes", False)
        known_block = self.reader_block[units]
        elsewhere = (known_block != NOBODY) & (known_block != block)
        now = (known_block == block) & (self.read_in[units] == phase) & (self.reader[units] != me)
        self._refuse(elsewhere | now, units, me, "writes", "read")
        self.writer[units] = np.broadcast_to(me, units.shape)
        self._refuse(self.writer[units] != me, units, me, "writes", "written")
        self.written_in[units] = np.broadcast_to(phase, units.shape)

    def _now(self, who: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        block = self.who.block_of[who]
        return block[:, None], self.who.phase[block][:, None]

    @staticmethod
    def _mark(marks: np.ndarray, units: np.ndarray, value: np.ndarray) -> None:
        """Writes `value`; where two accesses of one op differ, SEVERAL."""
        marks[units] = value
        differ = marks[units] != value
        if differ.any():
            marks[units[differ]] = _SEVERAL

    def _refuse_writers(
        self, units: np.ndarray, me: np.ndarray, block: np.ndarray, phase: np.ndarray, does: str, by_warps: bool
    ) -> None:
        writer = self.writer[units]
        now = (self.written_in[units] == phase) & (by_warps | (writer != me))
        self._refuse((writer != NOBODY) & ((writer // self.who.threads != block) | now), units, me, does, "written")

    def _refuse_copies(self, units: np.ndarray, me: np.ndarray, does: str) -> None:
        self._refuse(self.copied_by[units] != NOBODY, units, me, does, "")

    def _refuse(
        self, wrong: np.ndarray, units: np.ndarray, me: np.ndarray, does: str, done: str, why: str = ""
    ) -> None:
        if not wrong.any():
            return
        row, column = np.argwhere(wrong)[0]
        at = int(units[row, column]) * self.unit % self.size
        why = why or (f"{done} by another without a barrier between" if done else "whose copy has not been waited for")
        raise KernelFault(f"{self.who.name(int(me[row, 0]))} {does} {self.name} at byte {at}, {why}")


class GridBuffer:
    """A buffer value of all threads: elements of `element` from byte `start` (one, or one for each thread) on."""

    def __init__(self, memory: GridMemory, element: PlainFormat, start: np.ndarray | None = None) -> None:
        self.memory, self.element = memory, element
        self.start = np.zeros(1, np.int64) if start is None else start

    def _access(
        self, index: np.ndarray, lanes: int, what: str, who: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(places, first byte of each access, who)"""
        item = self.element.dtype.itemsize
        start = np.broadcast_to(self.start + np.asarray(index, np.int64) * item, self.memory.who.total)[who]
        width = item * lanes
        align = min(WIDEST, width & -width)
        if self.memory.space == "shared":
            self.memory.who.bank_conflicts += extra_passes(start, width, who)
        return self.memory.places(start, width, align, what, who), start, who

    def load(self, index: np.ndarray, lanes: int, mask: np.ndarray | None = None, by_warps: bool = False) -> np.ndarray:
        """[threads] or [threads, lanes]; zeros for threads that are not active, or where the mask does not hold."""
        threads = self.memory.who
        words = self.memory.words
        made = np.zeros((threads.total, lanes * self.element.dtype.itemsize // words.itemsize), words.dtype)
        chosen = np.flatnonzero(threads.active if mask is None else threads.active & mask)
        places, _, who = self._access(index, lanes, "read", chosen)
        self.memory.note_read(places, who, by_warps)
        made[who] = words[places]
        values = made.view(self.element.dtype)
        return values if lanes > 1 else values[:, 0]

    def store(self, index: np.ndarray, value: np.ndarray, mask: np.ndarray | None = None) -> None:
        """`value` is [threads or 1] or [threads or 1, lanes]."""
        threads = self.memory.who
        lanes = value.shape[1] if value.ndim > 1 else 1
        values = np.broadcast_to(value.reshape(len(value), lanes), (threads.total, lanes))
        chosen = np.flatnonzero(threads.active if mask is None else threads.active & mask)
        places, _, who = self._access(index, lanes, "write", chosen)
        self.memory.note_write(places, who)
        words = self.memory.words
        words[places] = np.ascontiguousarray(values[who], self.element.dtype).view(words.dtype)

    def load_masked(self, index: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """Lane by lane, as single elements."""
        lanes = [self.load(index + lane, 1, mask[:, lane]) for lane in range(mask.shape[1])]
        return np.stack(lanes, axis=1)

    def store_masked(self, index: np.ndarray, value: np.ndarray, mask: np.ndarray) -> None:
        for lane in range(value.shape[1]):
            self.store(index + lane, value[:, lane], mask[:, lane])

    def offset(self, index: np.ndarray) -> GridBuffer:
        return GridBuffer(self.memory, self.element, self.start + np.asarray(index) * self.element.dtype.itemsize)

    def view(self, element: PlainFormat) -> GridBuffer:
        return GridBuffer(self.memory, element, self.start)


class AsyncCopies:
    """The copies that threads have started, by the number of their group."""

    def __init__(self, who: GridThreads) -> None:
        self.who = who
        self.groups = np.zeros(who.total, np.int64)  # closed by each thread
        self.pending: list[tuple[GridMemory, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []

    def start(
        self, target: GridBuffer, at: Any, source: GridBuffer, source_at: Any, condition: np.ndarray, lanes: int
    ) -> None:
        """Both ends are touched now; the bytes arrive when they are waited for."""
        who = np.flatnonzero(self.who.active)
        mask = np.broadcast_to(condition, self.who.total)
        data = source.load(source_at, lanes, mask).view(target.memory.words.dtype)
        places, _, who = target._access(at, lanes, "write", who)
        target.memory.note_write(places, who)
        target.memory.copied_by[places] = who[:, None]
        self.pending.append((target.memory, places, who, data[who], self.groups[who]))

    def commit(self) -> None:
        self.groups[self.who.active] += 1

    def wait(self, pending: int) -> None:
        """Brings the bytes of all but the newest groups of the threads that are active."""
        left = []
        for memory, places, who, data, group in self.pending:
            done = self.who.active[who] & (group < self.groups[who] - pending)
            if done.any():
                memory.copied_by[places[done]] = NOBODY
                memory.note_write(places[done], who[done])
                memory.words[places[done]] = data[done]
            if not done.all():
                keep = ~done
                left.append((memory, places[keep], who[keep], data[keep], group[keep]))
        self.pending = left
