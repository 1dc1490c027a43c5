"""An independent proof that launches fit their kernels. Shares no code with what makes either.

Checked for every `plan.launch` of a program against the tile IR of the kernel it names:
- the arguments are as many as the kernel's parameters and of their types;
- what the kernel loads from and stores to is what the launch says it reads and writes: barriers are placed by that;
- tickets begin anew at barriers: two kernels that take some without a barrier between would share one count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ir.core import Op, Value
from ir.diagnostics import DiagnosticSink
from ir.ops import plan
from ir.ops.builtin import FuncOp
from ir.ops.grid import SharedOp
from ir.ops.grid_async import AsyncCopyOp
from ir.ops.tile_control import BarrierOp, TicketOp
from ir.ops.tile_memory import GatherOp, LoadMaskedOp, LoadOp, OffsetOp, ScratchOp, StoreMaskedOp, StoreOp, ViewOp

_LOADS = LoadOp | LoadMaskedOp | GatherOp | AsyncCopyOp


@dataclass
class Accesses:
    """Numbers of the parameters that a kernel loads from and stores to, in order of the first access."""

    loads: dict[int, Op] = field(default_factory=dict)
    stores: dict[int, Op] = field(default_factory=dict)


def accesses_of(kernel: FuncOp) -> Accesses:
    """What a kernel does to its parameters."""
    found = Accesses()
    parameters: dict[Value, int] = {value: i for i, value in enumerate(kernel.arguments)}
    for op in kernel.walk():
        if isinstance(op, _LOADS | StoreOp | StoreMaskedOp):
            source = op.operands[2] if isinstance(op, AsyncCopyOp) else op.operands[0]
            number = parameters.get(_origin(source))
            if number is not None:
                (found.loads if isinstance(op, _LOADS) else found.stores).setdefault(number, op)
    return found


def _origin(buffer: Value) -> Value:
    """The parameter, scratch or shared memory that a buffer is a part or view of."""
    while True:
        op = buffer.defining_op()
        if not isinstance(op, OffsetOp | ViewOp):
            assert op is None or isinstance(op, ScratchOp | SharedOp), f"{op} gives a buffer"
            return buffer
        buffer = op.operands[0]


def check_launches(programs: Sequence[FuncOp], kernels: Sequence[FuncOp]) -> DiagnosticSink:
    """The faults of the launches of `programs`, none when all fit."""
    diag = DiagnosticSink()
    by_name = {kernel.sym_name: kernel for kernel in kernels}
    known = {name: accesses_of(kernel) for name, kernel in by_name.items()}
    for program in programs:
        counted = ""  # the kernel that took tickets last, while no barrier begins them anew
        for op in program.block.ops:
            if isinstance(op, plan.BarrierOp):
                counted = ""
            if isinstance(op, plan.LaunchOp):
                _check(op, by_name, known, diag)
                counted = _check_tickets(op, by_name.get(op.kernel.name), counted, diag)
    return diag


def _check_tickets(op: plan.LaunchOp, kernel: FuncOp | None, counted: str, diag: DiagnosticSink) -> str:
    """Refuses tickets that go on counting those of the kernel `counted`; the kernel whose tickets count at the end."""
    own = False
    for inner in kernel.walk() if kernel is not None else ():
        if isinstance(inner, BarrierOp):
            counted = ""
        elif isinstance(inner, TicketOp):
            if counted and not own:
                diag.error(op.location, f"@{op.kernel.name} takes tickets after @{counted} without a barrier between")
            counted, own = op.kernel.name, True
    return counted


def _check(
    op: plan.LaunchOp, kernels: Mapping[str, FuncOp], known: Mapping[str, Accesses], diag: DiagnosticSink
) -> None:
    name = op.kernel.name
    kernel = kernels.get(name)
    if kernel is None:
        diag.error(op.location, f"launch of @{name}, which is no kernel of this module")
        return
    have, want = [v.type for v in op.arguments], [v.type for v in kernel.arguments]
    if have != want:
        diag.error(op.location, f"launch of @{name} expected arguments {_types(want)}, got {_types(have)}")
        return
    for done, numbers, listed, where in (
        ("loads from", known[name].loads, (*op.reads, *op.writes), "reads"),
        ("stores to", known[name].stores, op.writes, "writes"),
    ):
        for number in numbers:
            if number not in listed:
                message = f"@{name} {done} argument {number}, which its launch does not list in {where}"
                diag.error(op.location, message)


def _types(types: Sequence[object]) -> str:
    return "(" + ", ".join(map(str, types)) + ")"
