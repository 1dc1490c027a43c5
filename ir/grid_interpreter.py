"""Runs a kernel for a GPU by the meaning of its ops: every thread of every block, every access checked.

All threads take each op together, as arrays with the threads along the first axis (or 1 along it, where all have the
same value). Those that a branch or a loop leaves out are not `active`: they neither load nor store. The order of
threads is therefore that of no machine; what makes that visible is the race check of `ir.grid_memory_model`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.core import Op
from ir.formats import PlainFormat
from ir.grid_async_model import BulkCopies, WarpgroupProducts
from ir.grid_memory_model import AsyncCopies, GridBuffer, GridMemory, GridThreads
from ir.interpreter import Environment
from ir.ops.builtin import FuncOp
from ir.ops.grid import WARP
from ir.tile_memory_model import KernelFault
from ir.types import BufferType


@dataclass(frozen=True)
class GridReport:
    """What a run took: `shared_bytes` of each block; passes through shared memory beyond the first of an access."""

    shared_bytes: int
    bank_conflicts: int


class Grid(GridThreads):
    """The threads of a run and the memory of their blocks; what grid ops ask for as `context.grid`."""

    def __init__(self, blocks: int, threads: int, unit: int = 1) -> None:
        super().__init__(blocks, threads)
        self.unit = unit
        self.copies = AsyncCopies(self)
        self.bulk = BulkCopies(self)
        self.products = WarpgroupProducts(self)
        self.shared_bytes = 0

    def spread(self, value: np.ndarray) -> np.ndarray:
        """A value with a row for every thread."""
        return np.broadcast_to(value, (self.total, *value.shape[1:]))

    def shared(self, op: Op, size: int, element: PlainFormat) -> GridBuffer:
        """New memory of every block."""
        nbytes = size * element.dtype.itemsize
        self.shared_bytes += -(-nbytes // 16) * 16
        name = f"shared memory of {_place(op)}"
        memory = GridMemory(self, "shared", name, size=nbytes, unit=self.unit)
        self.products.memories[id(memory)] = memory
        return GridBuffer(memory, element)

    def private(self, size: int, element: PlainFormat) -> GridBuffer:
        """New memory of every thread."""
        return GridBuffer(GridMemory(self, "private", "scratch", size=size * element.dtype.itemsize), element)

    def whole_warps(self, op: Op) -> None:
        """Raises KernelFault unless each warp is here as a whole or not at all."""
        self.whole_groups(op, WARP, "warp")

    def whole_groups(self, op: Op, size: int, what: str) -> None:
        """The same of `size` neighbouring threads."""
        if self.threads % size:
            raise KernelFault(f"{_place(op)} needs blocks of whole {what}s, got {self.threads} threads")
        self._refuse_parts(op, size, what)

    def barrier(self, op: Op) -> None:
        """Begins a new phase of the blocks that are here; raises KernelFault when a block is here in part."""
        self._refuse_parts(op, self.threads, "block")
        self.phase += self.active.reshape(self.blocks, self.threads)[:, 0]

    def _refuse_parts(self, op: Op, size: int, what: str) -> None:
        here = self.active.reshape(-1, size)
        parts = here.any(axis=1) & ~here.all(axis=1)
        if parts.any():
            group = int(parts.argmax())
            missing = group * size + int((~here[group]).argmax())
            raise KernelFault(f"{_place(op)} is not reached by {self.name(missing)}, but by others of its {what}")


def _place(op: Op) -> str:
    return f"{op.name}, op {op.parent.ops.index(op)} of its block" if op.parent else op.name


class GridEnvironment(Environment):
    """The interpreter of all threads of a grid at once."""

    def __init__(self, grid: Grid) -> None:
        super().__init__({}, {})
        self.grid = grid

    def run_op(self, op: Op, read: Sequence[Any]) -> tuple[Any, ...]:
        """The results of `op` for every thread."""
        from ir.grid_meanings import run_for_all  # which knows the ops

        outer, self._running = self._running, op
        made = run_for_all(op, read, self)
        self._running = outer
        return made


def interpret_grid(kernel: FuncOp, arguments: Sequence[Any], *, blocks: int, threads: int) -> GridReport:
    """Runs a kernel on its arguments: numpy arrays for buffers (changed in place), ints for sizes.

    Raises KernelFault for accesses out of bounds or crooked, for races, for barriers and exchanges that only a part of
    the threads reaches, and for bytes of a copy that is under way.
    """
    grid = Grid(blocks, threads, _unit(kernel))
    values: list[Any] = []
    for i, (parameter, value) in enumerate(zip(kernel.arguments, arguments, strict=True)):
        if isinstance(value, np.ndarray):
            assert isinstance(parameter.type, BufferType) and isinstance(parameter.type.element, PlainFormat)
            memory = GridMemory(grid, "global", f"argument {i}", array=value, unit=grid.unit)
            values.append(GridBuffer(memory, parameter.type.element))
        else:
            values.append(np.array([value], np.int64))
    # Integers wrap and exponentials underflow by design; threads that are not active divide by anything.
    with np.errstate(all="ignore"):
        GridEnvironment(grid).run_block(kernel.block, values)
    return GridReport(grid.shared_bytes, grid.bank_conflicts)


def _unit(kernel: FuncOp) -> int:
    """Bytes of the narrowest element that the kernel has buffers of: what the race check tells apart."""
    types = [v.type for op in kernel.walk() for v in (*op.operands, *op.results)]
    return min(
        (t.element.dtype.itemsize for t in types if isinstance(t, BufferType) and isinstance(t.element, PlainFormat)),
        default=1,
    )
