"""What launches of an emulated GPU do: functions of Python, kernels by the meaning of their tile IR, or their PTX.

A `Runner` has the kernels of one module by name; `run` changes memory in place and says which bytes it read and wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from codegen.nvptx.builder import GridKernel
from ir.formats import PlainFormat
from ir.grid_interpreter import Grid, GridEnvironment, _unit
from ir.grid_memory_model import GridBuffer, GridMemory
from ir.types import BufferType
from tests.codegen.nvptx.ptx_interpreter import PtxKernel, run_ptx
from tests.runtime.cuda.emulated_streams import Ranges

MOST_SHARED = 100 << 10
Reach = Callable[[int, int], np.ndarray]  # address, bytes (0: to the end of the memory there) -> u8 [bytes]
Arguments = Sequence[int]  # as the driver has them: 64 bits each


class Runner(Protocol):
    """The kernels of a GPU."""

    def parameters(self, name: str) -> int:
        """How many arguments a kernel has."""
        ...

    def run(
        self, name: str, blocks: int, threads: int, arguments: Arguments, extents: Sequence[int], reach: Reach
    ) -> tuple[Ranges, Ranges]:
        """Runs one launch. `extents`: bytes behind each argument that is an address, 0 where that is not known."""
        ...


class GridRunner:
    """Kernels of tile IR, interpreted: every access checked, within its memory and against other threads."""

    def __init__(self, kernels: Sequence[GridKernel]) -> None:
        self.kernels: Mapping[str, GridKernel] = {kernel.name: kernel for kernel in kernels}

    def parameters(self, name: str) -> int:
        return len(self.kernels[name].func.arguments)

    def run(
        self, name: str, blocks: int, threads: int, arguments: Arguments, extents: Sequence[int], reach: Reach
    ) -> tuple[Ranges, Ranges]:
        kernel = self.kernels[name]
        assert threads == kernel.threads, f"{name} is launched with {threads} threads, made for {kernel.threads}"
        grid = Grid(blocks, threads, _unit(kernel.func))
        memories: list[tuple[int, GridMemory]] = []
        values = []
        for i, (parameter, value) in enumerate(zip(kernel.func.arguments, arguments, strict=True)):
            if isinstance(parameter.type, BufferType):
                assert isinstance(parameter.type.element, PlainFormat)
                found = reach(value, extents[i])
                array = found[: len(found) // grid.unit * grid.unit]
                memory = GridMemory(grid, "global", f"argument {i} of {name}", array=array, unit=grid.unit)
                memories.append((value, memory))
                values.append(GridBuffer(memory, parameter.type.element))
            else:
                values.append(np.array([value], np.int64))
        with np.errstate(all="ignore"):
            GridEnvironment(grid).run_block(kernel.func.block, values)
        reads: Ranges = []
        writes: Ranges = []
        for address, memory in memories:
            reads += _ranges(memory.reader_block != -1, address, memory.unit)
            writes += _ranges(memory.writer != -1, address, memory.unit)
        return reads, writes


class PtxRunner:
    """Kernels as the PTX `text` says, instruction by instruction (`tests.codegen.nvptx.ptx_interpreter`).

    Which bytes were touched it does not say: all behind an address count as read, those that changed as written.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def parameters(self, name: str) -> int:
        return len(PtxKernel.of(self.text, name).parameters)

    def run(
        self, name: str, blocks: int, threads: int, arguments: Arguments, extents: Sequence[int], reach: Reach
    ) -> tuple[Ranges, Ranges]:
        values = [reach(v, n) if n else v for v, n in zip(arguments, extents, strict=True)]
        before = [v.copy() if isinstance(v, np.ndarray) else v for v in values]
        found = re.search(rf"{name}_shared\[(\d*)\]", self.text)
        shared = int(found[1] or MOST_SHARED) if found else 0
        run_ptx(self.text, name, values, blocks=blocks, threads=threads, shared=shared)
        reads: Ranges = [(v, v + n) for v, n in zip(arguments, extents, strict=True) if n]
        writes: Ranges = []
        for address, old, new in zip(arguments, before, values, strict=True):
            if isinstance(old, np.ndarray):
                writes += _ranges(old != new, address, 1)
        return reads, writes


class PythonRunner:
    """Kernels as functions `kernel(blocks, reach, *arguments)` that give what they read and wrote."""

    def __init__(self, kernels: Mapping[str, tuple[int, Callable[..., tuple[Ranges, Ranges]]]]) -> None:
        self.kernels = kernels

    def parameters(self, name: str) -> int:
        return self.kernels[name][0]

    def run(
        self, name: str, blocks: int, threads: int, arguments: Arguments, extents: Sequence[int], reach: Reach
    ) -> tuple[Ranges, Ranges]:
        return self.kernels[name][1](blocks, reach, *arguments)


def _ranges(touched: np.ndarray, address: int, unit: int) -> Ranges:
    """The runs of units that were touched, as bytes."""
    edges = np.flatnonzero(np.diff(touched.astype(np.int8), prepend=0, append=0))
    return [(address + int(a) * unit, address + int(b) * unit) for a, b in edges.reshape(-1, 2)]
