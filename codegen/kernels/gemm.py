"""Matrix products with what was fused into them: [norm, cast] -> product -> bias, residual, activation, cast.

    gemm.matmul                  y[m, n]  = x[m, :] . w[n, :]
    moe.grouped_gemm             the same for each expert's rows, tokens grouped by expert, nothing padded
    tensor.fused kind = "gemm"   either of them with prologue and epilogue (forms in docs/passes/fuse.md)

Threads share the strips of the weights; a strip is read once from memory and meets all rows, `TileShape.rows` at a
time. A prologue is a first phase over all rows into arena memory, then a barrier; rows of an odd k, whose pairs would
straddle two rows, are padded there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

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
from codegen.kernels.micro import LANES, StripMatrix, TileShape, multiply_rows
from codegen.kernels.rowwise import normalize_rows
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, F32, PlainFormat
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, MulOp, SiluOp, SwigluOp
from ir.types import TensorType

PACKS: dict[PlainFormat, int] = {BF16: 2, F32: 1}  # pairs for `tile.dot2`, single numbers for `tile.fma`


@dataclass
class Gemm:
    """A product and its surroundings, taken apart."""

    x: Value
    norm: RmsNormOp | None
    x_element: PlainFormat  # what the product reads
    product: MatmulOp | GroupedGemmOp
    epilogue: list[Op]
    outside: dict[Value, Value]  # block argument -> operand
    result: Value

    @property
    def weight(self) -> StripMatrix:
        return strip_matrix(self.outer(self.product.w))

    def outer(self, value: Value) -> Value:
        """The value outside of the region that a block argument stands for."""
        return self.outside.get(value, value)


def strip_matrix(w: Value) -> StripMatrix:
    """The layout of a weight; a diagnostic when it has none."""
    type = w.type
    assert isinstance(type, TensorType) and isinstance(type.element, PlainFormat)
    if type.layout is None:
        op = w.defining_op()
        location = op.location if op else next(user for user, _ in w.uses).location
        raise DiagnosticError.of(
            Diagnostic(
                "error", f"weight of type {type} has no layout; run choose-layouts before lower-to-tile", location
            )
        )
    if type.layout.rows % LANES:
        message = f"kernels take strips of a multiple of {LANES} rows, got {type.layout}"
        raise DiagnosticError.of(Diagnostic("error", message, next(user for user, _ in w.uses).location))
    if PACKS.get(type.element) != type.layout.pack:
        packs = ", ".join(f"{element} with pack={pack}" for element, pack in PACKS.items())
        message = f"no matrix kernel for weights of {type.element} in {type.layout}; have {packs}"
        raise DiagnosticError.of(Diagnostic("error", message, next(user for user, _ in w.uses).location))
    n, k = type.shape[-2:]
    assert isinstance(n, int) and isinstance(k, int)
    return StripMatrix(n, k, type.layout, type.element)


def take_apart(op: Op) -> Gemm:
    """The parts of a fused region of kind "gemm" or of a bare product."""
    if isinstance(op, MatmulOp | GroupedGemmOp):
        return Gemm(op.x, None, _element(op.x), op, [], {}, op.results[0])
    assert isinstance(op, FusedOp)
    block = op.body.block
    outside: dict[Value, Value] = dict(zip(block.arguments, op.operands, strict=True))
    ops = list(block.ops[:-1])
    at = next(i for i, inner in enumerate(ops) if isinstance(inner, MatmulOp | GroupedGemmOp))
    product = ops[at]
    assert isinstance(product, MatmulOp | GroupedGemmOp)
    norm = ops[0] if isinstance(ops[0], RmsNormOp) else None
    first = ops[0].operands[0]
    return Gemm(outside[first], norm, _element(product.x), product, ops[at + 1 :], outside, op.results[0])


def _element(value: Value) -> PlainFormat:
    assert isinstance(value.type, TensorType) and isinstance(value.type.element, PlainFormat)
    return value.type.element


@emitter(MatmulOp, GroupedGemmOp)
def emit_gemm(op: Op, context: EmitContext) -> KernelSpec:
    """A matrix product, alone or as the heart of a fused region."""
    gemm = take_apart(op)
    w = gemm.weight
    if w.element != gemm.x_element:
        message = (
            f"'{op.name}' has {gemm.x_element} activations and {w.element} weights; set-precision makes them agree"
        )
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    arguments: list[Argument] = [gemm.x]
    if gemm.norm:
        arguments.append(gemm.outer(gemm.norm.gain))
    arguments.append(gemm.outer(gemm.product.w))
    if isinstance(gemm.product, GroupedGemmOp):
        arguments += [gemm.outer(gemm.product.order), gemm.outer(gemm.product.offsets)]
    for inner in gemm.epilogue:
        arguments += [gemm.outer(v) for v in inner.operands[1:]]
    writes = [len(arguments)]
    arguments.append(gemm.result)
    if has_prologue(gemm):
        writes.append(len(arguments))
        arguments.append(Temporary(TensorType((rows_of(gemm.x.type), w.stored_k), w.element)))
    arguments += [SizeArgument(rows_of(gemm.x.type)), SizeArgument(rows_of(gemm.result.type))]
    parts = ["experts" if isinstance(gemm.product, GroupedGemmOp) else "gemm", f"{w.n}x{w.k}"]
    parts += [inner.name.split(".")[1] for inner in ([gemm.norm] if gemm.norm else []) + gemm.epilogue]
    key = (structure_key(op), context)
    return KernelSpec("_".join(parts), key, arguments, tuple(writes), lambda name: _build(name, gemm, context.shape))


def has_prologue(gemm: Gemm) -> bool:
    """Whether the rows are computed (norm, cast) or padded to whole packs before the product."""
    w = gemm.weight
    return gemm.norm is not None or gemm.x_element != _element(gemm.x) or w.stored_k != w.k


def _build(name: str, gemm: Gemm, shape: TileShape) -> FuncOp:
    k = KernelBuilder(name)
    w = gemm.weight
    x = k.buffer("x", _element(gemm.x))
    gain = k.buffer("gain", F32) if gemm.norm else None
    weights = k.buffer("w", w.element)
    product = gemm.product
    order = offsets = None
    if isinstance(product, GroupedGemmOp):
        order, offsets = k.buffer("order", _element(product.order)), k.buffer("offsets", _element(product.offsets))
    extra = {v: k.buffer("e", _element(v)) for inner in gemm.epilogue for v in inner.operands[1:]}
    out = k.buffer("out", _element(gemm.result))
    temporary = k.buffer("rows", w.element) if has_prologue(gemm) else None
    x_rows, y_rows = k.size("x_rows"), k.size("y_rows")

    if temporary is not None:
        normalize_rows(k, x, gain, gemm.norm.eps if gemm.norm else 0.0, temporary, w.k, w.stored_k, x_rows)
        k.barrier()
        x = temporary

    tile = _TileEmitter(k, gemm, w, shape, x, out, extra)
    if not isinstance(product, GroupedGemmOp):
        tile.all_strips(weights, lambda row: row * w.stored_k, k.index(0), y_rows)
        return k.finish()
    assert order is not None and offsets is not None and isinstance(product.w.type, TensorType)
    gather = product.gather

    def row_offset(row: Expr) -> Expr:
        source = order.load(row).to_index() // gather if gather else row
        return source * w.stored_k

    experts = product.w.type.shape[0]
    assert isinstance(experts, int)
    with k.loop(0, experts) as expert:
        first, last = offsets.load(expert.i).to_index(), offsets.load(expert.i + 1).to_index()
        with k.when(first.compare("lt", last)):
            tile.all_strips(weights.at(expert.i * w.elements), row_offset, first, last)
    return k.finish()


class _TileEmitter:
    """Writes the loops over strips and rows, the product, and the epilogue of one kernel."""

    def __init__(
        self,
        k: KernelBuilder,
        gemm: Gemm,
        w: StripMatrix,
        shape: TileShape,
        x: Buffer,
        out: Buffer,
        extra: dict[Value, Buffer],
    ) -> None:
        self.k, self.gemm, self.w, self.shape, self.x, self.out, self.extra = k, gemm, w, shape, x, out, extra
        self.halves = w.layout.interleave  # 2: gate and up strips alternate
        self.out_columns = w.n // self.halves if any(isinstance(o, SwigluOp) for o in gemm.epilogue) else w.n
        if self.halves == 2 and self.out_columns == w.n:
            message = f"weight with layout {w.layout} feeds no swiglu"
            raise DiagnosticError.of(Diagnostic("error", message, gemm.product.location))
        self.padded = (w.n // self.halves) % w.layout.rows != 0

    def all_strips(self, weights: Buffer, row_offset: Callable[[Expr], Expr], first_row: Expr, last_row: Expr) -> None:
        """This thread's strips, each times rows first_row .. last_row."""
        k, w = self.k, self.w
        first, last = k.thread_share(w.strips // self.halves)
        with k.loop(first, last) as unit:
            strips = [weights.at((unit.i * self.halves + h) * w.strip_elements) for h in range(self.halves)]
            column = unit.i * w.layout.rows
            self.all_rows(strips, column, row_offset, first_row, last_row)

    def all_rows(
        self, strips: list[Buffer], column: Expr, row_offset: Callable[[Expr], Expr], first: Expr, last: Expr
    ) -> None:
        """Full tiles of rows, then the one shorter tile that is left."""
        k, step = self.k, self.shape.rows
        full = first + (last - first) // step * step
        with k.loop(first, full, step) as rows:
            self.tile(strips, column, row_offset, rows.i, step)
        rest = last - full
        for count in range(1, step):
            with k.when(rest.compare("eq", count)):
                self.tile(strips, column, row_offset, full, count)

    def tile(
        self, strips: list[Buffer], column: Expr, row_offset: Callable[[Expr], Expr], row: Expr, count: int
    ) -> None:
        """`count` rows times one strip (or pair of strips), a few vectors of columns at a time."""
        k, w = self.k, self.w
        rows = [(self.x, row_offset(row + i)) for i in range(count)]
        group = max(1, self.shape.vectors // self.halves)
        for j in range(0, w.vectors, group):
            width = min(group, w.vectors - j)
            sums = multiply_rows(k, rows, [(s, j + v) for s in strips for v in range(width)], w, self.shape)
            for i in range(count):
                self.finish(row + i, column + j * LANES, sums[i], width)

    def finish(self, row: Expr, column: Expr, values: list[Expr], width: int) -> None:
        """The epilogue on one row of a tile, and the store. With two halves `values` is gate vectors, then up."""
        k = self.k
        columns = [column + v * LANES for v in range(width)]
        masks = [k.lanes_below(self.out_columns - c, LANES) if self.padded else None for c in columns]
        if self.halves == 2:
            columns += [c + self.out_columns for c in columns]
            masks = masks * 2
        for op in self.gemm.epilogue:
            match op:
                case AddOp() | MulOp():
                    values = [self._combine(op, v, row, c, m) for v, c, m in zip(values, columns, masks, strict=True)]
                case SiluOp():
                    values = [silu(k, v) for v in values]
                case ClipOp():
                    values = [clip(k, v, op.low, op.high) for v in values]
                case SwigluOp():
                    values = [silu(k, g) * u for g, u in zip(values[:width], values[width:], strict=True)]
                    columns, masks = columns[:width], masks[:width]
                case CastOp():
                    values = [v.cast(op.to) for v in values]
                case _:
                    message = f"'{op.name}' cannot follow a product in one kernel"
                    raise DiagnosticError.of(Diagnostic("error", message, op.location))
        for value, c, mask in zip(values, columns, masks, strict=True):
            self.out.store(row * self.out_columns + c, value, mask)

    def _combine(self, op: AddOp | MulOp, value: Expr, row: Expr, column: Expr, mask: Expr | None) -> Expr:
        other = op.operands[1]
        assert isinstance(other.type, TensorType)
        width = other.type.shape[-1]
        assert isinstance(width, int)
        at = column if other.type.rank == 1 else row * width + column
        loaded = self.extra[other].load(at, LANES, mask).cast(F32)
        return value + loaded if isinstance(op, AddOp) else value * loaded
