"""Runs kernels and programs by the meaning of their ops: every thread of the team, every access checked.

Threads are Python threads that meet at barriers, so the order inside a phase is the order of no particular machine;
what makes that visible is the race check of `ir.tile_memory_model`, not luck.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from ir.core import Op
from ir.formats import PlainFormat
from ir.interpreter import Environment
from ir.ops.builtin import FuncOp
from ir.tile_memory_model import BufferView, KernelFault, Memory
from ir.types import BufferType

BARRIER_SECONDS = 60.0  # a thread that never comes is a fault, not a hang


class Team:
    """The threads that run one kernel or program together, and the memory they share."""

    def __init__(self, threads: int, memories: Sequence[Memory]) -> None:
        self.threads = threads
        self.memories = list({id(m): m for m in memories}.values())
        self.barrier = threading.Barrier(threads, action=self._advance, timeout=BARRIER_SECONDS)
        self.waiting: list[Op | None] = [None] * threads  # the barrier each thread is at; None = the end
        self._tickets = itertools.count()

    def _advance(self) -> None:
        if any(op is not self.waiting[0] for op in self.waiting):
            places = ", ".join(f"thread {t} at {_barrier_name(op)}" for t, op in enumerate(self.waiting))
            raise KernelFault(f"the threads of a team meet at different barriers: {places}")
        self._tickets = itertools.count()
        for memory in self.memories:
            memory.new_phase()

    def take_ticket(self) -> int:
        """Tickets taken since the last barrier, this one not counted. `next` on a count is atomic."""
        return next(self._tickets)

    def wait(self, thread: int, barrier: Op | None) -> None:
        """Returns when every thread is at the same barrier. Raises KernelFault when that cannot happen any more."""
        self.waiting[thread] = barrier
        try:
            self.barrier.wait()
        except threading.BrokenBarrierError:
            raise _Abandoned(f"thread {thread} waits at {_barrier_name(barrier)} in vain") from None

    def run(self, body: Callable[[int], None]) -> None:
        """`body(thread)` on every thread; the fault of a thread is raised here."""
        with ThreadPoolExecutor(self.threads) as pool:
            runs = [pool.submit(self._guarded, body, thread) for thread in range(self.threads)]
        faults = [fault for run in runs if (fault := run.exception()) is not None]
        # A thread that only waited for one that failed has nothing to say.
        faults.sort(key=lambda fault: isinstance(fault, _Abandoned))
        if faults:
            raise faults[0]

    def _guarded(self, body: Callable[[int], None], thread: int) -> None:
        try:
            body(thread)
            self.wait(thread, None)
        except BaseException:
            self.barrier.abort()
            raise


class _Abandoned(KernelFault):
    """The fault of a thread that waited for others."""


def _barrier_name(barrier: Op | None) -> str:
    if barrier is None:
        return "the end"
    block = barrier.parent
    return f"{barrier.name}, op {block.ops.index(barrier)} of its block" if block else barrier.name


class ThreadEnvironment(Environment):
    """The interpreter of one thread: knows its number and how to wait for the others."""

    def __init__(self, team: Team, thread: int) -> None:
        super().__init__({}, {})
        self.team = team
        self.thread = thread

    def wait(self, barrier: Op) -> None:
        """Waits at a barrier until every thread of the team is there."""
        self.team.wait(self.thread, barrier)


def interpret_kernel(kernel: FuncOp, arguments: Sequence[Any], threads: int = 1) -> None:
    """Runs a kernel on its arguments: numpy arrays for buffers (changed in place), ints for sizes.

    Raises KernelFault for accesses out of bounds and for races.
    """
    several = threads > 1
    memories = [
        Memory(a, f"argument {i}", several) if isinstance(a, np.ndarray) else None for i, a in enumerate(arguments)
    ]
    team = Team(threads, [m for m in memories if m is not None])
    team.run(lambda thread: _run_kernel(kernel, _views(kernel, arguments, memories, thread), team, thread))


def _views(kernel: FuncOp, arguments: Sequence[Any], memories: Sequence[Memory | None], thread: int) -> list[Any]:
    values: list[Any] = []
    for parameter, value, memory in zip(kernel.arguments, arguments, memories, strict=True):
        if memory is None:
            values.append(np.int64(value))
            continue
        assert isinstance(parameter.type, BufferType) and isinstance(parameter.type.element, PlainFormat)
        values.append(BufferView(memory, parameter.type.element, 0, thread))
    return values


def _run_kernel(kernel: FuncOp, values: Sequence[Any], team: Team, thread: int) -> None:
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):  # integers wrap and exp underflows by design
        ThreadEnvironment(team, thread).run_block(kernel.block, values)


def interpret_program(
    program: FuncOp,
    kernels: Mapping[str, FuncOp],
    *,
    inputs: Mapping[str, np.ndarray],
    sizes: Mapping[str, int],
    weights: np.ndarray,
    arena: np.ndarray,
    kv: np.ndarray,
    threads: int = 1,
) -> None:
    """Runs a plan-level program: launches in order on the whole team, barriers where the plan has them.

    `inputs` (ids, positions, slots, rows, logits), `weights`, `arena` and `kv` (bytes) are what the native step gets;
    logits and kv are changed in place. Raises KernelFault for races between launches too: a barrier that the plan
    forgot is found here.
    """
    arrays = {**inputs, "weights": weights, "arena": arena, "kv cache": kv}
    shared = {name: Memory(a, name, shared=threads > 1) for name, a in arrays.items()}
    team = Team(threads, list(shared.values()))
    team.run(lambda thread: ProgramEnvironment(team, thread, kernels, shared, sizes).run_program(program))


class ProgramEnvironment(ThreadEnvironment):
    """What plan-level ops ask for: sizes of the run, memory, kernels to launch."""

    def __init__(
        self,
        team: Team,
        thread: int,
        kernels: Mapping[str, FuncOp],
        memories: Mapping[str, Memory],
        sizes: Mapping[str, int],
    ) -> None:
        super().__init__(team, thread)
        self.kernels, self.memories, self.sizes = kernels, memories, sizes

    def run_program(self, program: FuncOp) -> None:
        """Every op of the program on this thread."""
        self.run_block(program.block, ())

    def place(self, memory: str, element: PlainFormat, start: int, size: int | None = None) -> BufferView:
        """The buffer that begins at byte `start` of a memory and has `size` bytes (all that follow by default)."""
        found = self.memories[memory]
        last = found.bytes.size
        return BufferView(
            found, element, start, self.thread, (start, last if size is None else min(last, start + size))
        )

    def launch(self, kernel: str, arguments: Sequence[Any]) -> None:
        """Runs this thread's part of a kernel."""
        _run_kernel(self.kernels[kernel], arguments, self.team, self.thread)
