"""An independent proof that a plan-level program is sound. Shares no code with what makes plans.

Checked on the ops alone, in order:
- a reserved buffer is used only between its `plan.reserve` and its one `plan.release`, and all are released;
- buffers alive at the same time never share a byte, and none reaches past the arena;
- between two launches of which one writes bytes that the other touches there is a `plan.barrier`;
- no argument of a launch shares bytes with one that it writes: kernels are compiled on that promise;
- the last launch is followed by a barrier, so that results are there when the step returns.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ir.core import Op, Value
from ir.diagnostics import DiagnosticSink
from ir.ops import plan
from ir.ops.builtin import FuncOp
from ir.ops.plan_await import AwaitExpertsOp
from ir.ops.plan_grid import KVPlaneOp, PiecesOp
from ir.types import BufferType

Region = tuple[str, int, int]  # memory, first byte, one past the last


def check_plan(program: FuncOp, arena_bytes: int) -> DiagnosticSink:
    """The faults of `program`, none when it is sound."""
    checker = _Checker(arena_bytes)
    for op in program.block.ops:
        checker.step(op)
    checker.finish(program)
    return checker.diag


@dataclass
class _Checker:
    arena_bytes: int
    diag: DiagnosticSink = field(default_factory=DiagnosticSink)
    live: dict[Value, plan.ReserveOp] = field(default_factory=dict)
    ended: dict[Value, None] = field(default_factory=dict)
    since_barrier: list[tuple[plan.LaunchOp, list[Region], list[Region]]] = field(default_factory=list)

    def step(self, op: Op) -> None:
        match op:
            case plan.ReserveOp():
                self._reserve(op)
            case plan.ReleaseOp():
                if self.live.pop(op.buffer, None) is None:
                    again = "a second time" if op.buffer in self.ended else "that was never reserved"
                    self.diag.error(op.location, f"'plan.release' of a buffer {again}")
                self.ended[op.buffer] = None
            case plan.LaunchOp():
                self._launch(op)
            case AwaitExpertsOp():
                if isinstance(op.ids.defining_op(), plan.ReserveOp) and op.ids not in self.live:
                    self.diag.error(op.location, f"'{op.name}' uses a buffer after its release")
            case plan.BarrierOp():
                self.since_barrier.clear()

    def _reserve(self, op: plan.ReserveOp) -> None:
        end = op.offset + op.bytes
        if op.offset < 0 or end > self.arena_bytes:
            message = f"'plan.reserve' of bytes {op.offset}..{end} reaches past the arena of {self.arena_bytes} bytes"
            self.diag.error(op.location, message)
        for other in self.live.values():
            if op.offset < other.offset + other.bytes and other.offset < end:
                taken = f"{other.offset}..{other.offset + other.bytes}"
                self.diag.error(op.location, f"'plan.reserve' of bytes {op.offset}..{end} overlaps {taken}, alive")
        self.live[op.out] = op

    def _launch(self, op: plan.LaunchOp) -> None:
        for value in op.arguments:
            if isinstance(value.defining_op(), plan.ReserveOp) and value not in self.live:
                self.diag.error(op.location, f"launch of {op.kernel} uses a buffer after its release")
        writes = [_region(op.arguments[i]) for i in op.writes]
        reads = [_region(op.arguments[i]) for i in op.reads]
        for i in op.writes:
            others = [_region(v) for j, v in enumerate(op.arguments) if j != i and isinstance(v.type, BufferType)]
            clash = _clash([_region(op.arguments[i])], others)
            if clash:
                message = f"launch of {op.kernel} writes {clash} as argument {i} and gets it as another one too"
                self.diag.error(op.location, message)
        for earlier, earlier_writes, earlier_reads in self.since_barrier:
            clash = _clash(earlier_writes, writes + reads) or _clash(earlier_reads, writes)
            if clash:
                message = f"no barrier between launches of {earlier.kernel} and {op.kernel}, which both touch {clash}"
                self.diag.error(op.location, message)
        self.since_barrier.append((op, writes, reads))

    def finish(self, program: FuncOp) -> None:
        for op in self.live.values():
            self.diag.error(op.location, f"bytes {op.offset}..{op.offset + op.bytes} are never released")
        if self.since_barrier:
            self.diag.error(program.location, f"@{program.sym_name} ends without a barrier after its last launch")


def _region(value: Value) -> Region:
    """The memory a buffer stands for."""
    match value.defining_op():
        case plan.ReserveOp() as op:
            return "arena", op.offset, op.offset + op.bytes
        case plan.WeightOp() as op:
            return "weights", op.offset, op.offset + op.bytes
        case plan.KVOp() as op:
            return "kv cache", op.layer, op.layer + 1  # by layer: which slots is known only at run time
        case KVPlaneOp() as op:
            return f"plane {op.plane} of the kv cache", op.layer, op.layer + 1
        case plan.InputOp() as op:
            return op.which, 0, 1
        case PiecesOp():
            return "pieces", 0, 1
    raise TypeError(f"{value.type} is no buffer of a plan")


def _clash(first: list[Region], second: list[Region]) -> str:
    """A name for the first memory both touch; "" when they are disjoint."""
    for a in first:
        for b in second:
            if a[0] == b[0] and a[1] < b[2] and b[1] < a[2]:
                return f"{a[0]} {max(a[1], b[1])}..{min(a[2], b[2])}"
    return ""
