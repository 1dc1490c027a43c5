"""How bulk copies and products of warpgroups are written for sm_90: as inline PTX. Imported for its registrations.

Registers of sums go in and come out of the waiting instruction too, so that nothing reads them before it.
Source: NVIDIA, "Parallel Thread Execution ISA", 9.7.9 (bulk copies), 9.7.13 (mbarrier), 9.7.15 (wgmma).
"""

from __future__ import annotations

from codegen.nvptx.grid_lowerings import GLOBAL, SHARED, pointer, words_of
from codegen.nvptx.lowering import GridEmitter, grid_lowering
from ir.core import Value
from ir.formats import I32, PlainFormat
from ir.ops import grid_bulk, grid_warpgroup
from ir.ops.tile import ConstantOp
from ir.ops.tile_types import element_of, lanes_of
from ir.types import BufferType

# A descriptor beside the address / 16: 1 (not read with a swizzle), 1024 bytes between 8 rows, the 128-byte swizzle.
_DESCRIPTOR = 1 << 62 | (1024 >> 4) << 32 | 1 << 16
_KINDS = {"f8e4m3": "e4m3", "i8": "s8"}  # names of elements in instructions, where they are others


def _bits(buffer: Value) -> int:
    """Of an element."""
    assert isinstance(buffer.type, BufferType) and isinstance(buffer.type.element, PlainFormat)
    return buffer.type.element.bits


def _address(e: GridEmitter, buffer: Value, index: Value) -> str:
    """Place in shared memory, i32."""
    if buffer not in e.shared:
        return e.assign(f"ptrtoint {SHARED} {pointer(e, buffer, index, SHARED)} to i32")
    at = e.assign(f"mul i32 {e.assign(f'trunc i64 {e.name(index)} to i32')}, {_bits(buffer) // 8}")
    first = e.assign(f"add i32 ptrtoint ({SHARED} {e.memory} to i32), {e.shared[buffer]}")
    return e.assign(f"add i32 {first}, {at}")


def _assembly(lines: list[str], constraints: str, arguments: list[str], result: str = "void") -> str:
    text = "\\0A".join(lines)
    given = ", ".join(arguments)
    return f'call {result} asm sideeffect "{text}", "{constraints}~{{memory}}"({given}) convergent'


@grid_lowering(grid_bulk.InitBarrierOp)
def _init_barrier(e: GridEmitter, op: grid_bulk.InitBarrierOp) -> None:
    lines = [
        "mbarrier.init.shared::cta.b64 [$0], 1;",
        "fence.mbarrier_init.release.cluster;",
        "fence.proxy.async.shared::cta;",
    ]
    e.emit(_assembly(lines, "r,", [f"i32 {_address(e, op.barriers, op.index)}"]))


@grid_lowering(grid_bulk.ExpectBytesOp)
def _expect_bytes(e: GridEmitter, op: grid_bulk.ExpectBytesOp) -> None:
    line = f"mbarrier.arrive.expect_tx.shared::cta.b64 _, [$0], {op.bytes};"
    e.emit(_assembly([line], "r,", [f"i32 {_address(e, op.barriers, op.index)}"]))


@grid_lowering(grid_bulk.BulkCopyOp)
def _bulk_copy(e: GridEmitter, op: grid_bulk.BulkCopyOp) -> None:
    nbytes = op.size * _bits(op.source) // 8
    line = f"cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [$0], [$1], {nbytes}, [$2];"
    source = e.assign(f"ptrtoint {GLOBAL} {pointer(e, op.source, op.source_index, GLOBAL)} to i64")
    target, barrier = _address(e, op.target, op.target_index), _address(e, op.barriers, op.index)
    e.emit(_assembly([line], "r,l,r,", [f"i32 {target}", f"i64 {source}", f"i32 {barrier}"]))


@grid_lowering(grid_bulk.WaitBarrierOp)
def _wait_barrier(e: GridEmitter, op: grid_bulk.WaitBarrierOp) -> None:
    lines = [
        "{ .reg .pred done;",
        "wait_${:uid}:",
        "mbarrier.try_wait.parity.shared::cta.b64 done, [$0], $1;",
        "@!done bra wait_${:uid}; }",
    ]
    parity = e.assign(f"trunc i64 {e.name(op.parity)} to i32")
    e.emit(_assembly(lines, "r,r,", [f"i32 {_address(e, op.barriers, op.index)}", f"i32 {parity}"]))


@grid_lowering(grid_warpgroup.FenceAsyncOp)
def _fence_async(e: GridEmitter, op: grid_warpgroup.FenceAsyncOp) -> None:
    e.emit(_assembly(["fence.proxy.async.shared::cta;"], "", []))


def _through(
    e: GridEmitter,
    op: grid_warpgroup.GroupMmaOp | grid_warpgroup.WaitMmaOp,
    lines: list[str],
    more: list[str],
    anew: bool = False,
) -> None:
    """Emits instructions whose operands 0 .. lanes - 1 are the sums, changed in place or, `anew`, made; `more` come
    behind them, and behind what they were."""
    lanes = lanes_of(op.c.type)
    kind, register = ("i32", "r") if element_of(op.c.type) == I32 else ("float", "f")
    sums = [] if anew else [f"{kind} {e.assign(f'extractelement {e.typed(op.c)}, i64 {i}')}" for i in range(lanes)]
    outputs = [f"={'&' * anew}{register}"] * lanes
    inputs = [str(i) for i in range(len(sums))] + ["r" if x.startswith("i32") else "l" for x in more]
    struct = f"{{{', '.join([kind] * lanes)}}}"
    constraints = "".join(f"{x}," for x in (*outputs, *inputs))
    made = e.assign(_assembly(lines, constraints, [*sums, *more], struct))
    vector = "poison"
    for i in range(lanes):
        x = e.assign(f"extractvalue {struct} {made}, {i}")
        vector = e.assign(f"insertelement <{lanes} x {kind}> {vector}, {kind} {x}, i64 {i}")
    e.names[op.out] = vector


@grid_lowering(grid_warpgroup.GroupMmaOp)
def _group_mma(e: GridEmitter, op: grid_warpgroup.GroupMmaOp) -> None:
    """The left factor is moved to registers of this place, so that nothing is computed into them before it."""
    lanes = lanes_of(op.c.type)
    assert isinstance(op.b.type, BufferType) and isinstance(op.b.type.element, PlainFormat)
    element = op.b.type.element
    kind, of_sums = _KINDS.get(str(element), str(element)), "s32" if element_of(op.c.type) == I32 else "f32"
    columns = 2 * grid_warpgroup.step_lanes(element)
    name = f"wgmma.mma_async.sync.aligned.m64n{2 * lanes}k{columns}.{of_sums}.{kind}.{kind}"
    signs = "" if of_sums == "s32" else ", 1, 1, 0" if element.bits == 16 else ", 1, 1"  # and: not transposed
    start_of_sums = op.c.defining_op()
    anew = isinstance(start_of_sums, ConstantOp) and start_of_sums.value == 0
    sums = ", ".join(f"${i}" for i in range(lanes))
    words = words_of(e, op.a)
    place = e.assign(f"zext i32 {_address(e, op.b, op.b_index)} to i64")
    start = e.assign(f"or disjoint i64 {e.assign(f'lshr i64 {place}, 4')}, {_DESCRIPTOR}")
    first, more = lanes * (1 if anew else 2), [f"i32 {word}" for word in words]  # operands behind the sums
    lines = [f"{{ .reg .b32 %left<{len(words)}>;"]
    lines += [f"mov.b32 %left{i}, ${first + i};" for i in range(len(words))]
    lines.append("wgmma.fence.sync.aligned;")
    for step in range(len(words) // 4):
        left = ", ".join(f"%left{4 * step + i}" for i in range(4))
        adds = 0 if anew and step == 0 else 1
        lines.append(f"{name} {{{sums}}}, {{{left}}}, ${first + len(words) + step}, {adds}{signs};")
        more.append(f"i64 {e.assign(f'add i64 {start}, {(op.step + step) * grid_warpgroup.STEP_BYTES // 16}')}")
    lines.append("wgmma.commit_group.sync.aligned; }")
    _through(e, op, lines, more, anew)


@grid_lowering(grid_warpgroup.WaitMmaOp)
def _wait_mma(e: GridEmitter, op: grid_warpgroup.WaitMmaOp) -> None:
    _through(e, op, [f"wgmma.wait_group.sync.aligned {op.pending};"], [])
