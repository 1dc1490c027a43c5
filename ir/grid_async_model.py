"""What goes on beside the threads of a grid on sm_90: bulk copies counted by barriers, products of warpgroups.

Both are computed when they are started and known when they are waited for: until then their bytes, their sums and the
factors that they read are guarded, and touching them raises KernelFault.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.grid_memory_model import NOBODY, WIDEST, GridBuffer, GridMemory, GridThreads
from ir.tile_memory_model import KernelFault

_GROUP, _ROWS, _ROW_BYTES, _STEP_BYTES, _PIECE_BYTES, _ALIGN = 128, 64, 128, 32, 16, 1024
_LANE = np.arange(_GROUP)
_SUM_ROWS = (_LANE // 32 * 16 + _LANE % 32 // 4)[:, None]


def _left_places(lanes: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column [threads, lanes] of a thread's numbers in a step of the left factor: 8 of 16 bits, 16 of 8."""
    i, each = np.arange(lanes), lanes // 4  # in a register
    rows = _SUM_ROWS + i // each % 2 * 8
    return rows, (_LANE % 4 * each)[:, None] + i // (2 * each) * 4 * each + i % each


@dataclass
class _Barrier:
    """One barrier of a block: bytes of the phase that goes on, and copies of phases nobody has waited for."""

    phases: int = 0  # complete
    expected: int | None = None
    started: int = 0
    copies: list[tuple[int, GridMemory, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def advance(self) -> None:
        if self.expected is not None and self.started == self.expected:
            self.phases, self.expected, self.started = self.phases + 1, None, 0


def _places(buffer: GridBuffer, index: np.ndarray, lanes: int, what: str, who: np.ndarray) -> np.ndarray:
    """Units of the elements from `index` on for each thread of `who`."""
    item = buffer.element.dtype.itemsize
    start = np.broadcast_to(buffer.start + np.asarray(index, np.int64) * item, buffer.memory.who.total)[who]
    return buffer.memory.places(start, item * lanes, min(WIDEST, item * lanes), what, who)


class BulkCopies:
    """Barriers by their byte in shared memory, and the copies that they count."""

    def __init__(self, who: GridThreads) -> None:
        self.who = who
        self.barriers: dict[tuple[int, int], _Barrier] = {}

    def _each(self, barriers: GridBuffer, index: np.ndarray) -> list[tuple[int, tuple[int, int]]]:
        """(thread, key of its barrier) of the active threads."""
        chosen = np.flatnonzero(self.who.active)
        places = _places(barriers, index, 1, "use", chosen)
        return [(int(t), (id(barriers.memory), int(p[0]))) for t, p in zip(chosen, places, strict=True)]

    def _found(self, thread: int, key: tuple[int, int]) -> _Barrier:
        if key not in self.barriers:
            raise KernelFault(f"{self.who.name(thread)} uses a barrier that nobody has made")
        return self.barriers[key]

    def init(self, barriers: GridBuffer, index: np.ndarray) -> None:
        for _, key in self._each(barriers, index):
            self.barriers[key] = _Barrier()

    def expect(self, barriers: GridBuffer, index: np.ndarray, nbytes: int) -> None:
        for thread, key in self._each(barriers, index):
            found = self._found(thread, key)
            if found.expected is not None:
                raise KernelFault(f"{self.who.name(thread)} says what a barrier expects, which has been said")
            found.expected = nbytes
            found.advance()

    def copy(
        self,
        target: GridBuffer,
        at: np.ndarray,
        source: GridBuffer,
        source_at: np.ndarray,
        barriers: GridBuffer,
        index: np.ndarray,
        size: int,
    ) -> None:
        """Both ends are touched now; the bytes arrive when their phase is waited for."""
        chosen = np.flatnonzero(self.who.active)
        keys = self._each(barriers, index)
        read = _places(source, source_at, size, "read", chosen)
        source.memory.note_read(read, chosen)
        places = _places(target, at, size, "write", chosen)
        target.memory.note_write(places, chosen)
        target.memory.copied_by[places] = chosen[:, None]
        data = source.memory.words[read]
        for row, (thread, key) in enumerate(keys):
            found = self._found(thread, key)
            found.copies.append((found.phases, target.memory, places[row : row + 1], chosen[row : row + 1], data[row]))
            found.started += size * target.element.dtype.itemsize
            found.advance()

    def wait(self, barriers: GridBuffer, index: np.ndarray, parity: np.ndarray) -> None:
        parities = np.broadcast_to(parity, self.who.total)
        for thread, key in self._each(barriers, index):
            found = self._found(thread, key)
            if found.phases % 2 == int(parities[thread]) % 2:
                have = f"{found.started} of {found.expected or 'bytes that nobody has expected'}"
                raise KernelFault(f"{self.who.name(thread)} waits in vain: {have} were copied")
            left = []
            for phase, memory, places, copier, data in found.copies:
                if phase >= found.phases:
                    left.append((phase, memory, places, copier, data))
                    continue
                memory.copied_by[places] = NOBODY
                memory.note_write(places, copier)
                memory.words[places] = data
                memory.unfenced[places] = NOBODY
            found.copies = left


class PendingSums:
    """Sums that nobody may read yet: `group` says after which product of each thread's warpgroup they are there."""

    def __init__(self, values: np.ndarray, group: np.ndarray) -> None:
        self.values, self.group = values, group


class WarpgroupProducts:
    """Products under way."""

    def __init__(self, who: GridThreads) -> None:
        self.who = who
        self.started = np.zeros(who.total, np.int64)  # by the warpgroup of each thread
        self.waited = np.zeros(who.total, np.int64)  # of these, how many are known to be done
        self.by_op: dict[object, np.ndarray] = {}  # the number of an op's last product
        self.reads: list[tuple[GridMemory, np.ndarray, int, int]] = []  # units, first thread, number of the product
        self.memories: dict[int, GridMemory] = {}

    def fence(self) -> None:
        for memory in self.memories.values():
            mine = memory.unfenced != NOBODY
            mine[mine] = self.who.active[memory.unfenced[mine]]
            memory.unfenced[mine] = NOBODY

    def start(self, op: object, c: Any, a: np.ndarray, b: GridBuffer, b_index: np.ndarray, step: int) -> PendingSums:
        """Sums of c and of fragments `a` [threads, 16 bytes for each step] times steps of the tiles of b."""
        self._refuse_registers(op)
        sums = c.values if isinstance(c, PendingSums) else c
        sums = np.broadcast_to(sums, (self.who.total, sums.shape[-1]))
        made, columns = np.array(sums), sums.shape[-1] * 2
        elements = np.arange(sums.shape[-1])
        rows = _SUM_ROWS + elements % 4 // 2 * 8
        places = elements // 4 * 8 + _LANE[:, None] % 4 * 2 + elements % 2
        item = b.element.dtype.itemsize
        each, wide = _PIECE_BYTES // item, _STEP_BYTES // item
        lanes = np.broadcast_to(a, (self.who.total, a.shape[-1])).astype(np.float64)
        self.started[self.who.active] += 1
        self.by_op[op] = self.started.copy()
        for first in np.flatnonzero(self.who.active)[::_GROUP]:
            group = slice(first, first + _GROUP)
            right = self._tile(b, b_index, int(first), columns)
            for number, part in enumerate(np.split(lanes[group], a.shape[-1] // each, axis=1)):
                left = np.zeros((_ROWS, wide))
                left[_left_places(each)] = part
                at = (step + number) * wide
                product = (left @ right[:, at : at + wide].T)[rows, places]  # whole numbers are exact
                whole = made.dtype.kind == "i"
                total = made[group] + (product.astype(np.int64) if whole else product)
                made[group] = total.astype(made.dtype)
        return PendingSums(made, self.started.copy())

    def _refuse_registers(self, op: object) -> None:
        """A product whose op is met again while it goes on: its left factor has been computed anew over it."""
        before = self.by_op.get(op)
        if before is None:
            return
        early = self.who.active & (before > self.waited)
        if early.any():
            name = self.who.name(int(early.argmax()))
            raise KernelFault(f"{name} writes registers of a left factor, read by a product that goes on")

    def _tile(self, buffer: GridBuffer, index: np.ndarray, first: int, rows: int) -> np.ndarray:
        """[rows, 128 bytes of numbers] in f64 of a tile; all threads of the warpgroup name the same."""
        memory, who = buffer.memory, np.arange(first, first + _GROUP)
        starts = np.broadcast_to(index, self.who.total)[who]
        if (starts != starts[0]).any():
            raise KernelFault(f"{self.who.name(first)} and others of its warpgroup name different tiles")
        start = buffer.start[first if len(buffer.start) > 1 else 0] + starts[0] * buffer.element.dtype.itemsize
        one = who[:1]
        units = memory.places(np.array([start]), rows * _ROW_BYTES, _ALIGN, "product", one)
        memory.note_read(units, one, by_warps=True)
        if (memory.unfenced[units] != NOBODY).any():
            message = f"{memory.name}, written without grid.fence_async between"
            raise KernelFault(f"{self.who.name(first)} multiplies bytes of {message}")
        memory.product_reads[units] += 1
        memory.products += 1
        self.reads.append((memory, units, first, int(self.started[first])))
        pieces = _ROW_BYTES // _PIECE_BYTES
        stored = memory.words[units[0]].view(buffer.element.dtype).reshape(rows, pieces, -1)
        swizzle = np.arange(pieces) ^ np.arange(rows)[:, None] % 8
        return stored[np.arange(rows)[:, None], swizzle].reshape(rows, -1).astype(np.float64)

    def wait(self, c: Any, pending: int) -> Any:
        active = self.who.active
        self.waited[active] = np.maximum(self.waited, self.started - pending)[active]
        left = []
        for memory, units, first, number in self.reads:
            if self.who.active[first] and number <= self.started[first] - pending:
                memory.product_reads[units] -= 1
                memory.products -= 1
                memory.note_read(units, np.array([first]), by_warps=True)  # until now: others know after a barrier
            else:
                left.append((memory, units, first, number))
        self.reads = left
        if not isinstance(c, PendingSums):
            return c
        done = c.group <= self.started - pending
        return c.values if done[self.who.active].all() else c
