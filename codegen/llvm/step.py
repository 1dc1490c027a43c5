"""Plan IR -> the step function: one native function that every thread of the team runs from end to end.

    i64 stratum_step_NAME(StepArgs*, i64 tid)

StepArgs are 32 words of 64 bits: 0 ids, 1 positions, 2 slots, 3 rows, 4 logits, 5 weights, 6 arena, 7 KV cache
(pointers); 8 tokens, 9 rows, 10 threads, 11 team*, 12 profile* (or 0), 13 ctx, 14 slots, 15 reader (or 0), 16 answer,
17 wanted*; the others are reserved. The profile takes two cycle counts, start and end, for each launch and thread: word
(launch * threads + tid) * 2.

Where weights or the KV cache are not all in memory, the reader is a function `void (i64 number, i32* ids, i64 count)`.
Thread 0 calls it at wait `number` of the program when byte `number` of `wanted` is not 0, the other threads waiting; it
returns when what is waited for is there, having set the answer to 1. With any other answer the step ends at once and
gives 2. Waits for weights have the numbers 0 and up, those for keys and values follow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lower_kernel import lower_kernel
from codegen.llvm.team import team_text
from codegen.programs import Program
from ir.core import Op, Value
from ir.ops import plan, plan_await
from ir.ops.builtin import FuncOp, ReturnOp
from ir.types import BufferType

_INPUT_WORDS = {"ids": 0, "positions": 1, "slots": 2, "rows": 3, "logits": 4}
_SIZE_WORDS = {"tokens": 8, "rows": 9, "ctx": 13, "slots": 14}

_MARK = """
declare i64 @llvm.readcyclecounter()

define internal void @stratum_mark(ptr %profile, i64 %word) {
  %off = icmp eq ptr %profile, null
  br i1 %off, label %done, label %write
write:
  %now = call i64 @llvm.readcyclecounter()
  %at = getelementptr i64, ptr %profile, i64 %word
  store i64 %now, ptr %at, align 8
  br label %done
done:
  ret void
}
"""

_AWAIT = """
define internal i1 @stratum_await(ptr %args, i64 %tid, i64 %threads, ptr %team, i64 %number, ptr %ids, i64 %count) {
  %reader_at = getelementptr i64, ptr %args, i64 15
  %reader = load ptr, ptr %reader_at, align 8
  %absent = icmp eq ptr %reader, null
  br i1 %absent, label %go, label %look
look:
  %wanted_at = getelementptr i64, ptr %args, i64 17
  %wanted = load ptr, ptr %wanted_at, align 8
  %flag_at = getelementptr i8, ptr %wanted, i64 %number
  %flag = load i8, ptr %flag_at, align 1
  %resident = icmp eq i8 %flag, 0
  br i1 %resident, label %go, label %wait
go:
  ret i1 true
wait:
  %answer_at = getelementptr i64, ptr %args, i64 16
  call void @stratum_barrier(ptr %team, i64 %threads)
  %first = icmp eq i64 %tid, 0
  br i1 %first, label %read, label %join
read:
  %reading = getelementptr i8, ptr %team, i64 640
  store i64 0, ptr %answer_at, align 8
  store atomic i32 1, ptr %reading seq_cst, align 4
  call void %reader(i64 %number, ptr %ids, i64 %count)
  store atomic i32 0, ptr %reading seq_cst, align 4
  br label %join
join:
  call void @stratum_barrier(ptr %team, i64 %threads)
  %answer = load i64, ptr %answer_at, align 8
  %there = icmp eq i64 %answer, 1
  ret i1 %there
}
"""


def step_symbol(program: str) -> str:
    """The exported name of a program's step function."""
    return f"stratum_step_{program}"


def module_text(
    programs: Sequence[Program], kernels: Sequence[FuncOp], instructions: InstructionSet, triple: str, attributes: str
) -> str:
    """LLVM IR of kernels, team and step functions. `attributes` is the body of the functions' attribute group."""
    declarations: dict[str, str] = {}
    bodies = [lower_kernel(kernel, instructions, declarations, "#0") for kernel in kernels]
    steps = [_step_text(program) for program in programs]
    parts = [
        *sorted(declarations.values()),
        team_text(triple),
        _MARK,
        _AWAIT,
        *bodies,
        *steps,
        f"attributes #0 = {{ {attributes} }}",
    ]
    return "\n".join(parts) + "\n"


def _step_text(program: Program) -> str:
    writer = _StepWriter(weight_waits=len(program.awaits()))
    for op in program.func.block.ops:
        writer.op(op)
    body = "\n".join(writer.lines)
    return f"define i64 @{step_symbol(program.name)}(ptr %args, i64 %tid) #0 {{\n{body}\n}}\n"


class _StepWriter:
    """Writes the body of one step function."""

    def __init__(self, weight_waits: int) -> None:
        self.weight_waits = weight_waits
        self.lines: list[str] = []
        self.names: dict[Value, str] = {}
        self.counter = 0
        self.launches = 0
        self.waits = False
        self.weights, self.arena, self.kv = self._word(5, "ptr"), self._word(6, "ptr"), self._word(7, "ptr")
        self.threads, self.team, self.profile = self._word(10, "i64"), self._word(11, "ptr"), self._word(12, "ptr")
        self.ctx, self.slots = self._word(13, "i64"), self._word(14, "i64")

    def op(self, op: Op) -> None:
        handlers: dict[type[Op], Callable[[Any], None]] = {
            plan.InputOp: self._input, plan.SizeOp: self._size, plan.WeightOp: self._weight, plan.KVOp: self._kv,
            plan.ReserveOp: self._reserve, plan.LaunchOp: self._launch, plan.BarrierOp: self._barrier,
            plan.ReleaseOp: lambda op: None, plan_await.AwaitWeightsOp: self._await,
            plan_await.AwaitExpertsOp: self._await, plan_await.AwaitKVOp: self._await, ReturnOp: self._return,
        }  # fmt: skip
        handlers[type(op)](op)

    def _emit(self, text: str) -> None:
        self.lines.append("  " + text)

    def _assign(self, text: str) -> str:
        self.counter += 1
        self._emit(f"%s{self.counter} = {text}")
        return f"%s{self.counter}"

    def _word(self, index: int, type: str) -> str:
        pointer = self._assign(f"getelementptr i64, ptr %args, i64 {index}")
        return self._assign(f"load {type}, ptr {pointer}, align 8")

    def _input(self, op: plan.InputOp) -> None:
        self.names[op.out] = self._word(_INPUT_WORDS[op.which], "ptr")

    def _size(self, op: plan.SizeOp) -> None:
        word = self._word(_SIZE_WORDS[op.which], "i64")
        self.names[op.out] = self._assign(f"mul i64 {word}, {op.scale}") if op.scale != 1 else word

    def _weight(self, op: plan.WeightOp) -> None:
        self.names[op.out] = self._assign(f"getelementptr i8, ptr {self.weights}, i64 {op.offset}")

    def _reserve(self, op: plan.ReserveOp) -> None:
        self.names[op.out] = self._assign(f"getelementptr i8, ptr {self.arena}, i64 {op.offset}")

    def _kv(self, op: plan.KVOp) -> None:
        growing = self._assign(f"mul i64 {self.ctx}, {op.position_bytes * op.layer}")
        per_slot = self._assign(f"add i64 {growing}, {op.slot_bytes * op.layer}")
        offset = self._assign(f"mul i64 {per_slot}, {self.slots}")
        self.names[op.out] = self._assign(f"getelementptr i8, ptr {self.kv}, i64 {offset}")

    def _launch(self, op: plan.LaunchOp) -> None:
        arguments = [f"{'ptr' if isinstance(v.type, BufferType) else 'i64'} {self.names[v]}" for v in op.arguments]
        arguments += ["i64 %tid", f"i64 {self.threads}", f"ptr {self.team}"]
        first = self._assign(f"mul i64 {self.threads}, {2 * self.launches}")
        own = self._assign("shl i64 %tid, 1")
        start = self._assign(f"add i64 {first}, {own}")
        end = self._assign(f"add i64 {start}, 1")
        self._emit(f"call void @stratum_mark(ptr {self.profile}, i64 {start})")
        self._emit(f"call void @{op.kernel.name}({', '.join(arguments)})")
        self._emit(f"call void @stratum_mark(ptr {self.profile}, i64 {end})")
        self.launches += 1

    def _barrier(self, op: plan.BarrierOp) -> None:
        self._emit(f"call void @stratum_barrier(ptr {self.team}, i64 {self.threads})")

    def _await(self, op: plan_await.AwaitOp | plan_await.AwaitKVOp) -> None:
        ids, count = "null", "0"
        if isinstance(op, plan_await.AwaitExpertsOp):
            ids, count = self.names[op.ids], self.names[op.count]
        number = op.attributes["number"] + (self.weight_waits if isinstance(op, plan_await.AwaitKVOp) else 0)
        there = self._assign(
            f"call i1 @stratum_await(ptr %args, i64 %tid, i64 {self.threads}, ptr {self.team}, i64 {number}, "
            f"ptr {ids}, i64 {count})"
        )
        self._emit(f"br i1 {there}, label %go{number}, label %stop")
        self.lines.append(f"go{number}:")
        self.waits = True

    def _return(self, op: ReturnOp) -> None:
        self._emit("ret i64 0")
        if self.waits:
            self.lines.append("stop:")
            self._emit("ret i64 2")
