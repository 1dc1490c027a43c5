"""Matrix products with what was fused into them: [norm] [rotate] [cast, quantize] -> product -> bias, residual, ...

    gemm.matmul                  y[m, n]  = x[m, :] . w[n, :]
    moe.grouped_gemm             the same for each expert's rows, tokens grouped by expert, nothing padded
    tensor.fused kind = "gemm"   either of them with prologue and epilogue (forms in docs/passes/fuse.md)

Threads share the strips of the weights; a strip is read once from memory and meets all rows, `TileShape.rows` at a
time. A prologue is a first phase over all rows into arena memory, then a barrier; rows whose length is no multiple of
what an inner product takes at once are padded there. How weights and activations meet is a `Product`.
"""

from __future__ import annotations

from collections.abc import Callable

from codegen.kernels.activations import RowSource
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
from codegen.kernels.micro import LANES
from codegen.kernels.packed import Ahead
from codegen.kernels.products import Product, product_of
from codegen.tickets import Tickets
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, PlainFormat
from ir.ops.builtin import FuncOp
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, MulOp, SiluOp, SwigluOp
from ir.types import TensorType
from passes.fuse.forms import FormError, GemmForm, describe_gemm

SHARED_PART = 3  # one strip of so many is not given to a thread beforehand
LINES_AHEAD_BYTES = 6912  # how far on in a strip the tile that reads it first asks once more; 4 to 12 KiB do as well
ASKING = 5  # tiles of an expert's rows in a prompt that share asking for the next strip
ALTERNATE = 2  # tiles of a few rows that share asking for the next strip
PIECE_BYTES = 32 << 10  # of weights at a time are taken of those


class Gemm:
    """A product and its surroundings: the parts of the form, with the values outside of the region."""

    def __init__(self, op: Op, context: EmitContext) -> None:
        try:
            self.form: GemmForm = describe_gemm(op)
        except FormError as fault:
            message = f"no kernel for this '{op.name}' of kind \"gemm\": {fault}"
            raise DiagnosticError.of(Diagnostic("error", message, op.location)) from None
        self.op, self.shape, self.few = op, context.shape, context.program == "decode"
        self.context = context
        self.x = op.operands[self.form.x]
        self.w = op.operands[self.form.weight]
        self.result = op.results[0]
        self.epilogue = self.form.epilogue
        self.extra = [op.operands[i] for i in self.form.epilogue_operands if i is not None]
        self.grouped = self.form.product if isinstance(self.form.product, GroupedGemmOp) else None
        type = self.w.type
        assert isinstance(type, TensorType)
        self.experts, self.n, self.k = (d for d in (1, *type.shape)[-3:] if isinstance(d, int))
        self.temporaries = self.product().temporaries(rows_of(self.x.type)) if self.has_prologue else []

    def product(self) -> Product:
        """A product without buffers."""
        return product_of(self.w, self.form.product.x, self.op, self.shape)

    @property
    def expert_stride(self) -> int:
        """Elements of the buffer of weights from one expert's matrix to the next."""
        product = self.product()
        return self.context.strides.get(self.w, 0) // product.weight_element.dtype.itemsize or product.matrix_size

    @property
    def has_prologue(self) -> bool:
        """Whether the rows are computed (norm, rotation, cast, int8) or padded before the product."""
        product = self.product()
        padded = product.temporaries(1)[0].type.shape[1] != self.k
        return bool(self.form.prologue) or padded

    @property
    def stem(self) -> str:
        """What the kernel's name begins with."""
        before = [o for o in (self.form.norm, self.form.rotate, self.form.quantize) if o is not None]
        experts = "stand_ins" if self.grouped is not None and self.grouped.stand_ins else "experts"
        parts = [experts if self.grouped else "gemm", f"{self.n}x{self.k}"]
        return "_".join(parts + [o.name.split(".")[1] for o in (*before, *self.epilogue)])


def _element(value: Value) -> PlainFormat:
    assert isinstance(value.type, TensorType) and isinstance(value.type.element, PlainFormat)
    return value.type.element


@emitter(MatmulOp, GroupedGemmOp)
def emit_gemm(op: Op, context: EmitContext) -> KernelSpec:
    """A matrix product, alone or as the heart of a fused region."""
    gemm = Gemm(op, context)
    form = gemm.form
    arguments: list[Argument] = [gemm.x]
    if form.gain is not None:
        arguments.append(op.operands[form.gain])
    arguments.append(gemm.w)
    if form.order is not None and form.offsets is not None:
        arguments += [op.operands[form.order], op.operands[form.offsets]]
    arguments += gemm.extra
    writes = [len(arguments)]
    arguments.append(gemm.result)
    writes += range(len(arguments), len(arguments) + len(gemm.temporaries))
    arguments += gemm.temporaries
    arguments += [SizeArgument(rows_of(gemm.x.type)), SizeArgument(rows_of(gemm.result.type))]
    key = (structure_key(op), context, gemm.expert_stride)
    return KernelSpec(gemm.stem, key, arguments, tuple(writes), lambda name: _build(name, gemm))


def _build(name: str, gemm: Gemm) -> FuncOp:
    k = KernelBuilder(name)
    form, product = gemm.form, gemm.product()
    x = k.buffer("x", _element(gemm.x))
    gain = k.buffer("gain", _element(gemm.op.operands[form.gain])) if form.gain is not None else None
    weights = k.buffer("w", product.weight_element)
    order = offsets = None
    if gemm.grouped:
        order = k.buffer("order", _element(gemm.grouped.order))
        offsets = k.buffer("offsets", _element(gemm.grouped.offsets))
    extra = {i: k.buffer("e", _element(v)) for i, v in zip(_extra_places(form), gemm.extra, strict=True)}
    out = k.buffer("out", _element(gemm.result))
    memory = [k.buffer("rows", _temporary_element(t)) for t in gemm.temporaries]
    x_rows, y_rows = k.size("x_rows"), k.size("y_rows")

    if memory:
        rotation = form.rotate.block if form.rotate else 0
        product.prepare(k, RowSource(x, gemm.k, form.norm, gain, rotation), memory, x_rows, gemm.few)
        k.barrier()
    product.use_rows(memory or [x])

    tile = _TileEmitter(k, gemm, product, out, extra)
    if gemm.grouped is None:
        product.use_matrix(k, weights)
        tile.all_strips(lambda row: row, k.index(0), y_rows, k.index(0))
        return k.finish()
    assert order is not None and offsets is not None
    gather, group = gemm.grouped.gather, gemm.grouped.first

    def source_row(row: Expr) -> Expr:
        return order.load(row).to_index() // gather if gather else row

    with k.loop(0, gemm.experts, 1, [k.index(0)]) as expert:
        starts = expert.i + group if group else expert.i
        first, last = offsets.load(starts).to_index(), offsets.load(starts + 1).to_index()
        used = first.compare("lt", last)
        with k.when(used):
            product.use_matrix(k, weights.at(expert.i * gemm.expert_stride))
            tile.all_strips(source_row, first, last, expert.carried[0])
        expert.carry(k.select(used, expert.carried[0] + tile.pieces, expert.carried[0]))
    return k.finish()


def _extra_places(form: GemmForm) -> list[int]:
    """Which ops of the epilogue read a second operand."""
    return [i for i, operand in enumerate(form.epilogue_operands) if operand is not None]


def _temporary_element(temporary: Temporary) -> PlainFormat:
    type = temporary.type
    assert isinstance(type, TensorType) and isinstance(type.element, PlainFormat)
    return type.element


class _TileEmitter:
    """Writes the loops over strips and rows, the product, and the epilogue of one kernel."""

    def __init__(self, k: KernelBuilder, gemm: Gemm, product: Product, out: Buffer, extra: dict[int, Buffer]) -> None:
        self.k, self.gemm, self.product, self.out, self.extra = k, gemm, product, out, extra
        layout = product.layout
        self.halves = layout.interleave  # 2: gate and up strips alternate
        self.out_columns = gemm.n // self.halves if gemm.form.has_swiglu else gemm.n
        if self.halves == 2 and self.out_columns == gemm.n:
            message = f"weight with layout {layout} feeds no swiglu"
            raise DiagnosticError.of(Diagnostic("error", message, gemm.form.product.location))
        self.padded = (gemm.n // self.halves) % layout.rows != 0
        self.units = product.strips // self.halves  # strips, or pairs of them
        shared = self.units // SHARED_PART  # the last of them go to whoever is free
        self.fixed = self.units - shared
        self.piece = max(1, min(-(-PIECE_BYTES // (product.strip_bytes * self.halves)), shared // 2))
        self.pieces = -(-shared // self.piece)
        self.tickets = Tickets(k, ahead=True) if shared else None

    def all_strips(
        self, source_row: Callable[[Expr], Expr], first_row: Expr, last_row: Expr, first_piece: Expr
    ) -> None:
        """This thread's strips, each times rows first_row .. last_row; row r of y is of row source_row(r) of x.

        Most strips are shared evenly, so that each thread reads one long stream; the last go piece by piece to the
        threads that are done. The tickets of the pieces begin with `first_piece`.
        """
        k = self.k
        own_first, own_last = k.thread_share(self.fixed)
        with k.loop(0, self.pieces + 1) as turn:
            fixed, number = turn.i.compare("eq", 0), turn.i - 1
            first = k.select(fixed, own_first, number * self.piece + self.fixed)
            mine = self.tickets.holds(first_piece + number) if self.tickets else None
            last = own_last
            if mine is not None:
                last = k.select(fixed, own_last, k.select(mine, (first + self.piece).min(k.index(self.units)), first))
            following = k.index(self.units)
            if self.tickets is not None:
                piece = k.select(fixed, self.tickets.next(), self.tickets.after_next()) - first_piece
                following = piece * self.piece + self.fixed
            with k.loop(first, last) as unit:
                strips = [self.product.strip(unit.i * self.halves + h) for h in range(self.halves)]
                column, distance = unit.i * self.product.layout.rows, self.distance(unit.i, last, following)
                self.all_rows(strips, column, distance, source_row, first_row, last_row)
            if self.tickets is not None and mine is not None:
                with k.when(mine):
                    self.tickets.take()

    def distance(self, unit: Expr, last: Expr, following: Expr) -> Expr:
        """Bytes from strip `unit` to the one that this thread reads next: the one behind it, after the last of a run
        the one where the next run begins, `following`. 0 where that is not of this matrix."""
        k = self.k
        elsewhere = k.select(following.compare("lt", self.units), following - unit, k.index(0))
        strips = k.select((unit + 1).compare("lt", last), k.index(1), elsewhere)
        return strips * (self.product.strip_bytes * self.halves)

    def all_rows(
        self,
        strips: list[Buffer],
        column: Expr,
        distance: Expr,
        source_row: Callable[[Expr], Expr],
        first: Expr,
        last: Expr,
    ) -> None:
        """Tiles of rows of nearly equal size: 8 rows are two of 4, not one of 6 and one of 2. The strip that is read
        next lies `distance` bytes on."""
        k, most = self.k, self.product.tile_rows
        rows = last - first
        tiles = (rows + (most - 1)) // most
        small = rows // tiles.max(k.index(1))
        larger = rows - small * tiles  # so many tiles have a row more
        with k.loop(0, tiles) as tile:
            start = first + tile.i * small + tile.i.min(larger)
            size = k.select(tile.i.compare("lt", larger), small + 1, small)
            for count in range(1, most + 1):
                with k.when(size.compare("eq", count)):
                    self.tile(strips, column, source_row, start, count, self.ahead(tile.i, count, distance))

    def ahead(self, tile: Expr, count: int, distance: Expr) -> Ahead | None:
        """What a tile asks memory for: its part of the strip that is read next. A core drops what is asked for while
        too many lines are on their way, so the tiles of a strip share that evenly, and the one that reads a strip
        first asks a second time. A single row needs its bytes too soon for that to help. Rows of an expert in a prompt
        are more tiles; those of a dense product so many that one strip's reading counts nothing."""
        if self.gemm.few:
            again = self.k.index(LINES_AHEAD_BYTES)
            return Ahead(distance, tile % ALTERNATE, ALTERNATE, again) if count > 1 else None
        return Ahead(distance, tile % ASKING, ASKING) if self.gemm.grouped is not None else None

    def tile(
        self,
        strips: list[Buffer],
        column: Expr,
        source_row: Callable[[Expr], Expr],
        row: Expr,
        count: int,
        ahead: Ahead | None,
    ) -> None:
        """`count` rows times one strip (or pair of strips), a few vectors of columns at a time."""
        k, product = self.k, self.product
        rows = [source_row(row + i) for i in range(count)]
        together = 1 if product.one_stream else self.halves
        group = max(1, product.widest(count) // together)
        for j in range(0, product.vectors, group):
            width = min(group, product.vectors - j)
            chosen = [[(s, j + v) for v in range(width)] for s in strips]
            if together == 1:
                parts = [product.sums(k, rows, half, ahead) for half in chosen]
                sums = [[value for part in parts for value in part[i]] for i in range(count)]
            else:
                sums = product.sums(k, rows, [vector for half in chosen for vector in half], ahead)
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
        for number, op in enumerate(self.gemm.epilogue):
            match op:
                case AddOp() | MulOp():
                    other = self.extra[number]
                    values = [
                        self._combine(op, other, v, row, c, m) for v, c, m in zip(values, columns, masks, strict=True)
                    ]
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

    def _combine(
        self, op: AddOp | MulOp, buffer: Buffer, value: Expr, row: Expr, column: Expr, mask: Expr | None
    ) -> Expr:
        other = op.operands[1].type
        assert isinstance(other, TensorType)
        width = other.shape[-1]
        assert isinstance(width, int)
        at = column if other.rank == 1 else row * width + column
        loaded = buffer.load(at, LANES, mask).cast(F32)
        return value + loaded if isinstance(op, AddOp) else value * loaded
