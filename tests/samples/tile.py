"""tile.*: scalars and vectors of every element an op takes, one lane and many, memory at its edges, control flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ir.builder import Builder
from ir.core import Block, Region
from ir.formats import BF16, F16, F32, F64, I1, I8, I32, I64, U8, PlainFormat
from ir.ops import tile
from ir.ops.builtin import ReturnOp
from ir.ops.tile_control import YieldOp
from ir.types import INDEX, BufferType, ScalarType, TensorType, Type, VectorType
from tests.samples.base import Fault, Sample, Stored, fault, low_sample


def v(*numbers: float, element: PlainFormat = F32) -> np.ndarray:
    """A vector."""
    return np.array(numbers, np.float64).astype(element.dtype)


def s(number: float, element: PlainFormat = F32) -> np.generic:
    """A scalar."""
    return element.dtype.type(number)


def m(*lanes: int) -> np.ndarray:
    """A mask."""
    return np.array(lanes, bool)


def vt(lanes: int, element: PlainFormat = F32) -> VectorType:
    return VectorType(lanes, element)


F, D, INT, LONG, MASK = (ScalarType(e) for e in (F32, F64, I32, I64, I1))
PAIR, BUFFER, HALVES = VectorType(2, I32), BufferType(F32), BufferType(BF16)
A, B = v(1.5, -2.0, 0.0, 3e38), v(-0.5, -2.0, -0.0, 7.0)
LEFT, RIGHT = np.array([7, -7, 7, -7], np.int32), np.array([2, 2, -2, -2], np.int32)
BITS, COUNTS = np.array([-1, 5, 1 << 30, -(2**31)], np.int32), np.array([0, 1, 2, 31], np.int32)

ARITHMETIC = tuple(
    low_sample(f"tile.{name}", label, a, b)
    for name in ("add", "sub", "mul", "div", "min", "max")
    for label, a, b in (
        ("f32_vector", v(1.5, -2.0, 0.25, 9.0), v(-0.5, -2.0, 3.0, 7.0)),
        ("f64", s(0.1, F64), s(-3, F64)),
        ("i32_vector", LEFT, RIGHT),
        ("i64", s(-(2**40), I64), s(3, I64)),
        ("index", 17, 5),
    )
)
INTEGER = (
    low_sample("tile.rem", "signs", LEFT, RIGHT),
    low_sample("tile.rem", "index", 17, 5),
    low_sample("tile.and", "i32", BITS, COUNTS),
    low_sample("tile.and", "masks", m(1, 1, 0, 0), m(1, 0, 1, 0)),
    low_sample("tile.or", "i64", s(12, I64), s(3, I64)),
    low_sample("tile.or", "masks", m(1, 1, 0, 0), m(1, 0, 1, 0)),
    low_sample("tile.shl", "i32", BITS, COUNTS),
    low_sample("tile.shl", "index", 3, 20),
    low_sample("tile.shr", "keeps_the_sign", BITS, COUNTS),
)
FLOAT = (
    low_sample("tile.sqrt", "f32", v(0.0, 4.0, 2.0, 1e-40)),
    low_sample("tile.sqrt", "f64", s(2, F64)),
    low_sample("tile.round", "ties_to_even", v(0.5, 1.5, -2.5, 2.4999)),
    low_sample("tile.round", "f64", s(-3.7, F64)),
    low_sample("tile.fma", "f32", A, v(1.0, 2.0, 3.0, 0.5), B),
    low_sample("tile.fma", "one_rounding", s(1 + 2**-12), s(1 - 2**-12), s(-1.0)),
    low_sample("tile.fma", "f64_one_rounding", s(1 + 2**-30, F64), s(1 - 2**-30, F64), s(-1.0, F64)),
    low_sample("tile.dot2", "one_pair", v(1.0), v(2, 3, element=BF16), v(5, 7, element=BF16)),
    low_sample("tile.dot2", "four", v(1, 2, 3, 4), *(v(*range(8), element=BF16),) * 2),
    low_sample("tile.dot4", "two", v(1, -2, element=I32), v(*range(8), element=U8), v(*range(-4, 4), element=I8)),
    low_sample(
        "tile.dot4", "wraps", v(2**31 - 1, element=I32), v(255, 255, 0, 0, element=U8), v(127, -128, 1, 1, element=I8)
    ),
    low_sample("tile.lookup", "bytes", v(10, 20, 30, 250, element=U8), np.array([0x03020100, -1], np.int32)),
    low_sample("tile.lookup", "pairs", v(1, -2, element=BF16), np.array([0x00010000], np.int32)),
    low_sample("tile.lookup", "permutes", v(1, 2, 3, 4), np.array([2, 3, 0, 1], np.int32)),
    low_sample("tile.reduce", "add", v(1, 2, 3, 4), kind="add"),
    low_sample("tile.reduce", "max", v(-1, -2, -3, -4), kind="max"),
    low_sample("tile.reduce", "one_lane", v(5), kind="add"),
)
CHOICE = (
    *(low_sample("tile.compare", p, A, B, predicate=p) for p in ("lt", "le", "eq", "ne", "gt", "ge")),
    low_sample("tile.compare", "index", 3, 4, predicate="lt"),
    low_sample("tile.compare", "signed", s(-1, I32), s(1, I32), predicate="gt"),
    low_sample("tile.select", "lanes", m(1, 0, 1, 0), A, B),
    low_sample("tile.select", "whole", s(0, I1), A, B),
    low_sample("tile.select", "index", s(1, I1), 3, 4),
    low_sample("tile.select", "masks", m(1, 0), m(1, 1), m(0, 0)),
)
CONVERSION = (
    low_sample("tile.constant", "splat", value=1.5, result_types=(vt(4),)),
    low_sample("tile.constant", "lanes", value=(1.5, -2.0), result_types=(vt(2, F64),)),
    low_sample("tile.constant", "byte", value=255, result_types=(ScalarType(U8),)),
    low_sample("tile.constant", "index", value=-(2**40), result_types=(INDEX,)),
    low_sample("tile.constant", "mask", value=1, result_types=(vt(4, I1),)),
    *(low_sample("tile.cast", f"{to}_to_f32", v(1, 2, element=to), to=F32) for to in (BF16, F16, F64, I32, I8, U8, I1)),
    *(low_sample("tile.cast", f"f32_to_{to}", v(1.0039, -2.75), to=to) for to in (BF16, F16, F64, I32, I8, I64)),
    low_sample("tile.cast", "same", v(1, 2), to=F32),
    low_sample("tile.cast", "u8_is_not_negative", v(200, 255, element=U8), to=I32),
    low_sample("tile.cast", "cut_off", np.array([511, -129], np.int32), to=U8),
    low_sample("tile.cast", "index", 5, to=F64),
    low_sample("tile.to_index", "negative", s(-3, I32)),
    low_sample("tile.from_index", "negative", -3),
    low_sample("tile.bitcast", "scalar", s(-0.0), to=ScalarType(I32)),
    low_sample("tile.bitcast", "pairs", np.array([0x3F804000, 1], np.int32), to=vt(4, BF16)),
    low_sample("tile.bitcast", "one_word", v(1, 2, element=BF16), to=ScalarType(I32)),
    low_sample("tile.bitcast", "index", -1, to=vt(2, I32)),
    low_sample("tile.splat", "f32", s(2.5), lanes=4),
    low_sample("tile.splat", "mask", s(1, I1), lanes=2),
    low_sample("tile.splat", "index", 3, lanes=2),
    low_sample("tile.iota", "sixteen", lanes=16),
    low_sample("tile.extract", "last", v(1, 2, 3), lane=2),
)
NUMBERS = np.arange(8, dtype=np.float32)
MEMORY = (
    low_sample("tile.load", "scalar", Stored(NUMBERS), 7),
    low_sample("tile.load", "to_the_end", Stored(NUMBERS), 4, lanes=4),
    low_sample("tile.load_masked", "past_the_end", Stored(NUMBERS), 6, m(1, 1, 0, 0)),
    low_sample("tile.load_masked", "nothing", Stored(NUMBERS), 100, m(0, 0)),
    low_sample("tile.gather", "any_order", Stored(NUMBERS), np.array([7, 0, 3, 3], np.int32)),
    low_sample("tile.store", "scalar", Stored(NUMBERS), 0, s(1)),
    low_sample("tile.store", "vector", Stored(NUMBERS), 4, A),
    low_sample("tile.store_masked", "past_the_end", Stored(NUMBERS), 6, A, m(1, 1, 0, 0)),
    low_sample("tile.prefetch", "outside", Stored(NUMBERS), 1000),
    low_sample("tile.prefetch", "second_level", Stored(NUMBERS), 4, level=2),
    low_sample("tile.offset", "middle", Stored(NUMBERS), 3),
    low_sample("tile.view", "pairs", Stored(v(1, 2, 3, 4, element=BF16)), element=I32),
    low_sample("tile.scratch", "f32", size=4, element=F32),
)


def one(*arguments: Type, ends: bool = True, other: bool = False) -> Callable[[], Sequence[Region]]:
    """A region whose block gives its arguments but the first on; `other` ends it in func.return instead."""

    def build() -> Sequence[Region]:
        block = Block(arguments)
        if ends:
            Builder.at_end(block).insert(ReturnOp() if other else YieldOp(*block.arguments[1:]))
        return (Region(block),)

    return build


def branches(*types: Type | None, arguments: Sequence[Type] = ()) -> Callable[[], Sequence[Region]]:
    """Two regions that give constants of these types, nothing for None."""

    def build() -> Sequence[Region]:
        regions = []
        for number, type in enumerate(types):
            block = Block(arguments)
            builder = Builder.at_end(block)
            value = 1 + number if type == INDEX else 1.5 + number
            values = [builder(tile.ConstantOp(value=value, result_types=[type]))] if type else []
            builder.insert(YieldOp(*values))
            regions.append(Region(block))
        return regions

    return build


CONTROL = (
    low_sample("tile.for", "carries", 0, 10, 3, s(1.5), 7, regions=one(INDEX, F, INDEX), result_types=(F, INDEX)),
    low_sample("tile.for", "no_iteration", 4, 4, 1, v(1, 2), regions=one(INDEX, vt(2))),
    low_sample("tile.for", "nothing_carried", 0, 2, 1, regions=one(INDEX)),
    low_sample("tile.if", "then", s(1, I1), regions=branches(F, F), result_types=(F,)),
    low_sample("tile.if", "else", s(0, I1), regions=branches(INDEX, INDEX), result_types=(INDEX,)),
    low_sample("tile.if", "no_results", s(1, I1), regions=branches(None, None)),
    low_sample("tile.yield", "two", s(1), 2),
    low_sample("tile.thread_id", "first"),
    low_sample("tile.num_threads", "one"),
    low_sample("tile.barrier", "one"),
    low_sample("tile.ticket", "first"),
)
SAMPLES: tuple[Sample, ...] = (*ARITHMETIC, *INTEGER, *FLOAT, *CHOICE, *CONVERSION, *MEMORY, *CONTROL)

_ALIKE = "expected both operands of one type, got f32 and f64"
FAULTS: tuple[Fault, ...] = (
    *(fault(f"tile.{name}", _ALIKE, F, D) for name in ("add", "sub", "mul", "div", "min", "max")),
    fault("tile.add", "works on f32, f64, i32, i64, got vector<2 x bf16>", vt(2, BF16), vt(2, BF16)),
    fault("tile.sub", "works on f32, f64, i32, i64, got i1", MASK, MASK),
    fault("tile.mul", "expected a scalar or vector, got buffer<f32>", BUFFER, BUFFER),
    fault("tile.div", "works on f32, f64, i32, i64, got u8", ScalarType(U8), ScalarType(U8)),
    *(fault(f"tile.{name}", "works on i32, i64, got f32", F, F) for name in ("rem", "shl", "shr")),
    *(fault(f"tile.{name}", "works on i1, i32, i64, got f32", F, F) for name in ("and", "or")),
    *(fault(f"tile.{name}", "works on f32, f64, got i32", INT) for name in ("sqrt", "round")),
    fault("tile.fma", "expected three operands of one type, got f32, f32 and f64", F, F, D),
    fault("tile.fma", "works on f32, f64, got i32", INT, INT, INT),
    fault("tile.dot2", "expected an f32 accumulator, got f64", D, vt(2, BF16), vt(2, BF16)),
    fault("tile.dot2", "expected two bf16 vectors of one type", F, vt(2, BF16), vt(2)),
    fault("tile.dot2", "expected 8 bf16 lanes, got 4", vt(4), vt(4, BF16), vt(4, BF16)),
    fault("tile.dot4", "expected an i32 accumulator, got f32", F, vt(4, U8), vt(4, I8)),
    fault("tile.dot4", "expected bytes without sign first", INT, vt(4, I8), vt(4, I8)),
    fault("tile.dot4", "expected bytes with sign second", INT, vt(4, U8), vt(4, U8)),
    fault("tile.dot4", "expected 4 bytes, got vector<8 x u8>", INT, vt(8, U8), vt(4, I8)),
    fault("tile.lookup", "expected a vector for the table, got f32", F, vt(4, I32)),
    fault("tile.lookup", "expected entries of 8, 16 or 32 bits", vt(4, F64), vt(4, I32)),
    fault("tile.lookup", "expected a power of two of entries, got 3", vt(3), vt(4, I32)),
    fault("tile.lookup", "expected at most 64 entries, got 128", vt(128, U8), vt(4, I32)),
    fault("tile.lookup", "expected an i32 vector, got vector<4 x f32>", vt(4), vt(4)),
    fault("tile.gather", "expected a buffer of f32 or i32, got buffer<bf16>", BufferType(BF16), vt(4, I32)),
    fault("tile.gather", "expected an i32 vector, got vector<4 x f32>", BUFFER, vt(4)),
    fault("tile.reduce", "expected an f32 vector, got f32", F, kind="add"),
    fault("tile.reduce", "expected a power of two of lanes, got 3", vt(3), kind="add"),
    fault("tile.reduce", "expected kind add or max, got 'min'", vt(4), kind="min"),
    fault("tile.compare", _ALIKE, F, D, predicate="lt"),
    fault("tile.compare", "expected predicate one of lt, le, eq, ne, gt, ge, got 'less'", F, F, predicate="less"),
    fault("tile.compare", "works on f32, f64, i32, i64, got i1", MASK, MASK, predicate="lt"),
    fault("tile.select", "expected both values of one type, got f32 and f64", MASK, F, D),
    fault("tile.select", "expected an i1 condition, got i32", INT, F, F),
    fault("tile.select", "condition vector<2 x i1> does not fit vector<4 x f32>", vt(2, I1), vt(4), vt(4)),
    fault("tile.select", "expected a scalar or vector, got buffer<f32>", MASK, BUFFER, BUFFER),
    fault("tile.constant", "expected 2 numbers, got 3", value=(1.0, 2.0, 3.0), result_types=(vt(2),)),
    fault("tile.constant", "expected one number for f32, got 1", value=(1.0,), result_types=(F,)),
    fault("tile.constant", "expected floats for f32, got 1", value=1, result_types=(F,)),
    fault("tile.constant", "expected integers for i32, got 1.5", value=1.5, result_types=(INT,)),
    fault("tile.constant", "expected integers for vector<2 x i32>, got 2.0", value=(1, 2.0), result_types=(PAIR,)),
    fault("tile.constant", "expected numbers that u8 holds, got 256", value=256, result_types=(ScalarType(U8),)),
    fault("tile.constant", "expected numbers that i1 holds, got 2", value=2, result_types=(MASK,)),
    fault("tile.constant", "expected numbers that i64 holds", value=2**63, result_types=(INDEX,)),
    fault("tile.constant", "cannot be of bf16; cast one from f32", value=1.0, result_types=(vt(2, BF16),)),
    fault("tile.constant", "expected a scalar or vector, got buffer<f32>", value=1.0, result_types=(BUFFER,)),
    fault("tile.cast", "expected a scalar or vector, got buffer<f32>", BUFFER, to=F32),
    fault("tile.cast", "cannot cast i32 to bf16; bf16 needs f32", INT, to=BF16),
    fault("tile.cast", "cannot cast vector<2 x f16> to f64; f16 needs f32", vt(2, F16), to=F64),
    fault("tile.cast", "cannot cast bf16 to f16; bf16 needs f32", ScalarType(BF16), to=F16),
    fault("tile.cast", "cannot cast f32 to i1; compare it with 0", F, to=I1),
    fault("tile.to_index", "expected i32, got i64", LONG),
    fault("tile.from_index", "expected index, got i64", LONG),
    fault("tile.bitcast", "expected 64 bits, got f32 of 32", vt(2), to=F),
    fault("tile.bitcast", "i1 has no bits in memory: cannot read vector<8 x i1> as u8", vt(8, I1), to=ScalarType(U8)),
    fault("tile.bitcast", "expected a scalar or vector, got buffer<f32>", F, to=BUFFER),
    fault("tile.splat", "expected a scalar, got vector<2 x f32>", vt(2), lanes=4),
    fault("tile.splat", "expected 1 lane or more, got 0", F, lanes=0),
    fault("tile.iota", "expected 1 lane or more, got -1", lanes=-1),
    fault("tile.extract", "expected a vector, got f32", F, lane=0),
    fault("tile.extract", "expected a lane below 2, got 2", vt(2), lane=2),
    fault("tile.extract", "expected a lane below 2, got -1", vt(2), lane=-1),
    fault("tile.load", "expected an index, got i32", BUFFER, INT),
    fault("tile.load", "expected a buffer, got f32", F, INDEX),
    fault("tile.load", "expected a buffer of machine numbers, got buffer<i1>", BufferType(I1), INDEX),
    fault("tile.load", "expected 1 lane or more, got 0", BUFFER, INDEX, lanes=0),
    fault("tile.load_masked", "expected an i1 vector, got vector<4 x i32>", BUFFER, INDEX, vt(4, I32)),
    fault("tile.load_masked", "expected an i1 vector, got i1", BUFFER, INDEX, MASK),
    fault("tile.load_masked", "expected an index, got f32", BUFFER, F, vt(4, I1)),
    fault("tile.store", "cannot store vector<2 x f32> into buffer<bf16>", HALVES, INDEX, vt(2)),
    fault("tile.store", "expected an index, got f32", BUFFER, F, F),
    fault("tile.store_masked", "cannot store vector<2 x f32> into buffer<bf16>", HALVES, INDEX, vt(2), vt(2, I1)),
    fault("tile.store_masked", "mask vector<4 x i1> does not fit vector<2 x f32>", BUFFER, INDEX, vt(2), vt(4, I1)),
    fault("tile.store_masked", "expected an index, got f32", BUFFER, F, vt(2), vt(2, I1)),
    fault("tile.prefetch", "expected an index, got f32", BUFFER, F),
    fault("tile.prefetch", "expected level 1 or 2, got 3", BUFFER, INDEX, level=3),
    fault("tile.prefetch", "expected a buffer, got tensor<2 x f32>", TensorType((2,), F32), INDEX),
    fault("tile.offset", "expected an index, got i32", BUFFER, INT),
    fault("tile.offset", "expected a buffer, got f32", F, INDEX),
    fault("tile.view", "expected a buffer, got f32", F, element=I32),
    fault("tile.view", "expected a buffer of machine numbers, got buffer<i1>", BUFFER, element=I1),
    fault("tile.scratch", "expected a size above 0, got 0", size=0, element=F32),
    fault("tile.scratch", "machine numbers, got buffer<i1, private>", size=4, element=I1),
    fault("tile.for", "expected bounds of type index, got index, i32, index", INDEX, INT, INDEX, regions=one(INDEX)),
    fault(
        "tile.for", "expected a scalar or vector, got buffer<f32>", INDEX, INDEX, INDEX, BUFFER,
        regions=one(INDEX, BUFFER),
    ),
    fault(
        "tile.for", "expected body arguments (index, f32), got (index, f64)", INDEX, INDEX, INDEX, F,
        regions=one(INDEX, D),
    ),
    fault("tile.for", "expected its body to yield (f32), got ()", INDEX, INDEX, INDEX, F, regions=one(INDEX)),
    fault(
        "tile.for", "expected its body to yield (), got no tile.yield", INDEX, INDEX, INDEX,
        regions=one(INDEX, other=True),
    ),
    fault("tile.if", "expected an i1 condition, got vector<2 x i1>", vt(2, I1), regions=branches(None, None)),
    fault("tile.if", "expected two bodies, got 1", MASK, regions=branches(None)),
    fault("tile.if", "expected bodies that yield alike, got (f32) and (index)", MASK, regions=branches(F, INDEX)),
    fault("tile.if", "expected bodies that yield alike, got (f32) and ()", MASK, regions=branches(F, None)),
    fault("tile.if", "expected bodies without arguments", MASK, regions=branches(None, None, arguments=(F,))),
)  # fmt: skip
