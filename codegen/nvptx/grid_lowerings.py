"""How grid ops, and those tile ops that a GPU does otherwise, are written in LLVM IR. Imported for its registrations.

Sources: NVIDIA, "Parallel Thread Execution ISA"; LLVM, "User Guide for NVPTX Back-end".
"""

from __future__ import annotations

from codegen.llvm.lowering import LOWERINGS, llvm_element, llvm_type
from codegen.nvptx.lowering import GridEmitter, grid_lowering
from ir.core import Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, F8E4M3, F16, F32, I8
from ir.ops import grid, grid_async, grid_matrix, tile_control, tile_convert, tile_memory
from ir.ops.tile_types import element_of, lanes_of
from ir.types import Type, VectorType

WIDEST = 16  # bytes of the widest load of one thread


def _register(e: GridEmitter, name: str) -> str:
    """A special register as i64."""
    number = e.assign(e.intrinsic(f"llvm.nvvm.read.ptx.sreg.{name}", "i32"))
    return f"zext nneg i32 {number} to i64"


@grid_lowering(tile_control.ThreadIdOp)
def _thread_id(e: GridEmitter, op: tile_control.ThreadIdOp) -> None:
    e.define(op.out, _register(e, "tid.x"))


@grid_lowering(tile_control.NumThreadsOp)
def _num_threads(e: GridEmitter, op: tile_control.NumThreadsOp) -> None:
    e.define(op.out, _register(e, "ntid.x"))


@grid_lowering(grid.BlockIdOp)
def _block_id(e: GridEmitter, op: grid.BlockIdOp) -> None:
    e.define(op.out, _register(e, "ctaid.x"))


@grid_lowering(grid.NumBlocksOp)
def _num_blocks(e: GridEmitter, op: grid.NumBlocksOp) -> None:
    e.define(op.out, _register(e, "nctaid.x"))


@grid_lowering(tile_control.BarrierOp)
def _barrier(e: GridEmitter, op: tile_control.BarrierOp) -> None:
    e.emit(e.intrinsic("llvm.nvvm.barrier.cta.sync.aligned.all", "void", "i32 0"))


# -- memory


@grid_lowering(grid.SharedOp)
def _shared(e: GridEmitter, op: grid.SharedOp) -> None:
    place = f"getelementptr (i8, ptr addrspace(3) {e.memory}, i64 {e.shared[op.out]})"
    e.define(op.out, f"addrspacecast ptr addrspace(3) {place} to ptr")


def alignment(type: Type) -> int:
    """What a load or store of this type lies on a multiple of: its size, at most 16 bytes."""
    size = lanes_of(type) * element_of(type).bits // 8
    return min(WIDEST, size & -size)


@grid_lowering(tile_memory.LoadOp)
def _load(e: GridEmitter, op: tile_memory.LoadOp) -> None:
    e.define(
        op.out, f"load {llvm_type(op.out.type)}, ptr {e.address(op.buffer, op.index)}, align {alignment(op.out.type)}"
    )


@grid_lowering(tile_memory.StoreOp)
def _store(e: GridEmitter, op: tile_memory.StoreOp) -> None:
    e.emit(f"store {e.typed(op.value)}, ptr {e.address(op.buffer, op.index)}, align {alignment(op.value.type)}")


@grid_lowering(tile_memory.PrefetchOp)
def _prefetch(e: GridEmitter, op: tile_memory.PrefetchOp) -> None:
    """A hint for caches that hide a stream; here other warps do."""


GLOBAL, SHARED = "ptr addrspace(1)", "ptr addrspace(3)"


def pointer(e: GridEmitter, buffer: Value, index: Value, space: str, inbounds: bool = True) -> str:
    """Place of an element in one memory."""
    return e.assign(f"addrspacecast ptr {e.address(buffer, index, inbounds)} to {space}")


@grid_lowering(grid_async.AsyncCopyOp)
def _async_copy(e: GridEmitter, op: grid_async.AsyncCopyOp) -> None:
    target = pointer(e, op.target, op.target_index, SHARED)
    source = pointer(e, op.source, op.source_index, GLOBAL, inbounds=False)  # anywhere, where nothing is read
    size = e.assign(f"select i1 {e.name(op.condition)}, i32 {op.bytes}, i32 0")
    name = f"llvm.nvvm.cp.async.{'cg' if op.bytes == 16 else 'ca'}.shared.global.{op.bytes}.s"
    e.emit(e.in_space(name, "void", (SHARED, GLOBAL, "i32"), target, source, size))


@grid_lowering(grid_async.AsyncCommitOp)
def _async_commit(e: GridEmitter, op: grid_async.AsyncCommitOp) -> None:
    e.emit(e.intrinsic("llvm.nvvm.cp.async.commit.group", "void"))


@grid_lowering(grid_async.AsyncWaitOp)
def _async_wait(e: GridEmitter, op: grid_async.AsyncWaitOp) -> None:
    e.emit(e.intrinsic("llvm.nvvm.cp.async.wait.group", "void", f"i32 {op.pending}"))


# -- numbers


@grid_lowering(tile_convert.CastOp)
def _cast(e: GridEmitter, op: tile_convert.CastOp) -> None:
    if (element_of(op.x.type), op.to) == (F32, F8E4M3):
        _to_fp8(e, op)
        return
    if (element_of(op.x.type), op.to) != (F32, BF16):
        LOWERINGS[tile_convert.CastOp](e, op)
        return
    shape = f"<{lanes_of(op.x.type)} x bfloat>" if isinstance(op.x.type, VectorType) else "bfloat"
    narrow = e.assign(f"fptrunc {e.typed(op.x)} to {shape}")
    e.define(op.out, f"bitcast {shape} {narrow} to {llvm_type(op.out.type)}")


def _to_fp8(e: GridEmitter, op: tile_convert.CastOp) -> None:
    """Two numbers in one instruction, the second in the upper byte."""
    lanes = lanes_of(op.x.type)
    if lanes % 2:
        raise DiagnosticError.of(Diagnostic("error", f"{op.x.type} is cast to f8e4m3 on GPUs in pairs", op.location))
    made = "poison"
    for i in range(0, lanes, 2):
        pair = [f"float {e.assign(f'extractelement {e.typed(op.x)}, i64 {i + up}')}" for up in (1, 0)]
        both = e.assign(e.intrinsic("llvm.nvvm.ff.to.e4m3x2.rn", "i16", *pair))
        made = e.assign(f"insertelement <{lanes // 2} x i16> {made}, i16 {both}, i64 {i // 2}")
    e.define(op.out, f"bitcast <{lanes // 2} x i16> {made} to {llvm_type(op.out.type)}")


@grid_lowering(grid.Exp2Op)
def _exp2(e: GridEmitter, op: grid.Exp2Op) -> None:
    """ex2.approx.ftz is within 2**-22 of the result over all of its range (PTX ISA, ex2)."""
    kind = llvm_type(op.x.type)
    if not isinstance(op.x.type, VectorType):
        e.define(op.out, e.intrinsic("llvm.nvvm.ex2.approx.ftz.f32", "float", f"float {e.name(op.x)}"))
        return
    made = "poison"
    for lane in range(op.x.type.lanes):
        x = e.assign(f"extractelement {e.typed(op.x)}, i64 {lane}")
        y = e.assign(e.intrinsic("llvm.nvvm.ex2.approx.ftz.f32", "float", f"float {x}"))
        made = e.assign(f"insertelement {kind} {made}, float {y}, i64 {lane}")
    e.names[op.out] = made


@grid_lowering(grid.FmaPairsOp)
def _fma_pairs(e: GridEmitter, op: grid.FmaPairsOp) -> None:
    lanes = lanes_of(op.out.type)
    kind = f"<{lanes} x bfloat>"
    numbers = [f"{kind} {e.assign(f'bitcast {e.typed(x)} to {kind}')}" for x in (op.a, op.b, op.c)]
    made = e.assign(e.intrinsic(f"llvm.fma.v{lanes}bf16", kind, *numbers))
    e.define(op.out, f"bitcast {kind} {made} to {llvm_type(op.out.type)}")


@grid_lowering(grid.ShuffleOp)
def _shuffle(e: GridEmitter, op: grid.ShuffleOp) -> None:
    kind = llvm_type(op.x.type)
    name = "llvm.nvvm.shfl.sync.bfly." + ("f32" if kind == "float" else "i32")
    e.define(op.out, e.intrinsic(name, kind, "i32 -1", e.typed(op.x), f"i32 {op.mask}", "i32 31"))


@grid_lowering(grid.JoinOp)
def _join(e: GridEmitter, op: grid.JoinOp) -> None:
    element, lanes = llvm_element(element_of(op.out.type)), lanes_of(op.out.type)
    made, at = "poison", 0
    for part in op.parts:
        for lane in range(lanes_of(part.type)):
            vector = isinstance(part.type, VectorType)
            x = e.assign(f"extractelement {e.typed(part)}, i64 {lane}") if vector else e.name(part)
            made = e.assign(f"insertelement <{lanes} x {element}> {made}, {element} {x}, i64 {at}")
            at += 1
    e.names[op.out] = made


@grid_lowering(grid.PartOp)
def _part(e: GridEmitter, op: grid.PartOp) -> None:
    picked = ", ".join(f"i32 {op.first + lane}" for lane in range(op.lanes))
    kind = llvm_type(op.v.type)
    e.define(op.out, f"shufflevector {e.typed(op.v)}, {kind} poison, <{op.lanes} x i32> <{picked}>")


# -- matrices: numbers of 16 and 8 bits in registers of 32


def words_of(e: GridEmitter, value: Value) -> list[str]:
    """The registers of a vector of narrow numbers."""
    count = lanes_of(value.type) * element_of(value.type).bits // 32
    kind = f"<{count} x i32>"
    bits = e.assign(f"bitcast {e.typed(value)} to {kind}")
    return [e.assign(f"extractelement {kind} {bits}, i64 {i}") for i in range(count)]


def _gather(e: GridEmitter, struct: str, kind: str, made: str, count: int) -> str:
    """The members of a struct as a vector."""
    vector = "poison"
    for i in range(count):
        x = e.assign(f"extractvalue {struct} {made}, {i}")
        vector = e.assign(f"insertelement <{count} x {kind}> {vector}, {kind} {x}, i64 {i}")
    return vector


_PRODUCTS = {
    BF16: "m16n8k16.row.col.bf16",
    I8: "m16n8k32.row.col.s8",
    F8E4M3: "m16n8k32.row.col.f32.e4m3.e4m3.f32",
}


@grid_lowering(grid_matrix.MmaOp)
def _mma(e: GridEmitter, op: grid_matrix.MmaOp) -> None:
    element = element_of(op.a.type)
    number = "i32" if element == I8 else "float"
    sums = [f"{number} {e.assign(f'extractelement {e.typed(op.c)}, i64 {i}')}" for i in range(4)]
    factors = [*words_of(e, op.a), *words_of(e, op.b)]
    if element == F16:
        name = "llvm.nvvm.mma.m16n8k16.row.col.f32.f32"
        arguments = [f"<2 x half> {e.assign(f'bitcast i32 {w} to <2 x half>')}" for w in factors]
    else:
        name = f"llvm.nvvm.mma.{_PRODUCTS[element]}"
        arguments = [f"i32 {w}" for w in factors]
    struct = f"{{{', '.join([number] * 4)}}}"
    made = e.assign(e.intrinsic(name, struct, *arguments, *sums))
    e.names[op.out] = _gather(e, struct, number, made, 4)


@grid_lowering(grid_matrix.LoadMatrixOp)
def _load_matrix(e: GridEmitter, op: grid_matrix.LoadMatrixOp) -> None:
    place = pointer(e, op.buffer, op.index, SHARED)
    name = f"llvm.nvvm.ldmatrix.sync.aligned.m8n8.x4{'.trans' if op.transposed else ''}.b16.p3"
    struct = "{i32, i32, i32, i32}"
    words = _gather(e, struct, "i32", e.assign(e.in_space(name, struct, (SHARED,), place)), 4)
    e.define(op.out, f"bitcast <4 x i32> {words} to {llvm_type(op.out.type)}")
