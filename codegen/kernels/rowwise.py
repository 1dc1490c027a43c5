"""Kernels that work row by row: elementwise chains, norms, embedding, row gathering, combining of experts, casts.

Each op of a region becomes an expression of (row, column) on 16 lanes at a time; the whole chain is one loop that
reads each input once and writes each result once. A leading norm first sums squares over its row. Work is shared among
the threads by rows, and by pieces of rows where no norm needs the whole row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from codegen.kernels.call import (
    Argument,
    EmitContext,
    KernelSpec,
    SizeArgument,
    Temporary,
    emitter,
    rows_of,
    structure_key,
)
from codegen.kernels.math import clip, silu
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, I32, PlainFormat
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp
from ir.ops.moe import CombineOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, EmbedOp, GatherRowsOp, MulOp, ReshapeOp, SiluOp, SliceOp, SwigluOp
from ir.types import TensorType

LANES = 16
PIECE = 512  # columns per unit of work where rows can be cut


def width_of(value: Value) -> int:
    """Columns of a tensor whose first dimension is rows: the product of the others."""
    assert isinstance(value.type, TensorType)
    width = 1
    for dim in value.type.shape[1:]:
        assert isinstance(dim, int), f"{value.type} has a symbolic inner dimension"
        width *= dim
    return width


def element_of(value: Value) -> PlainFormat:
    """The element of a tensor of machine numbers."""
    assert isinstance(value.type, TensorType) and isinstance(value.type.element, PlainFormat)
    return value.type.element


def for_columns(k: KernelBuilder, first: Expr | int, last: int, body: Callable[[Expr, int, Expr | None], None]) -> None:
    """Runs `body(column, lanes, mask)` over [first, last); only the last vector may need a mask. `first` is a
    multiple of LANES."""
    full = last // LANES * LANES
    with k.loop(first, full, LANES) as loop:
        body(loop.i, LANES, None)
    if last > full:
        body(k.index(full), LANES, k.lanes_below(last - full, LANES))


def row_scale(k: KernelBuilder, load: Callable[[Expr, int, Expr | None], Expr], width: int, eps: float) -> Expr:
    """1 / sqrt(mean of squares + eps) of a row of `width` elements, as an f32 scalar."""
    full = width // LANES * LANES
    with k.loop(0, full, LANES, [k.f32(0.0, LANES)]) as loop:
        x = load(loop.i, LANES, None)
        loop.carry(k.fma(x, x, loop.carried[0]))
    squares = loop.results[0]
    if width > full:
        x = load(k.index(full), LANES, k.lanes_below(width - full, LANES))
        squares = k.fma(x, x, squares)
    return 1.0 / k.sqrt(squares.reduce("add") * (1.0 / width) + eps)


class RowEvaluator:
    """Values of a region at (row, columns), computed on demand from the buffers of its block arguments."""

    def __init__(self, k: KernelBuilder, buffers: dict[Value, Buffer]) -> None:
        self.k = k
        self.buffers = buffers
        self.row: Expr = k.index(0)
        self.scales: dict[Value, Expr] = {}  # of norms, for the current row
        self.inverse: Buffer | None = None  # of moe.combine: row in grouped order of each pair

    def value(self, value: Value, column: Expr, lanes: int, mask: Expr | None) -> Expr:
        """`lanes` elements of `value` from `column` of the current row on, in the value's own element."""
        buffer = self.buffers.get(value)
        if buffer is not None:
            return self._argument(value, buffer, column, lanes, mask)
        op = value.defining_op()
        assert op is not None

        def of(index: int, at: Expr = column) -> Expr:
            return self.value(op.operands[index], at, lanes, mask)

        def wide(index: int, at: Expr = column) -> Expr:
            return of(index, at).cast(F32)

        match op:
            case AddOp():
                result = wide(0) + wide(1)
            case MulOp():
                result = wide(0) * wide(1)
            case SiluOp():
                result = silu(self.k, wide(0))
            case ClipOp():
                result = clip(self.k, wide(0), op.low, op.high)
            case SwigluOp():
                result = silu(self.k, wide(0)) * wide(0, column + width_of(value))
            case SliceOp():
                result = of(0, column + op.start)
            case CastOp() | ReshapeOp():
                result = of(0)
            case RmsNormOp():
                result = wide(0) * self.scales[value] * wide(1)
            case EmbedOp() | GatherRowsOp():
                result = self._gathered(op, column, lanes, mask)
            case CombineOp():
                result = self._combined(op, column, lanes, mask)
            case _:
                message = f"no row by row kernel for '{op.name}'"
                raise DiagnosticError.of(Diagnostic("error", message, op.location))
        return result.cast(element_of(value))

    def prepare_row(self, row: Expr, norms: list[RmsNormOp]) -> None:
        """Moves on to another row: the scales of its norms are computed."""
        self.row = row
        for norm in norms:

            def load(column: Expr, lanes: int, mask: Expr | None, norm: RmsNormOp = norm) -> Expr:
                return self.value(norm.x, column, lanes, mask).cast(F32)

            self.scales[norm.y] = row_scale(self.k, load, width_of(norm.x), norm.eps)

    def _argument(self, value: Value, buffer: Buffer, column: Expr, lanes: int, mask: Expr | None) -> Expr:
        type = value.type
        assert isinstance(type, TensorType)
        if type.rank > 1:
            return buffer.load(self.row * width_of(value) + column, lanes, mask)
        return buffer.load(column, lanes, mask)

    def _gathered(self, op: EmbedOp | GatherRowsOp, column: Expr, lanes: int, mask: Expr | None) -> Expr:
        ids, table = (op.ids, op.table) if isinstance(op, EmbedOp) else (op.rows, op.x)
        source = self.buffers[ids].load(self.row).to_index()
        return self.buffers[table].load(source * width_of(table) + column, lanes, mask)

    def _combined(self, op: CombineOp, column: Expr, lanes: int, mask: Expr | None) -> Expr:
        assert self.inverse is not None
        top_k, total = width_of(op.weights), None
        for s in range(top_k):
            pair = self.row * top_k + s
            weight = self.k.splat(self.buffers[op.weights].load(pair).cast(F32), lanes)
            expert_row = self.inverse.load(pair).to_index()
            y = self.buffers[op.y].load(expert_row * width_of(op.y) + column, lanes, mask).cast(F32)
            total = weight * y if total is None else self.k.fma(weight, y, total)
        assert total is not None
        return total


@emitter(AddOp, MulOp, SiluOp, ClipOp, SwigluOp, SliceOp, CastOp, RmsNormOp, EmbedOp, GatherRowsOp, CombineOp)
def emit_rowwise(op: Op, context: EmitContext) -> KernelSpec:
    """One such op, or a fused region of kind "elementwise"."""
    body, outside, results = _region(op)
    inputs = list(outside)
    for inner in body:
        _refuse_shapes(inner)
    arguments: list[Argument] = [outside[v] for v in inputs]
    writes = [len(arguments) + i for i in range(len(op.results))]
    arguments += list(op.results)
    combine = next((inner for inner in body if isinstance(inner, CombineOp)), None)
    if combine:
        writes.append(len(arguments))
        arguments.append(Temporary(combine.order.type))
    arguments.append(SizeArgument(rows_of(op.results[0].type)))
    stem = "_".join(inner.name.split(".")[1] for inner in body)

    def build(name: str) -> FuncOp:
        return _build(name, body, inputs, results, combine)

    return KernelSpec(stem[:48], (structure_key(op), "rowwise"), arguments, tuple(writes), build)


def _region(op: Op) -> tuple[list[Op], dict[Value, Value], list[Value]]:
    """(ops, input as the ops see it -> operand, results as the ops see them)."""
    if isinstance(op, FusedOp):
        block = op.body.block
        end = block.terminator
        assert end is not None
        return list(block.ops[:-1]), dict(zip(block.arguments, op.operands, strict=True)), list(end.operands)
    return [op], {v: v for v in op.operands}, list(op.results)


def _refuse_shapes(op: Op) -> None:
    """A row is everything behind the first dimension; ops that mean less by it are for matrices only."""
    types = [v.type for v in op.operands if isinstance(v.type, TensorType)]
    message = ""
    match op:
        case SliceOp() if op.axis != 1 or types[0].rank != 2:
            message = (
                f"'tensor.slice' of {types[0]} along axis {op.axis} has no kernel; only columns of a matrix are cut"
            )
        case RmsNormOp() | SwigluOp() if types[0].rank != 2:
            message = f"'{op.name}' of {types[0]} has no kernel of its own; only rows of a matrix are taken"
        case AddOp() | MulOp() if types[1].shape != types[0].shape and (types[0].rank, types[1].rank) != (2, 1):
            message = f"'{op.name}' of {types[0]} and {types[1]} has no kernel; only a row is spread over a matrix"
    if message:
        raise DiagnosticError.of(Diagnostic("error", message, op.location))


def _build(name: str, body: list[Op], inputs: list[Value], results: list[Value], combine: CombineOp | None) -> FuncOp:
    k = KernelBuilder(name)
    buffers = {v: k.buffer(v.name_hint or "x", element_of(v)) for v in inputs}
    outputs = [k.buffer("out", element_of(v)) for v in results]
    inverse = k.buffer("inverse", I32) if combine else None
    rows = k.size("rows")
    evaluator = RowEvaluator(k, buffers)
    if combine is not None and inverse is not None:
        first, last = k.thread_share(rows * width_of(combine.weights))
        order = buffers[combine.order]
        with k.loop(first, last) as pair:
            inverse.store(order.load(pair.i).to_index(), pair.i.from_index())
        k.barrier()
        evaluator.inverse = inverse
    norms = [op for op in body if isinstance(op, RmsNormOp)]
    widths = list(dict.fromkeys(map(width_of, results)))
    width = widths[0]

    def write(column: Expr, lanes: int, mask: Expr | None, width: int = width) -> None:
        for value, out in zip(results, outputs, strict=True):
            if width_of(value) == width:
                out.store(evaluator.row * width + column, evaluator.value(value, column, lanes, mask), mask)

    if norms or len(widths) > 1:
        first, last = k.thread_share(rows)
        with k.loop(first, last) as row:
            evaluator.prepare_row(row.i, norms)
            for each in widths:
                for_columns(k, 0, each, partial(write, width=each))
        return k.finish()
    pieces = -(-width // PIECE)
    first, last = k.thread_share(rows * pieces)
    with k.loop(first, last) as unit:
        evaluator.row = unit.i // pieces
        start = unit.i % pieces * PIECE
        full = width // LANES * LANES
        with k.loop(start, (start + PIECE).min(full), LANES) as loop:
            write(loop.i, LANES, None)
        if width > full:
            with k.when((start + PIECE).compare("ge", width)):
                write(k.index(full), LANES, k.lanes_below(width - full, LANES))
    return k.finish()
