"""How the ops of `ir.ops.tile_packed` are written in LLVM IR. Imported once, for its registrations."""

from __future__ import annotations

from codegen.llvm.lowering import FunctionEmitter, llvm_element, llvm_type, lowering
from ir.ops import tile_memory, tile_packed
from ir.ops.tile_types import element_of, lanes_of


@lowering(tile_packed.Dot4Op)
def _dot4(e: FunctionEmitter, op: tile_packed.Dot4Op) -> None:
    lanes = lanes_of(op.acc.type)
    instruction = e.instructions.find("tile.dot4", "i32", lanes)
    if instruction:
        e.define(op.out, e.intrinsic(instruction.intrinsic, f"<{lanes} x i32>", *map(e.typed, (op.acc, op.a, op.b))))
    elif e.instructions.has("avx2") and lanes % 8 == 0:
        e.define(op.out, _dot4_by_words(e, op, lanes))
    else:
        e.define(op.out, _dot4_by_lanes(e, op, lanes))


def _dot4_by_words(e: FunctionEmitter, op: tile_packed.Dot4Op, lanes: int) -> str:
    """Even and odd bytes widened to words, whose products `vpmaddwd` adds in pairs; eight sums at a time."""
    words = f"<{2 * lanes} x i16>"
    a, b = (e.assign(f"bitcast {e.typed(value)} to {words}") for value in (op.a, op.b))
    up = e.assign(f"shl {words} {b}, splat (i16 8)")
    halves = (
        (e.assign(f"and {words} {a}, splat (i16 255)"), e.assign(f"ashr {words} {up}, splat (i16 8)")),
        (e.assign(f"lshr {words} {a}, splat (i16 8)"), e.assign(f"ashr {words} {b}, splat (i16 8)")),
    )
    parts = []
    for first in range(0, lanes, 8):
        sums = []
        for pair in halves:
            chosen = [_part(e, value, "i16", 2 * lanes, 2 * first, 16) for value in pair]
            typed = [f"<16 x i16> {value}" for value in chosen]
            sums.append(e.assign(e.intrinsic("llvm.x86.avx2.pmadd.wd", "<8 x i32>", *typed)))
        parts.append(e.assign(f"add <8 x i32> {sums[0]}, {sums[1]}"))
    total = _join(e, parts, "i32", 8)
    return f"add {llvm_type(op.acc.type)} {e.name(op.acc)}, {total}"


def _dot4_by_lanes(e: FunctionEmitter, op: tile_packed.Dot4Op, lanes: int) -> str:
    """Each byte of the four as an i32 lane of its own."""
    kind = llvm_type(op.acc.type)
    vector = kind.startswith("<")
    a, b = (e.assign(f"bitcast {e.typed(value)} to {kind}") for value in (op.a, op.b))

    def many(number: int) -> str:
        return f"splat (i32 {number})" if vector else str(number)

    total = e.name(op.acc)
    for byte in range(4):
        shifted = e.assign(f"lshr {kind} {a}, {many(8 * byte)}")
        left = e.assign(f"and {kind} {shifted}, {many(255)}")
        raised = e.assign(f"shl {kind} {b}, {many(24 - 8 * byte)}")
        right = e.assign(f"ashr {kind} {raised}, {many(24)}")
        product = e.assign(f"mul {kind} {left}, {right}")
        if byte == 3:
            return f"add {kind} {total}, {product}"
        total = e.assign(f"add {kind} {total}, {product}")
    raise AssertionError


# Bits of an entry -> (feature, register bytes, most entries, intrinsic). The first that fits is taken.
_PERMUTATIONS: dict[int, tuple[tuple[str, int, int, str], ...]] = {
    8: (
        ("avx512bw", 64, 16, "llvm.x86.avx512.pshuf.b.512"),
        ("avx512vbmi", 64, 64, "llvm.x86.avx512.permvar.qi.512"),
        ("avx2", 32, 16, "llvm.x86.avx2.pshuf.b"),
        ("ssse3", 16, 16, "llvm.x86.ssse3.pshuf.b.128"),
    ),
    16: (("avx512bw", 64, 32, "llvm.x86.avx512.permvar.hi.512"),),
    32: (
        ("avx512f", 64, 16, "llvm.x86.avx512.permvar.si.512"),
        ("avx2", 32, 8, "llvm.x86.avx2.permd"),
    ),
}


@lowering(tile_memory.GatherOp)
def _gather(e: FunctionEmitter, op: tile_memory.GatherOp) -> None:
    lanes, kind = lanes_of(op.out.type), llvm_type(op.out.type)
    element = llvm_element(element_of(op.out.type))
    pointers, mask = f"<{lanes} x ptr>", f"<{lanes} x i1>"
    places = e.assign(f"getelementptr inbounds {element}, ptr {e.name(op.buffer)}, {e.typed(op.index)}")
    suffix = "f32" if element == "float" else element
    name = f"llvm.masked.gather.v{lanes}{suffix}.v{lanes}p0"
    e.define(
        op.out, e.intrinsic(name, kind, f"{pointers} align 4 {places}", f"{mask} splat (i1 true)", f"{kind} poison")
    )


@lowering(tile_packed.LookupOp)
def _lookup(e: FunctionEmitter, op: tile_packed.LookupOp) -> None:
    bits = element_of(op.table.type).bits
    entries, lanes = lanes_of(op.table.type), lanes_of(op.out.type)
    word = f"i{bits}"
    index = e.assign(f"bitcast {e.typed(op.index)} to <{lanes} x {word}>")
    table = e.assign(f"bitcast {e.typed(op.table)} to <{entries} x {word}>")
    for feature, register, most, intrinsic in _PERMUTATIONS[bits]:
        width = register * 8 // bits
        if e.instructions.has(feature) and entries <= most and lanes % width == 0:
            made = _permute(e, table, index, word, (entries, lanes, width), intrinsic)
            break
    else:
        made = _one_by_one(e, table, index, word, entries, lanes)
    e.define(op.out, f"bitcast <{lanes} x {word}> {made} to {llvm_type(op.out.type)}")
    assert llvm_element(element_of(op.out.type))


def _permute(e: FunctionEmitter, table: str, index: str, word: str, sizes: tuple[int, int, int], intrinsic: str) -> str:
    """By an instruction that permutes registers of `width` entries. The table is repeated to fill one: bits of an
    index above the table's do not matter then. `pshufb` looks into its own 16 bytes only, and gives zero where bit 7
    of an index is set: its indices are cut."""
    entries, lanes, width = sizes
    kind = f"<{width} x {word}>"
    places = ", ".join(f"i32 {i % entries}" for i in range(width))
    repeated = e.assign(
        f"shufflevector <{entries} x {word}> {table}, <{entries} x {word}> poison, <{width} x i32> <{places}>"
    )
    if "pshuf" in intrinsic:
        index = e.assign(f"and <{lanes} x {word}> {index}, splat ({word} {entries - 1})")
    parts = []
    for first in range(0, lanes, width):
        chosen = _part(e, index, word, lanes, first, width)
        parts.append(e.assign(e.intrinsic(intrinsic, kind, f"{kind} {repeated}", f"{kind} {chosen}")))
    return _join(e, parts, word, width)


def _one_by_one(e: FunctionEmitter, table: str, index: str, word: str, entries: int, lanes: int) -> str:
    kind = f"<{lanes} x {word}>"
    index = e.assign(f"and {kind} {index}, splat ({word} {entries - 1})")
    made = "poison"
    for lane in range(lanes):
        at = e.assign(f"extractelement {kind} {index}, i64 {lane}")
        found = e.assign(f"extractelement <{entries} x {word}> {table}, {word} {at}")
        made = e.assign(f"insertelement {kind} {made}, {word} {found}, i64 {lane}")
    return made


def _part(e: FunctionEmitter, value: str, word: str, lanes: int, first: int, width: int) -> str:
    """Lanes first .. first + width of a vector."""
    if width == lanes:
        return value
    kind = f"<{lanes} x {word}>"
    places = ", ".join(f"i32 {first + i}" for i in range(width))
    return e.assign(f"shufflevector {kind} {value}, {kind} poison, <{width} x i32> <{places}>")


def _join(e: FunctionEmitter, parts: list[str], word: str, width: int) -> str:
    """The vectors one after another; their number is a power of two."""
    while len(parts) > 1:
        places = ", ".join(f"i32 {i}" for i in range(2 * width))
        kind = f"<{width} x {word}>"
        parts = [
            e.assign(f"shufflevector {kind} {a}, {kind} {b}, <{2 * width} x i32> <{places}>")
            for a, b in zip(parts[::2], parts[1::2], strict=True)
        ]
        width *= 2
    return parts[0]
