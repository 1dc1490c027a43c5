"""One-op kernels for every value op of the tile level, each with its meaning on whole arrays.

A kernel runs over blocks of `lanes` outputs: block i of an input has `lanes * share` elements, and `out[i]` of the case
is what the op gives for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np

from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import BF16, F16, F32, F64, I1, I8, I32, I64, U8, PlainFormat
from ir.ops import tile, tile_convert, tile_lanes, tile_packed, tile_products
from ir.ops.builtin import FuncOp
from ir.types import ScalarType, Type, VectorType

LANES = (1, 2, 4, 8, 16)
Body = Callable[..., Expr]  # (k, *operands) -> result
Meaning = Callable[..., np.ndarray]  # (*arrays) -> array, on all blocks at once
Domain = Callable[..., Sequence[np.ndarray]]  # (*arrays) -> arrays that the op is defined for


def anything(*arrays: np.ndarray) -> Sequence[np.ndarray]:
    return arrays


@dataclass(frozen=True)
class Case:
    """`run(kernels, arrays)` is for any engine; `share[i]` elements of input i make one lane."""

    name: str
    kernel: FuncOp
    inputs: tuple[PlainFormat, ...]
    out: PlainFormat
    lanes: int
    meaning: Meaning
    domain: Domain = anything
    share: tuple[int, ...] = ()
    out_share: tuple[int, int] = (1, 1)  # elements written for so many lanes
    group: str = field(default="")

    def __str__(self) -> str:
        return self.name

    def outputs(self, lanes: int) -> np.ndarray:
        """A buffer for the results of that many lanes."""
        return np.zeros(lanes * self.out_share[0] // self.out_share[1], self.out.dtype)


def of(element: PlainFormat, lanes: int) -> Type:
    """Scalar for one lane, else a vector."""
    return VectorType(lanes, element) if lanes > 1 else ScalarType(element)


def block_kernel(
    name: str, inputs: Sequence[PlainFormat], out: PlainFormat, lanes: int, body: Body, share: Sequence[int] = ()
) -> FuncOp:
    """out[block] = body(inputs[block]) for each block of `lanes`; what the body gives decides how much is stored."""
    k = KernelBuilder(name)
    sources = [k.buffer(f"x{i}", element) for i, element in enumerate(inputs)]
    target, count = k.buffer("out", out), k.size("blocks")
    widths = [lanes * s for s in share] if share else [lanes] * len(sources)
    with k.loop(0, count) as block:
        made = body(k, *(s.load(block.i * w, w) for s, w in zip(sources, widths, strict=True)))
        target.store(block.i * made.lanes, made)
    return k.finish()


def emit(op: Callable[..., Any], **attributes: Any) -> Body:
    """A body of one op."""
    return lambda k, *operands: Expr(k, k.emit(op(*(o.value for o in operands), **attributes)))


def nonzero_divisor(a: np.ndarray, b: np.ndarray) -> Sequence[np.ndarray]:
    if a.dtype.kind == "f":
        return a, b
    lowest = np.iinfo(a.dtype).min
    return a, np.where((b == 0) | ((b == -1) & (a == lowest)), 3, b).astype(b.dtype)


def shift(a: np.ndarray, b: np.ndarray) -> Sequence[np.ndarray]:
    return a, (b.view(f"u{b.dtype.itemsize}") % (8 * b.dtype.itemsize)).astype(b.dtype)


ARITHMETIC = {
    "add": tile.AddOp, "sub": tile.SubOp, "mul": tile.MulOp, "div": tile.DivOp, "min": tile.MinOp, "max": tile.MaxOp,
    "rem": tile.RemOp, "and": tile.AndOp, "or": tile.OrOp, "shl": tile.ShlOp, "shr": tile.ShrOp,
}  # fmt: skip
DOMAINS: dict[str, Domain] = {"div": nonzero_divisor, "rem": nonzero_divisor, "shl": shift, "shr": shift}


def binary_cases() -> Iterator[Case]:
    for name, op in ARITHMETIC.items():
        for element in (F32, F64, I32, I64):
            if element not in op.elements:
                continue
            for lanes in LANES:
                label = f"{name}_{element}_{lanes}"
                kernel = block_kernel(label, [element] * 2, element, lanes, emit(op))
                yield Case(label, kernel, (element,) * 2, element, lanes, op.reference, DOMAINS.get(name, anything))


def float_cases() -> Iterator[Case]:
    for name, op in (("sqrt", tile.SqrtOp), ("round", tile.RoundOp)):
        for element in (F32, F64):
            for lanes in LANES:
                label = f"{name}_{element}_{lanes}"
                yield Case(
                    label,
                    block_kernel(label, [element], element, lanes, emit(op)),
                    (element,),
                    element,
                    lanes,
                    op.reference,
                )
    for element in (F32, F64):
        for lanes in LANES:
            label = f"fma_{element}_{lanes}"
            kernel = block_kernel(label, [element] * 3, element, lanes, emit(tile_products.FmaOp))
            yield Case(label, kernel, (element,) * 3, element, lanes, tile_products.FmaOp.reference, group="fma")
    for lanes in LANES:
        label = f"dot2_{lanes}"
        kernel = block_kernel(label, [F32, BF16, BF16], F32, lanes, emit(tile_products.Dot2Op), (1, 2, 2))
        yield Case(
            label, kernel, (F32, BF16, BF16), F32, lanes, tile_products.Dot2Op.reference, share=(1, 2, 2), group="dot2"
        )
    for lanes in LANES:
        label = f"dot4_{lanes}"
        kernel = block_kernel(label, [I32, U8, I8], I32, lanes, emit(tile_packed.Dot4Op), (1, 4, 4))
        yield Case(label, kernel, (I32, U8, I8), I32, lanes, tile_packed.Dot4Op.reference, share=(1, 4, 4))
    for kind in ("add", "max"):
        for lanes in LANES:
            label = f"reduce_{kind}_{lanes}"
            kernel = block_kernel(label, [F32], F32, lanes, _reduce(kind, lanes))
            yield Case(label, kernel, (F32,), F32, lanes, _reduced(kind, lanes), out_share=(1, lanes))


def _reduce(kind: str, lanes: int) -> Body:
    def body(k: KernelBuilder, x: Expr) -> Expr:
        if lanes == 1:
            x = Expr(k, k.emit(tile_lanes.SplatOp(x.value, lanes=1)))
        return x.reduce(kind)

    return body


def _reduced(kind: str, lanes: int) -> Meaning:
    return lambda x: np.array([tile_lanes.ReduceOp.reference(row, kind) for row in x.reshape(-1, lanes)])


def lookup_cases() -> Iterator[Case]:
    """A table of its own for each block: in one register and in several, of entries that an instruction permutes."""
    for element, entries in ((U8, 4), (U8, 16), (I8, 64), (BF16, 16), (BF16, 32), (F32, 4), (F32, 16), (I32, 32)):
        for lanes in LANES[1:]:
            label = f"lookup_{element}_{entries}_{lanes}"
            wide, per_word = entries // lanes, 32 // element.bits  # table entries and results for each index lane
            if wide * lanes != entries:
                continue
            kernel = block_kernel(label, [element, I32], element, lanes, emit(tile_packed.LookupOp), (wide, 1))
            meaning = _looked_up(entries, lanes)
            shares = {"share": (wide, 1), "out_share": (per_word, 1)}
            yield Case(label, kernel, (element, I32), element, lanes, meaning, **shares)


def _looked_up(entries: int, lanes: int) -> Meaning:
    def meaning(tables: np.ndarray, index: np.ndarray) -> np.ndarray:
        blocks = zip(tables.reshape(-1, entries), index.reshape(-1, lanes), strict=True)
        return np.concatenate([tile_packed.LookupOp.reference(table, block) for table, block in blocks])

    return meaning


def choice_cases() -> Iterator[Case]:
    for predicate in ("lt", "le", "eq", "ne", "gt", "ge"):
        for element in (F32, F64, I32, I64):
            for lanes in LANES:
                label = f"compare_{predicate}_{element}_{lanes}"
                kernel = block_kernel(label, [element] * 2, element, lanes, _choose(predicate))
                yield Case(label, kernel, (element,) * 2, element, lanes, _chosen(predicate))
    for lanes in LANES:
        label = f"masks_{lanes}"
        yield Case(label, block_kernel(label, [F32] * 3, F32, lanes, _masks), (F32,) * 3, F32, lanes, _masked)
    for lanes in LANES[1:]:
        label = f"select_whole_{lanes}"
        yield Case(
            label, block_kernel(label, [F32] * 2, F32, lanes, _whole), (F32,) * 2, F32, lanes, _whole_meaning(lanes)
        )


def _choose(predicate: str) -> Body:
    return lambda k, a, b: k.select(a.compare(predicate, b), a, b)


def _chosen(predicate: str) -> Meaning:
    return lambda a, b: np.where(tile_lanes.CompareOp.reference(a, b, predicate), a, b)


def _masks(k: KernelBuilder, a: Expr, b: Expr, c: Expr) -> Expr:
    return k.select((a.compare("lt", b) & b.compare("ge", c)) | a.compare("ne", a), b, c)


def _masked(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    return np.where(((a < b) & (b >= c)) | (a != a), b, c)


def _whole(k: KernelBuilder, a: Expr, b: Expr) -> Expr:
    return k.select(a.extract(0).compare("lt", b.extract(0)), a, b)


def _whole_meaning(lanes: int) -> Meaning:
    return lambda a, b: np.where(np.repeat(a[::lanes] < b[::lanes], lanes), a, b)


CASTS = (
    *((F32, to) for to in (BF16, F16, F64, I32, I64, I8, U8)),
    *((have, F32) for have in (BF16, F16, F64, I32, I64, I8, U8)),
    *((have, to) for have in (I32, I64, I8, U8) for to in (I32, I64, I8, U8) if have != to),
    (F64, I32), (F64, I64), (I32, F64), (I64, F64), (U8, F64),
)  # fmt: skip


def cast_cases(with_f16: bool = True) -> Iterator[Case]:
    for have, to in CASTS:
        if F16 in (have, to) and not with_f16:
            continue
        for lanes in LANES:
            label = f"cast_{have}_{to}_{lanes}"
            kernel = block_kernel(label, [have], to, lanes, emit(tile_convert.CastOp, to=to))
            group = "to_bf16" if to == BF16 else ""
            yield Case(label, kernel, (have,), to, lanes, _cast(to), _representable(have, to), group=group)
    for to in (F32, F64, I32, I64, U8):
        for lanes in LANES:
            label = f"cast_i1_{to}_{lanes}"
            kernel = block_kernel(label, [F32] * 2, to, lanes, lambda k, a, b, to=to: a.compare("lt", b).cast(to))
            yield Case(label, kernel, (F32,) * 2, to, lanes, lambda a, b, to=to: (a < b).astype(to.dtype))
    for element in (I32,):
        label = "index_there_and_back"
        kernel = block_kernel(label, [element], element, 1, lambda k, a: (a.to_index() * 3 + 1).from_index())
        yield Case(label, kernel, (element,), element, 1, lambda a: (a.astype(np.int64) * 3 + 1).astype(np.int32))


def _cast(to: PlainFormat) -> Meaning:
    return lambda x: x.astype(to.dtype)


def _representable(have: PlainFormat, to: PlainFormat) -> Domain:
    """Floats that the integer format holds; all else gives any number."""
    if not have.is_float or to.is_float:
        return anything

    def domain(x: np.ndarray) -> Sequence[np.ndarray]:
        limits = np.iinfo(to.dtype)
        with np.errstate(invalid="ignore"):
            whole = np.trunc(x.astype(np.float64))
            inside = (whole >= float(limits.min)) & (whole < float(limits.max) + (to.bits < 64))
        return (np.where(inside, x, have.dtype.type(-0.75)),)

    return domain


def bit_cases() -> Iterator[Case]:
    pairs = ((F32, I32, 1), (I32, F32, 1), (F64, I64, 1), (I64, I32, 2), (I32, BF16, 2), (F32, BF16, 2), (I32, U8, 4))
    for have, to, factor in pairs:
        for lanes in LANES:
            for wide, narrow, name in ((have, to, "split"), (to, have, "join")):
                label = f"bitcast_{name}_{wide}_{narrow}_{lanes}"
                splits = name == "split"
                made = of(narrow, lanes * factor if splits else lanes)
                body = lambda k, x, made=made: x.bitcast(made)  # noqa: E731
                share = (1,) if splits else (factor,)
                kernel = block_kernel(label, [wide], narrow, lanes, body, share)
                meaning = lambda x, to=narrow: x.view(to.dtype)  # noqa: E731
                out = (factor, 1) if splits else (1, 1)
                yield Case(label, kernel, (wide,), narrow, lanes, meaning, share=share, out_share=out)


def shape_cases() -> Iterator[Case]:
    for element in (F32, BF16, I8, I64):
        for lanes in LANES[1:]:
            for lane in sorted({0, lanes // 2, lanes - 1}):
                label = f"extract_{element}_{lane}_of_{lanes}"
                kernel = block_kernel(label, [element], element, lanes, lambda k, x, lane=lane: x.extract(lane))
                meaning = lambda x, lane=lane, lanes=lanes: x[lane::lanes]  # noqa: E731
                yield Case(label, kernel, (element,), element, lanes, meaning, out_share=(1, lanes))
            label = f"splat_{element}_{lanes}"
            body = lambda k, x, lanes=lanes: k.splat(x.extract(0), lanes)  # noqa: E731
            kernel = block_kernel(label, [element], element, lanes, body)
            meaning = lambda x, lanes=lanes: np.repeat(x[::lanes], lanes)  # noqa: E731
            yield Case(label, kernel, (element,), element, lanes, meaning)
    for lanes in LANES[1:]:
        label = f"iota_{lanes}"
        kernel = block_kernel(label, [I32], I32, lanes, lambda k, x, lanes=lanes: x + k.iota(lanes))
        meaning = lambda x, lanes=lanes: x + np.tile(np.arange(lanes, dtype=np.int32), len(x) // lanes)  # noqa: E731
        yield Case(label, kernel, (I32,), I32, lanes, meaning)


CONSTANTS: tuple[tuple[PlainFormat, tuple[float, ...]], ...] = (
    (F32, (0.1, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 3e38, 1.0)),
    (F64, (0.1, -0.0, float("inf"), float("-inf"), float("nan"), 5e-324, 1e308, 1.0)),
    (I32, (0, -1, 2**31 - 1, -(2**31), 7, 8, 9, 10)),
    (I64, (0, -1, 2**63 - 1, -(2**63), 7, 8, 9, 10)),
    (U8, (0, 255, 128, 7, 8, 9, 10, 11)),
    (I1, (0, 1, 1, 0, 1, 1, 1, 0)),
)


def constant_cases() -> Iterator[Case]:
    """Constants alone and in all lanes, chosen by a mask that the input decides, so that they meet a register."""
    for element, numbers in CONSTANTS:
        stored = U8 if element == I1 else element
        for lanes in (1, 8):
            values: list[Any] = [tuple(numbers), numbers[1]] if lanes > 1 else list(numbers)
            for i, value in enumerate(values):
                label = f"constant_{element}_{lanes}_{i}"
                kernel = block_kernel(label, [F32], stored, lanes, _constant(element, stored, lanes, value))
                yield Case(label, kernel, (F32,), stored, lanes, _constant_meaning(element, stored, lanes, value))


def _constant(element: PlainFormat, stored: PlainFormat, lanes: int, value: Any) -> Body:
    def body(k: KernelBuilder, x: Expr) -> Expr:
        first = Expr(k, k.emit(tile.ConstantOp(value=value, result_types=[of(element, lanes)])))
        other = Expr(k, k.emit(tile.ConstantOp(value=1.0 if element.is_float else 1, result_types=[first.type])))
        return k.select(x.compare("lt", 0.0), first, other).cast(stored)

    return body


def _constant_meaning(element: PlainFormat, stored: PlainFormat, lanes: int, value: Any) -> Meaning:
    def meaning(x: np.ndarray) -> np.ndarray:
        one = np.tile(np.broadcast_to(np.array(value, element.dtype), (lanes,)), len(x) // lanes)
        return np.where(x < 0, one, element.dtype.type(1)).astype(stored.dtype)

    return meaning


@cache
def all_cases(with_f16: bool = True) -> tuple[Case, ...]:
    makers = (
        binary_cases(),
        float_cases(),
        lookup_cases(),
        choice_cases(),
        cast_cases(with_f16),
        bit_cases(),
        shape_cases(),
    )
    return tuple(case for maker in (*makers, constant_cases()) for case in maker)
