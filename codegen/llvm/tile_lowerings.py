"""How each tile op is written in LLVM IR. Imported once, for its registrations.

Floats follow IEEE order exactly as written: no fast-math flag is set anywhere, so a sum has the same bits in every
kernel that adds in the same order.
"""

from __future__ import annotations

from typing import Any

from codegen.llvm.lowering import FunctionEmitter, literal, llvm_element, llvm_type, lowering
from codegen.llvm.team import TICKETS_AT
from ir.core import Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, F8E4M3, F16, F32, I1, I32, I64, U8
from ir.ops import tile, tile_control, tile_convert, tile_lanes, tile_memory, tile_products
from ir.ops.tile_types import element_of, is_float, lanes_of, with_element
from ir.types import VectorType


@lowering(tile.ConstantOp)
def _constant(e: FunctionEmitter, op: tile.ConstantOp) -> None:
    e.names[op.out] = literal(op.out.type, op.value)


def _lower_binary(op_class: Any, float_name: str, int_name: str) -> None:
    @lowering(op_class)
    def emit(e: FunctionEmitter, op: Any) -> None:
        name = float_name if is_float(op.a.type) else int_name
        e.define(op.out, f"{name} {e.typed(op.a)}, {e.name(op.b)}")


for _class, _float, _int in (
    (tile.AddOp, "fadd", "add"),
    (tile.SubOp, "fsub", "sub"),
    (tile.MulOp, "fmul", "mul"),
    (tile.DivOp, "fdiv", "sdiv"),
    (tile.RemOp, "", "srem"),
    (tile.AndOp, "", "and"),
    (tile.OrOp, "", "or"),
    (tile.ShlOp, "", "shl"),
    (tile.ShrOp, "", "ashr"),
):
    _lower_binary(_class, _float, _int)


def _lower_choice(op_class: Any, float_predicate: str, int_predicate: str) -> None:
    @lowering(op_class)
    def emit(e: FunctionEmitter, op: Any) -> None:
        compare = f"fcmp {float_predicate}" if is_float(op.a.type) else f"icmp {int_predicate}"
        mask = e.assign(f"{compare} {e.typed(op.a)}, {e.name(op.b)}")
        mask_type = llvm_type(with_element(op.a.type, I1))
        e.define(op.out, f"select {mask_type} {mask}, {e.typed(op.a)}, {e.typed(op.b)}")


_lower_choice(tile.MinOp, "olt", "slt")  # becomes minps / pminsd, whose NaN and zero rules are those of tile.min
_lower_choice(tile.MaxOp, "ogt", "sgt")


def _overloaded(value: Value) -> str:
    """The suffix of an overloaded intrinsic: v16f32, f32, v8i16 (of bf16)."""
    lanes, element = lanes_of(value.type), llvm_element(element_of(value.type))
    suffix = {"float": "f32", "double": "f64"}.get(element, element)
    return (f"v{lanes}" if isinstance(value.type, VectorType) else "") + suffix


@lowering(tile.SqrtOp)
def _sqrt(e: FunctionEmitter, op: tile.SqrtOp) -> None:
    e.define(op.out, e.intrinsic(f"llvm.sqrt.{_overloaded(op.x)}", llvm_type(op.x.type), e.typed(op.x)))


@lowering(tile.RoundOp)
def _round(e: FunctionEmitter, op: tile.RoundOp) -> None:
    e.define(op.out, e.intrinsic(f"llvm.roundeven.{_overloaded(op.x)}", llvm_type(op.x.type), e.typed(op.x)))


def fused_multiply_add(e: FunctionEmitter, kind: str, a: str, b: str, c: str, suffix: str) -> str:
    """An FMA where the CPU has one; a product and a sum where it has not (a call to libm would be far slower)."""
    if e.instructions.has("fma") or e.instructions.has("neon"):
        return e.intrinsic(f"llvm.fma.{suffix}", kind, f"{kind} {a}", f"{kind} {b}", f"{kind} {c}")
    product = e.assign(f"fmul {kind} {a}, {b}")
    return f"fadd {kind} {product}, {c}"


@lowering(tile_products.FmaOp)
def _fma(e: FunctionEmitter, op: tile_products.FmaOp) -> None:
    kind = llvm_type(op.a.type)
    e.define(op.out, fused_multiply_add(e, kind, e.name(op.a), e.name(op.b), e.name(op.c), _overloaded(op.a)))


@lowering(tile_products.Dot2Op)
def _dot2(e: FunctionEmitter, op: tile_products.Dot2Op) -> None:
    lanes = lanes_of(op.acc.type)
    kind = llvm_type(op.acc.type)
    instruction = e.instructions.find("tile.dot2", "f32", lanes)
    if instruction:
        pairs = f"<{2 * lanes} x bfloat>"
        a, b = (e.assign(f"bitcast {e.typed(value)} to {pairs}") for value in (op.a, op.b))
        e.define(op.out, e.intrinsic(instruction.intrinsic, kind, e.typed(op.acc), f"{pairs} {a}", f"{pairs} {b}"))
        return
    # bf16 is the upper half of an f32: the even element sits in the low half of each 32-bit pair.
    bits = f"<{lanes} x i32>"
    halves = []
    for value in (op.a, op.b):
        pair = e.assign(f"bitcast {e.typed(value)} to {bits}")
        even = e.assign(f"shl {bits} {pair}, splat (i32 16)")
        odd = e.assign(f"and {bits} {pair}, splat (i32 -65536)")
        halves.append([e.assign(f"bitcast {bits} {half} to {kind}") for half in (even, odd)])
    (a_even, a_odd), (b_even, b_odd) = halves
    suffix = _overloaded(op.acc)
    partial = e.assign(fused_multiply_add(e, kind, a_odd, b_odd, e.name(op.acc), suffix))
    e.define(op.out, fused_multiply_add(e, kind, a_even, b_even, partial, suffix))


_PREDICATES = {
    "lt": ("olt", "slt"),
    "le": ("ole", "sle"),
    "eq": ("oeq", "eq"),
    "ne": ("une", "ne"),
    "gt": ("ogt", "sgt"),
    "ge": ("oge", "sge"),
}


@lowering(tile_lanes.CompareOp)
def _compare(e: FunctionEmitter, op: tile_lanes.CompareOp) -> None:
    for_floats, for_integers = _PREDICATES[op.predicate]
    compare = f"fcmp {for_floats}" if is_float(op.a.type) else f"icmp {for_integers}"
    e.define(op.out, f"{compare} {e.typed(op.a)}, {e.name(op.b)}")


@lowering(tile_lanes.SelectOp)
def _select(e: FunctionEmitter, op: tile_lanes.SelectOp) -> None:
    e.define(op.out, f"select {e.typed(op.condition)}, {e.typed(op.a)}, {e.typed(op.b)}")


def _shape(value: Value, element: str) -> str:
    """The LLVM type with the lanes of `value` and another element."""
    return f"<{lanes_of(value.type)} x {element}>" if isinstance(value.type, VectorType) else element


def _to_bf16(e: FunctionEmitter, x: Value) -> str:
    """f32 -> bf16 to nearest even; NaN stays NaN."""
    instruction = e.instructions.find("tile.cast", "bf16", lanes_of(x.type))
    if instruction and isinstance(x.type, VectorType):
        made = e.assign(e.intrinsic(instruction.intrinsic, _shape(x, "bfloat"), e.typed(x)))
        return f"bitcast {_shape(x, 'bfloat')} {made} to {_shape(x, 'i16')}"

    def many(number: int) -> str:
        return f"splat (i32 {number})" if isinstance(x.type, VectorType) else str(number)

    words = _shape(x, "i32")
    bits = e.assign(f"bitcast {e.typed(x)} to {words}")
    shifted = e.assign(f"lshr {words} {bits}, {many(16)}")
    odd = e.assign(f"and {words} {shifted}, {many(1)}")
    bias = e.assign(f"add {words} {odd}, {many(0x7FFF)}")
    rounded = e.assign(f"add {words} {bits}, {bias}")
    quiet = e.assign(f"or {words} {bits}, {many(0x400000)}")
    is_nan = e.assign(f"fcmp uno {e.typed(x)}, {e.name(x)}")
    chosen = e.assign(f"select {_shape(x, 'i1')} {is_nan}, {words} {quiet}, {words} {rounded}")
    upper = e.assign(f"lshr {words} {chosen}, {many(16)}")
    return f"trunc {words} {upper} to {_shape(x, 'i16')}"


def _from_bf16(e: FunctionEmitter, x: Value) -> str:
    words = e.assign(f"zext {e.typed(x)} to {_shape(x, 'i32')}")
    sixteen = "splat (i32 16)" if isinstance(x.type, VectorType) else "16"
    bits = e.assign(f"shl {_shape(x, 'i32')} {words}, {sixteen}")
    return f"bitcast {_shape(x, 'i32')} {bits} to {_shape(x, 'float')}"


def _cast_f16(e: FunctionEmitter, op: tile_convert.CastOp) -> None:
    """Between f32 and f16."""
    if e.instructions.has("sse2") and not e.instructions.has("f16c"):
        message = "'tile.cast' between f32 and f16 needs the CPU feature f16c (LLVM would call a function instead)"
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    half, bits = _shape(op.x, "half"), _shape(op.x, "i16")
    if element_of(op.x.type) == F16:
        number = e.assign(f"bitcast {e.typed(op.x)} to {half}")
        e.define(op.out, f"fpext {half} {number} to {llvm_type(op.out.type)}")
    else:
        number = e.assign(f"fptrunc {e.typed(op.x)} to {half}")
        e.define(op.out, f"bitcast {half} {number} to {bits}")


@lowering(tile_convert.CastOp)
def _cast(e: FunctionEmitter, op: tile_convert.CastOp) -> None:
    have, want = element_of(op.x.type), element_of(op.out.type)
    target = llvm_type(op.out.type)
    if have == want:
        e.names[op.out] = e.name(op.x)
    elif (have, want) == (F32, BF16):
        e.define(op.out, _to_bf16(e, op.x))
    elif (have, want) == (BF16, F32):
        e.define(op.out, _from_bf16(e, op.x))
    elif F16 in (have, want):
        _cast_f16(e, op)
    elif F8E4M3 in (have, want):
        message = f"no instructions cast {op.x.type} to {want}"
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    elif have.is_float and want.is_float:
        e.define(op.out, f"{'fpext' if want.bits > have.bits else 'fptrunc'} {e.typed(op.x)} to {target}")
    elif have.is_float:
        # A number out of range is poison to LLVM; frozen, it is only some number.
        integer = e.assign(f"{'fptoui' if want in _UNSIGNED else 'fptosi'} {e.typed(op.x)} to {target}")
        e.define(op.out, f"freeze {target} {integer}")
    elif want.is_float:
        e.define(op.out, f"{'uitofp' if have in _UNSIGNED else 'sitofp'} {e.typed(op.x)} to {target}")
    elif want.bits == have.bits:  # i8 and u8 are one type to LLVM
        e.names[op.out] = e.name(op.x)
    else:
        wider = "zext" if have in _UNSIGNED else "sext"
        e.define(op.out, f"{wider if want.bits > have.bits else 'trunc'} {e.typed(op.x)} to {target}")


_UNSIGNED = (I1, U8)


@lowering(tile_convert.ToIndexOp)
def _to_index(e: FunctionEmitter, op: tile_convert.ToIndexOp) -> None:
    e.define(op.out, f"sext {e.typed(op.x)} to {llvm_element(I64)}")


@lowering(tile_convert.FromIndexOp)
def _from_index(e: FunctionEmitter, op: tile_convert.FromIndexOp) -> None:
    e.define(op.out, f"trunc {e.typed(op.x)} to {llvm_element(I32)}")


@lowering(tile_convert.BitcastOp)
def _bitcast(e: FunctionEmitter, op: tile_convert.BitcastOp) -> None:
    e.define(op.out, f"bitcast {e.typed(op.x)} to {llvm_type(op.out.type)}")


@lowering(tile_lanes.SplatOp)
def _splat(e: FunctionEmitter, op: tile_lanes.SplatOp) -> None:
    kind = llvm_type(op.out.type)
    first = e.assign(f"insertelement {kind} poison, {e.typed(op.x)}, i64 0")
    e.define(op.out, f"shufflevector {kind} {first}, {kind} poison, <{op.lanes} x i32> zeroinitializer")


@lowering(tile_lanes.IotaOp)
def _iota(e: FunctionEmitter, op: tile_lanes.IotaOp) -> None:
    e.names[op.out] = "<" + ", ".join(f"i32 {i}" for i in range(op.lanes)) + ">"


@lowering(tile_lanes.ExtractOp)
def _extract(e: FunctionEmitter, op: tile_lanes.ExtractOp) -> None:
    e.define(op.out, f"extractelement {e.typed(op.v)}, i64 {op.lane}")


@lowering(tile_lanes.ReduceOp)
def _reduce(e: FunctionEmitter, op: tile_lanes.ReduceOp) -> None:
    name, lanes = e.name(op.v), lanes_of(op.v.type)
    while lanes > 1:
        kind, half = f"<{lanes} x float>", f"<{lanes // 2} x float>"
        parts = []
        for start in (0, lanes // 2):
            mask = ", ".join(f"i32 {start + i}" for i in range(lanes // 2))
            parts.append(e.assign(f"shufflevector {kind} {name}, {kind} poison, <{lanes // 2} x i32> <{mask}>"))
        if op.kind == "add":
            name = e.assign(f"fadd {half} {parts[0]}, {parts[1]}")
        else:
            mask = e.assign(f"fcmp ogt {half} {parts[0]}, {parts[1]}")
            name = e.assign(f"select <{lanes // 2} x i1> {mask}, {half} {parts[0]}, {half} {parts[1]}")
        lanes //= 2
    e.define(op.out, f"extractelement <1 x float> {name}, i64 0")


@lowering(tile_memory.LoadOp)
def _load(e: FunctionEmitter, op: tile_memory.LoadOp) -> None:
    align = max(1, element_of(op.out.type).bits // 8)
    e.define(op.out, f"load {llvm_type(op.out.type)}, ptr {e.address(op.buffer, op.index)}, align {align}")


@lowering(tile_memory.StoreOp)
def _store(e: FunctionEmitter, op: tile_memory.StoreOp) -> None:
    align = max(1, element_of(op.value.type).bits // 8)
    e.emit(f"store {e.typed(op.value)}, ptr {e.address(op.buffer, op.index)}, align {align}")


@lowering(tile_memory.LoadMaskedOp)
def _load_masked(e: FunctionEmitter, op: tile_memory.LoadMaskedOp) -> None:
    kind, align = llvm_type(op.out.type), max(1, element_of(op.out.type).bits // 8)
    pointer = e.address(op.buffer, op.index, inbounds=False)
    call = e.intrinsic(
        f"llvm.masked.load.{_overloaded(op.out)}.p0",
        kind,
        f"ptr align {align} {pointer}",
        e.typed(op.mask),
        f"{kind} zeroinitializer",
    )
    e.define(op.out, call)


@lowering(tile_memory.StoreMaskedOp)
def _store_masked(e: FunctionEmitter, op: tile_memory.StoreMaskedOp) -> None:
    align = max(1, element_of(op.value.type).bits // 8)
    pointer = e.address(op.buffer, op.index, inbounds=False)
    name = f"llvm.masked.store.{_overloaded(op.value)}.p0"
    e.emit(e.intrinsic(name, "void", e.typed(op.value), f"ptr align {align} {pointer}", e.typed(op.mask)))


@lowering(tile_memory.PrefetchOp)
def _prefetch(e: FunctionEmitter, op: tile_memory.PrefetchOp) -> None:
    pointer = e.address(op.buffer, op.index, inbounds=False)
    e.emit(e.intrinsic("llvm.prefetch.p0", "void", f"ptr {pointer}", "i32 0", f"i32 {4 - op.level}", "i32 1"))


@lowering(tile_memory.OffsetOp)
def _offset(e: FunctionEmitter, op: tile_memory.OffsetOp) -> None:
    e.names[op.out] = e.address(op.buffer, op.index)


@lowering(tile_memory.ViewOp)
def _view(e: FunctionEmitter, op: tile_memory.ViewOp) -> None:
    e.names[op.out] = e.name(op.buffer)


@lowering(tile_memory.ScratchOp)
def _scratch(e: FunctionEmitter, op: tile_memory.ScratchOp) -> None:
    # Not in a loop (the op verifies that): every iteration would take more of the stack.
    e.define(op.out, f"alloca [{op.size} x {llvm_element(op.element)}], align 64")


@lowering(tile_control.ForOp)
def _for(e: FunctionEmitter, op: tile_control.ForOp) -> None:
    number = e.fresh("L")[2:]
    body, done = f"%body{number}", f"%done{number}"
    before = e.current_label
    counter, *carried = op.body.block.arguments
    entry_guard = e.assign(f"icmp slt i64 {e.name(op.lower)}, {e.name(op.upper)}")
    e.emit(f"br i1 {entry_guard}, label {body}, label {done}")
    # Rotated loop: the test sits at the bottom, so that a body runs as one straight piece of code.
    e.label(body)
    phi_line = len(e.lines)
    e.names[counter] = e.fresh("i")
    for argument in carried:
        e.names[argument] = e.fresh("c")
    e.lines += [""] * (1 + len(carried))
    end = e.block(op.body.block)
    following = e.assign(f"add nsw i64 {e.name(counter)}, {e.name(op.step)}")
    again = e.assign(f"icmp slt i64 {following}, {e.name(op.upper)}")
    latch = e.current_label
    e.emit(f"br i1 {again}, label {body}, label {done}")
    e.lines[phi_line] = f"  {e.names[counter]} = phi i64 [ {e.name(op.lower)}, {before} ], [ {following}, {latch} ]"
    for k, (argument, initial, last) in enumerate(zip(carried, op.initial, end.operands, strict=True)):
        kind = llvm_type(argument.type)
        e.lines[phi_line + 1 + k] = (
            f"  {e.names[argument]} = phi {kind} [ {e.name(initial)}, {before} ], [ {e.name(last)}, {latch} ]"
        )
    e.label(done)
    for value, initial, last in zip(op.results, op.initial, end.operands, strict=True):
        e.define(value, f"phi {llvm_type(value.type)} [ {e.name(initial)}, {before} ], [ {e.name(last)}, {latch} ]")


@lowering(tile_control.IfOp)
def _if(e: FunctionEmitter, op: tile_control.IfOp) -> None:
    number = e.fresh("L")[2:]
    then, otherwise, done = f"%then{number}", f"%else{number}", f"%end{number}"
    e.emit(f"br i1 {e.name(op.condition)}, label {then}, label {otherwise}")
    ends = []
    for label, body in ((then, op.then), (otherwise, op.otherwise)):
        e.label(label)
        end = e.block(body.block)
        ends.append((end, e.current_label))
        e.emit(f"br label {done}")
    e.label(done)
    (first, from_first), (second, from_second) = ends
    for value, a, b in zip(op.results, first.operands, second.operands, strict=True):
        e.define(value, f"phi {llvm_type(value.type)} [ {e.name(a)}, {from_first} ], [ {e.name(b)}, {from_second} ]")


@lowering(tile_control.ThreadIdOp)
def _thread_id(e: FunctionEmitter, op: tile_control.ThreadIdOp) -> None:
    e.names[op.out] = "%tid"


@lowering(tile_control.NumThreadsOp)
def _num_threads(e: FunctionEmitter, op: tile_control.NumThreadsOp) -> None:
    e.names[op.out] = "%threads"


@lowering(tile_control.TicketOp)
def _ticket(e: FunctionEmitter, op: tile_control.TicketOp) -> None:
    at = e.assign(f"getelementptr i8, ptr %team, i64 {TICKETS_AT}")
    e.names[op.out] = e.assign(f"atomicrmw add ptr {at}, i64 1 monotonic")


@lowering(tile_control.BarrierOp)
def _barrier(e: FunctionEmitter, op: tile_control.BarrierOp) -> None:
    e.emit("call void @stratum_barrier(ptr %team, i64 %threads)")
