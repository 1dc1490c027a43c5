"""Ops of tile IR and grid ops as LLVM IR for PTX: functions found by an op's class, and what those functions use.

Arithmetic is as for CPUs, memory and threads as GPUs have them. Buffers are generic pointers; LLVM finds out which
memory each points to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lowering import LOWERINGS, FunctionEmitter
from codegen.nvptx.builder import GridKernel
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F8E4M3
from ir.ops import grid, tile_control
from ir.types import VectorType

STATIC_SHARED_BYTES = 48 << 10  # more than this is asked for at the launch
MAX_SHARED_BYTES = 99 << 10  # of a block on sm_89, the least of the three (CUDA C Programming Guide, 16.2)
HOPPER = "sm_90a"
HOPPER_SHARED_BYTES = 227 << 10  # of a block on sm_90
TILE_BYTES = 1024  # what tiles of warpgroups lie on a multiple of
_HOPPER_FILES = ("ir.ops.grid_bulk", "ir.ops.grid_warpgroup")

GridLowering = Callable[["GridEmitter", Any], None]
GRID_LOWERINGS: dict[type[Op], GridLowering] = {}
_NOT_ON_GPUS = (tile_control.TicketOp,)


def grid_lowering(op_class: type[Op]) -> Callable[[GridLowering], GridLowering]:
    """Decorator: the function emits ops of this class for PTX, in place of the way it is written for CPUs."""

    def register(function: GridLowering) -> GridLowering:
        if op_class in GRID_LOWERINGS:
            raise ValueError(f"{op_class.name} is lowered by {GRID_LOWERINGS[op_class].__module__} already")
        GRID_LOWERINGS[op_class] = function
        return function

    return register


class GridEmitter(FunctionEmitter):
    """Writes one kernel for a GPU. `shared` says at which byte of the block's memory each shared buffer begins."""

    def __init__(self, kernel: GridKernel, declarations: dict[str, str]) -> None:
        super().__init__(InstructionSet(frozenset({"fma"})), declarations)
        self.memory = f"@{kernel.name}_shared"
        self.shared = shared_places(kernel)

    def in_space(self, name: str, result: str, types: tuple[str, ...], *arguments: str) -> str:
        """A call of an intrinsic on pointers into one memory, declared once; `arguments` come without their types."""
        self.declarations[name] = f"declare {result} @{name}({', '.join(types)})"
        given = ", ".join(f"{kind} {argument}" for kind, argument in zip(types, arguments, strict=True))
        return f"call {result} @{name}({given})"

    def op(self, op: Op) -> None:
        emit = GRID_LOWERINGS.get(type(op)) or LOWERINGS.get(type(op))
        if emit is None or isinstance(op, _NOT_ON_GPUS):
            raise DiagnosticError.of(Diagnostic("error", f"no lowering of {op.name} to PTX", op.location))
        emit(self, op)


def for_hopper(kernel: GridKernel) -> bool:
    """Whether a kernel has ops that only `HOPPER` has."""
    return any(type(op).__module__ in _HOPPER_FILES for op in kernel.func.walk())


def multiplies_fp8(kernel: GridKernel) -> bool:
    """Whether a kernel has products or casts of f8e4m3, which begin with sm_89."""
    types = (v.type for op in kernel.func.walk() for v in (*op.operands, *op.results))
    return any(isinstance(t, VectorType) and t.element == F8E4M3 for t in types)


def shared_places(kernel: GridKernel) -> dict[Value, int]:
    """First byte of every shared buffer: on a multiple of 16, of 1024 where it is as large."""
    places: dict[Value, int] = {}
    end = 0
    for op in kernel.func.walk():
        if isinstance(op, grid.SharedOp):
            align = TILE_BYTES if _aligned(op) >= TILE_BYTES and for_hopper(kernel) else 16
            end = -(-end // align) * align
            places[op.out] = end
            end += _aligned(op)
    return places


def _aligned(op: grid.SharedOp) -> int:
    return -(-op.size * op.element.dtype.itemsize // 16) * 16


def shared_bytes(kernel: GridKernel) -> int:
    """Shared memory of a block."""
    places = shared_places(kernel)
    ends = [places[op.out] + _aligned(op) for op in kernel.func.walk() if isinstance(op, grid.SharedOp)]
    return max(ends, default=0)


def dynamic_bytes(kernel: GridKernel) -> int:
    """Shared memory that the launch must ask for; 0 where the kernel brings its own."""
    total = shared_bytes(kernel)
    return total if total > STATIC_SHARED_BYTES else 0
