"""Tile IR with grid ops -> LLVM IR for AMD GPUs: what is as on other GPUs is taken from codegen.nvptx.

A kernel without matrix products runs as it is, two warps of 32 in a wave of 64. One with products has a wave for each
warp, whose halves do the same: the wave's product needs all lanes, and warps part ways at loops. Then the launch has
twice the threads. Asynchronous copies are loads and stores on the spot, which is what they mean when they are early.

Refused by name: kernels that want more shared memory or threads than a block has, and ops without a way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from codegen.amdgpu.fragments import Places, places_of_a, places_of_b, places_of_columns, places_of_rows, places_of_sums
from codegen.llvm.lowering import LOWERINGS, llvm_type
from codegen.nvptx.builder import WARP, GridKernel
from codegen.nvptx.lower_kernel import lower_body
from codegen.nvptx.lowering import GRID_LOWERINGS, GridEmitter, multiplies_fp8, shared_bytes
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, I8
from ir.ops import grid, grid_async, grid_matrix, tile_control, tile_convert, tile_memory
from ir.ops.tile_types import element_of, lanes_of

MAX_SHARED_BYTES = 64 << 10  # of a block (AMD, "CDNA3 Instruction Set Architecture", 1.2: local data share)
MAX_THREADS = 1024
_LOCAL, _GLOBAL = "ptr addrspace(3)", "ptr addrspace(1)"

AmdLowering = Callable[["AmdEmitter", Any], None]
AMD_LOWERINGS: dict[type[Op], AmdLowering] = {}
# What codegen.nvptx says in words that LLVM has for any target.
_SHARED = (
    *(grid.SharedOp, grid.JoinOp, grid.PartOp, grid.FmaPairsOp),
    *(tile_memory.LoadOp, tile_memory.StoreOp, tile_memory.PrefetchOp, tile_convert.CastOp),
)


def amd_lowering(op_class: type[Op]) -> Callable[[AmdLowering], AmdLowering]:
    """Decorator: the function emits ops of this class for AMD GPUs."""

    def register(function: AmdLowering) -> AmdLowering:
        AMD_LOWERINGS[op_class] = function
        return function

    return register


def has_products(kernel: GridKernel) -> bool:
    """Whether each warp takes a whole wave."""
    return any(isinstance(op, grid_matrix.MmaOp | grid_matrix.LoadMatrixOp) for op in kernel.func.walk())


def launch_threads(kernel: GridKernel) -> int:
    """Threads of a block at the launch."""
    return kernel.threads * (2 if has_products(kernel) else 1)


class AmdEmitter(GridEmitter):
    """Writes one kernel. `doubled`: the halves of a wave do the same."""

    def __init__(self, kernel: GridKernel, declarations: dict[str, str]) -> None:
        super().__init__(kernel, declarations)
        if multiplies_fp8(kernel):
            message = f"@{kernel.name} computes with f8e4m3, which gfx942 has with another bias"
            raise DiagnosticError(message, hint="the same weights have products with activations in bf16")
        self.threads, self.doubled = kernel.threads, has_products(kernel)

    def op(self, op: Op) -> None:
        emit: Any = AMD_LOWERINGS.get(type(op))
        if emit is None:
            on_gpus = GRID_LOWERINGS.get(type(op))
            emit = on_gpus if isinstance(op, _SHARED) else None if on_gpus else LOWERINGS.get(type(op))
        if emit is None or isinstance(op, tile_control.TicketOp | tile_memory.ScratchOp):
            raise DiagnosticError.of(Diagnostic("error", f"no lowering of {op.name} to AMD GPUs", op.location))
        emit(self, op)

    def number(self, name: str) -> str:
        """A number of this thread as i32."""
        return self.assign(self.intrinsic(f"llvm.amdgcn.{name}", "i32"))

    def lane(self) -> str:
        """This thread's lane of the wave, i32."""
        low = self.assign(self.intrinsic("llvm.amdgcn.mbcnt.lo", "i32", "i32 -1", "i32 0"))
        return self.assign(self.intrinsic("llvm.amdgcn.mbcnt.hi", "i32", "i32 -1", f"i32 {low}"))

    def of_lane(self, label: str, table: np.ndarray) -> str:
        """The entry of a table [64] for this lane, i32. Tables of one label are the same."""
        numbers = ", ".join(f"i32 {int(x)}" for x in table)
        name, kind = f"@{label}", f"[{len(table)} x i32]"
        self.declarations[name] = f"{name} = private addrspace(4) constant {kind} [{numbers}]"
        place = self.assign(f"getelementptr {kind}, ptr addrspace(4) {name}, i32 0, i32 {self.lane()}")
        return self.assign(f"load i32, ptr addrspace(4) {place}, align 4")

    def from_lane(self, word: str, lane: str) -> str:
        """A word of another lane."""
        place = self.assign(f"shl i32 {lane}, 2")
        return self.assign(self.intrinsic("llvm.amdgcn.ds.bpermute", "i32", f"i32 {place}", f"i32 {word}"))

    def gathered(self, words: list[str], label: str, places: Places) -> str:
        """The word that `codegen.amdgpu.fragments` names for this lane, out of those of another."""
        lane, chosen = (
            self.of_lane(f"{label}_{what}", table) for what, table in zip(("lane", "word"), places, strict=True)
        )
        made = self.from_lane(words[0], lane)
        for number, word in enumerate(words[1:], 1):
            other, here = self.from_lane(word, lane), self.assign(f"icmp eq i32 {chosen}, {number}")
            made = self.assign(f"select i1 {here}, i32 {other}, i32 {made}")
        return made

    def words(self, value: Value) -> list[str]:
        """The 32-bit words of a vector."""
        count = lanes_of(value.type) * element_of(value.type).bits // 32
        bits = self.assign(f"bitcast {self.typed(value)} to <{count} x i32>")
        return [self.assign(f"extractelement <{count} x i32> {bits}, i64 {i}") for i in range(count)]

    def joined(self, words: list[str], kind: str = "i32") -> str:
        """Words as a vector."""
        made = "poison"
        for i, word in enumerate(words):
            made = self.assign(f"insertelement <{len(words)} x {kind}> {made}, {kind} {word}, i64 {i}")
        return made


# -- threads


@amd_lowering(tile_control.ThreadIdOp)
def _thread_id(e: AmdEmitter, op: tile_control.ThreadIdOp) -> None:
    number = e.number("workitem.id.x")
    if e.doubled:
        wave = e.assign(f"lshr i32 {number}, 6")
        first, lane = e.assign(f"shl i32 {wave}, 5"), e.assign(f"and i32 {number}, 31")
        number = e.assign(f"or i32 {first}, {lane}")
    e.define(op.out, f"zext nneg i32 {number} to i64")


@amd_lowering(tile_control.NumThreadsOp)
def _num_threads(e: AmdEmitter, op: tile_control.NumThreadsOp) -> None:
    e.names[op.out] = str(e.threads)


@amd_lowering(grid.BlockIdOp)
def _block_id(e: AmdEmitter, op: grid.BlockIdOp) -> None:
    e.define(op.out, f"zext nneg i32 {e.number('workgroup.id.x')} to i64")


@amd_lowering(grid.NumBlocksOp)
def _num_blocks(e: AmdEmitter, op: grid.NumBlocksOp) -> None:
    """Work-items of the grid, which the dispatch packet has at byte 12 (HSA, "System Architecture", 2.9.6)."""
    packet = e.assign(e.intrinsic("llvm.amdgcn.dispatch.ptr", "ptr addrspace(4)"))
    place = e.assign(f"getelementptr i8, ptr addrspace(4) {packet}, i64 12")
    items = e.assign(f"load i32, ptr addrspace(4) {place}, align 4")
    blocks = e.assign(f"udiv i32 {items}, {e.threads * (2 if e.doubled else 1)}")
    e.define(op.out, f"zext nneg i32 {blocks} to i64")


@amd_lowering(tile_control.BarrierOp)
def _barrier(e: AmdEmitter, op: tile_control.BarrierOp) -> None:
    e.emit('fence syncscope("workgroup") release')
    e.emit(e.intrinsic("llvm.amdgcn.s.barrier", "void"))
    e.emit('fence syncscope("workgroup") acquire')


@amd_lowering(grid.ShuffleOp)
def _shuffle(e: AmdEmitter, op: grid.ShuffleOp) -> None:
    """Bits 10 .. 14 of the pattern are those of the lane that are flipped, within 32 lanes."""
    kind = llvm_type(op.x.type)
    word = e.name(op.x) if kind == "i32" else e.assign(f"bitcast {e.typed(op.x)} to i32")
    pattern = op.mask << 10 | 0x1F
    made = e.assign(e.intrinsic("llvm.amdgcn.ds.swizzle", "i32", f"i32 {word}", f"i32 {pattern}"))
    e.define(op.out, f"bitcast i32 {made} to {kind}")


@amd_lowering(grid.Exp2Op)
def _exp2(e: AmdEmitter, op: grid.Exp2Op) -> None:
    lanes, kind = lanes_of(op.x.type), llvm_type(op.x.type)
    if kind == "float":
        e.define(op.out, e.intrinsic("llvm.amdgcn.exp2.f32", "float", f"float {e.name(op.x)}"))
        return
    numbers = [e.assign(f"extractelement {e.typed(op.x)}, i64 {i}") for i in range(lanes)]
    made = [e.assign(e.intrinsic("llvm.amdgcn.exp2.f32", "float", f"float {x}")) for x in numbers]
    e.names[op.out] = e.joined(made, "float")


# -- copies


@amd_lowering(grid_async.AsyncCopyOp)
def _async_copy(e: AmdEmitter, op: grid_async.AsyncCopyOp) -> None:
    """Zeros come from memory that has them, so that nothing is read where the condition fails."""
    e.declarations["@zeros"] = "@zeros = private addrspace(1) constant [16 x i8] zeroinitializer, align 16"
    source = e.assign(f"addrspacecast ptr {e.address(op.source, op.source_index, inbounds=False)} to {_GLOBAL}")
    chosen = e.assign(f"select i1 {e.name(op.condition)}, {_GLOBAL} {source}, {_GLOBAL} @zeros")
    kind = f"<{op.bytes // 4} x i32>"
    value = e.assign(f"load {kind}, {_GLOBAL} {chosen}, align {op.bytes}")
    target = e.assign(f"addrspacecast ptr {e.address(op.target, op.target_index)} to {_LOCAL}")
    e.emit(f"store {kind} {value}, {_LOCAL} {target}, align {op.bytes}")


@amd_lowering(grid_async.AsyncCommitOp)
def _async_commit(e: AmdEmitter, op: grid_async.AsyncCommitOp) -> None:
    """Nothing is under way."""


@amd_lowering(grid_async.AsyncWaitOp)
def _async_wait(e: AmdEmitter, op: grid_async.AsyncWaitOp) -> None:
    """Nothing is under way."""


# -- matrices


@amd_lowering(grid_matrix.MmaOp)
def _mma(e: AmdEmitter, op: grid_matrix.MmaOp) -> None:
    """The sums are added behind the product, so that they need not change lanes on the way in."""
    element = element_of(op.a.type)
    a, b = e.words(op.a), e.words(op.b)
    factors = [
        e.joined([e.gathered(words, f"{label}{number}", places(number)) for number in range(2)])
        for words, label, places in ((a, "a", places_of_a), (b, "b", places_of_b))
    ]
    number = "i32" if element == I8 else "float"
    taken = {BF16: "<4 x i16>", I8: "i64"}.get(element, "<4 x half>")
    name = {BF16: "f32.16x16x16bf16.1k", I8: "i32.16x16x32.i8"}.get(element, "f32.16x16x16f16")
    given = [f"{taken} {e.assign(f'bitcast <2 x i32> {x} to {taken}')}" for x in factors]
    zero = f"<4 x {number}> zeroinitializer"
    made = e.assign(e.intrinsic(f"llvm.amdgcn.mfma.{name}", f"<4 x {number}>", *given, zero, *["i32 0"] * 3))
    bits = e.assign(f"bitcast <4 x {number}> {made} to <4 x i32>")
    words = [e.assign(f"extractelement <4 x i32> {bits}, i64 {i}") for i in range(4)]
    product = e.joined([e.gathered(words, f"sum{i}", places_of_sums(i)) for i in range(4)])
    back = e.assign(f"bitcast <4 x i32> {product} to <4 x {number}>")
    e.define(op.out, f"{'add' if element == I8 else 'fadd'} {e.typed(op.c)}, {back}")


@amd_lowering(grid_matrix.LoadMatrixOp)
def _load_matrix(e: AmdEmitter, op: grid_matrix.LoadMatrixOp) -> None:
    """A lane asks those that say where rows begin, and loads its two numbers of each matrix."""
    local = e.assign(f"addrspacecast ptr {e.address(op.buffer, op.index)} to {_LOCAL}")
    place = e.assign(f"ptrtoint {_LOCAL} {local} to i32")
    lane = e.lane()
    words = []
    for matrix in range(4):
        if not op.transposed:
            row = e.from_lane(place, e.of_lane(f"row{matrix}", places_of_rows(matrix)))
            offset = e.assign(f"shl i32 {e.assign(f'and i32 {lane}, 3')}, 2")
            words.append(_loaded(e, e.assign(f"add i32 {row}, {offset}"), "i32", 4))
            continue
        g = e.assign(f"and i32 {e.assign(f'lshr i32 {lane}, 2')}, 7")
        offset = e.assign(f"shl i32 {g}, 1")
        halves = []
        for odd in range(2):
            row = e.from_lane(place, e.of_lane(f"column{matrix}_{odd}", places_of_columns(matrix, odd)))
            half = _loaded(e, e.assign(f"add i32 {row}, {offset}"), "i16", 2)
            halves.append(e.assign(f"zext i16 {half} to i32"))
        upper = e.assign(f"shl i32 {halves[1]}, 16")
        words.append(e.assign(f"or i32 {upper}, {halves[0]}"))
    e.define(op.out, f"bitcast <4 x i32> {e.joined(words)} to {llvm_type(op.out.type)}")


def _loaded(e: AmdEmitter, place: str, kind: str, align: int) -> str:
    pointer = e.assign(f"inttoptr i32 {place} to {_LOCAL}")
    return e.assign(f"load {kind}, {_LOCAL} {pointer}, align {align}")


def lower_amd_kernel(kernel: GridKernel, declarations: dict[str, str]) -> str:
    """The text of one kernel and of its shared memory. Raises DiagnosticError for what these GPUs cannot do."""
    total, threads = shared_bytes(kernel), launch_threads(kernel)
    if total > MAX_SHARED_BYTES:
        message = f"@{kernel.name} wants {total} bytes of shared memory; a block of an AMD GPU has {MAX_SHARED_BYTES}"
        raise DiagnosticError(message, hint="take smaller tiles or fewer stages")
    if threads > MAX_THREADS:
        raise DiagnosticError(f"@{kernel.name} wants {threads} threads", expected=f"at most {MAX_THREADS}")
    emitter = AmdEmitter(kernel, declarations)
    parameters = lower_body(kernel, emitter)
    lines = []
    if total:
        lines.append(f"{emitter.memory} = internal addrspace(3) global [{total} x i8] poison, align 16")
    bounds = f'"amdgpu-flat-work-group-size"="{threads},{threads}" "uniform-work-group-size"="true"'
    lines += [f"define amdgpu_kernel void @{kernel.name}({', '.join(parameters)}) {bounds} {{", "entry:"]
    assert kernel.threads % WARP == 0
    return "\n".join([*lines, *emitter.lines, "}", ""])
