"""Products of warpgroups (wgmma, sm_90a) on bytes: int8 with weights of 8 or 4 bits, f8e4m3 with f8e4m3.

y^T = w x^T as in `codegen.nvptx.kernels.gemm_wgmma`: a lane turns the weights' bytes, which lie as decoding has them,
into the left factor in its registers. x lies as `codegen.nvptx.kernels.row_tiles` says, so that nothing of it is moved
between words any more: for dense products weights, x and both scales come by bulk copies that one barrier a stage
counts. Rows that are gathered come by copies of 16 bytes.

A stage has 128 columns. Sums over the columns that share their scales (32, 64, or all 128) begin anew, with half of the
block's rows, and are taken over under the scales into sums in f32; the matrix unit has the next product to go on with
meanwhile. Scales of whole rows multiply at the end. For f8e4m3 this is also what keeps the digits: the matrix
unit adds with about 14 bits, so sums of more than 128 columns are not left to it (DeepSeek-V3, arXiv:2412.19437,
3.3.2).
"""

from __future__ import annotations

from codegen.nvptx.builder import GridBuilder, GridKernel
from codegen.nvptx.fragments import CHUNK, SEGMENT, TILE, Fragments
from codegen.nvptx.kernels.bulk_stage import BulkStage, TileParts, group_of
from codegen.nvptx.kernels.gemm_packed import PackedGemm, PackedTile
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape
from codegen.nvptx.kernels.int8 import ActivationScales, check_int8, element_of_x
from codegen.nvptx.kernels.row_tiles import GROUP, PIECE_BYTES, ROW_BYTES, RowTiles
from codegen.nvptx.kernels.weight_factors import as_bytes, int8_words
from codegen.tile_builder import Buffer, Expr
from ir.formats import F32, I32, I64, PlainFormat
from ir.types import VectorType

STAGE = ROW_BYTES  # columns
ROWS = 8  # of x in a part of the sums
_QUAD = 4  # scales of a row that are copied together


class BytesShape(WgmmaShape):
    """Up to 128 rows: sums of a group are beside those of all groups. Rows are a multiple of 16."""

    @classmethod
    def of(cls, rows: int) -> BytesShape:
        """A shape for up to `rows` rows of x."""
        shapes = ((32, 1, 5), (64, 1, 5))
        return cls.with_rows(*next((shape for shape in shapes if rows <= shape[0]), (128, 2, 4)))

    @classmethod
    def with_rows(cls, rows: int, groups: int, stages: int) -> BytesShape:
        made = super().with_rows(rows, groups, stages)
        return cls(made.rows, made.tiles, made.warp_rows, made.warp_tiles, made.stages)


def row_tiles(layout: Fragments, x_scales: ActivationScales) -> RowTiles:
    """Where rows of 8 bits lie for a product with such weights."""
    return RowTiles(layout.k, element_of_x(layout), x_scales.by_row, layout.bits == 4)


def wgmma_bytes_kernel(
    layout: Fragments,
    x_scales: ActivationScales,
    name: str,
    shape: BytesShape,
    out: PlainFormat = F32,
    *,
    gate_up: bool = False,
) -> GridKernel:
    """A kernel (codes i32, scales, x i8 or f8e4m3 as `row_tiles` says, x_scales f32, y f32 or bf16 [m, n], m) for any
    m, for sm_90a only. `x_scales` has rows by eights. It is launched with `shape.blocks(m, layout)` blocks.
    """
    check_int8(layout)
    b = GridBuilder(name, shape.threads)
    codes, scales = b.buffer("codes", I32), b.buffer("scales", layout.scale_element)
    x, held = b.buffer("x", element_of_x(layout)), b.buffer("xs", F32)
    y, m = b.buffer("y", out), b.size("rows")
    block, down = b.block_id(), (m + (shape.rows - 1)) // shape.rows
    tile = PackedTile(block % down * shape.rows, m, block // down * shape.tiles)
    product = GroupBytes(b, shape, layout, (codes, scales), (x, y), tile, gate_up)
    product.with_scales(x_scales, held).build()
    return b.grid_kernel()


class GroupBytes(PackedGemm):
    """Writes the product of one block; warp w of it has tile w of the block's weights and all of its rows of x."""

    chunks = STAGE // CHUNK
    x_scales: ActivationScales
    of_x: Buffer

    @property
    def element(self) -> PlainFormat:
        return element_of_x(self.layout)

    @property
    def holds_scales(self) -> bool:
        return self.layout.group < self.layout.columns

    def with_scales(self, x_scales: ActivationScales, of_x: Buffer) -> GroupBytes:
        """With the scales of x, before `build`."""
        layout, shape = self.layout, self.shape
        assert isinstance(shape, BytesShape) and shape.rows % 16 == 0 and self.scales is not None
        assert x_scales.by_row or x_scales.rows == GROUP
        self.x_scales, self.of_x = x_scales, of_x
        self.tiled = row_tiles(layout, x_scales)
        # columns that share a scale within a stage, 0 where the whole row does
        self.w_columns = _shared_columns(layout.group) if self.holds_scales else 0
        self.x_columns = _shared_columns(x_scales.group) if x_scales.group else 0
        self.unit = min(self.w_columns or STAGE, self.x_columns or STAGE)
        each = _QUAD if x_scales.by_row else STAGE // (self.x_columns or STAGE)
        self.held_of_x = self.b.shared(shape.stages * shape.rows * each, F32) if self.x_columns else None
        return self

    def build(self) -> None:
        b, shape = self.b, self.shape
        stages, gathered = shape.stages, self.x_scales.by_row
        assert stages >= 2
        self.places = self._places_of_rows(self.tiled.padded) if gathered else []
        self.scale_places = []
        if gathered and self.x_columns:
            shared = self._share(shape.rows)
            self.scale_places = [self.row_of_x(self.row + number) * self.x_scales.row for number, _ in shared]
        self.barriers = b.shared(stages, I64)
        with b.when(self.thread.compare("lt", stages)):
            b.init_barrier(self.barriers, self.thread)
        b.barrier()
        for stage in range(stages - 1):
            self._fetch(b.index_value(stage), b.index_value(stage))
        zero = b.index_value(0)
        with b.loop(0, self.tiled.pieces, 1, [zero, zero, *self._zeros()]) as loop:
            stage, parity, *sums = loop.carried
            if gathered:
                b.async_wait(stages - 2)
                b.fence_async()
            b.wait_barrier(self.barriers, stage, parity)
            b.barrier()  # this stage is there for all; the one before it has been read by all
            before = b.select(stage.compare("eq", 0), b.index_value(stages - 1), stage - 1)
            self._fetch(loop.i + (stages - 1), before)
            sums = self._multiply(loop.i, stage, sums)
            last = stage.compare("eq", stages - 1)
            loop.carry(b.select(last, zero, stage + 1), b.select(last, 1 - parity, parity), *sums)
        self._write(self._scaled(loop.results[2:]))

    def _zeros(self) -> list[Expr]:
        return [self.b.f32(0.0, 4) for _ in range(self.shape.rows // ROWS)]

    # -- copies

    def _fetch(self, chunk: Expr, stage: Expr) -> None:
        """Starts the copies of a stage, number `chunk` of the row's."""
        b, shape, layout = self.b, self.shape, self.layout
        there = chunk.compare("lt", self.tiled.pieces)
        bulk, parts = BulkStage(b, self.barriers, self.chunks, chunk, stage), self._tile_parts()
        with b.when(there):
            with b.when(self.thread.compare("eq", 0)):
                nbytes = shape.tiles * sum(of.nbytes for of in parts)
                b.expect_bytes(self.barriers, stage, nbytes + (0 if self.x_scales.by_row else self._row_bytes()))
            with b.when(self.thread.compare("lt", shape.tiles)):
                tile = (self.tile + self.thread).min(layout.tiles - 1)
                for of in parts:
                    bulk.tile(of, stage * shape.tiles + self.thread, tile)
            if not self.x_scales.by_row:
                with b.when(self.thread.compare("lt", shape.rows // GROUP)):
                    self._fetch_groups(bulk)
        if self.x_scales.by_row:
            self._fetch_rows(chunk, stage, there)
            b.async_commit()

    def _tile_parts(self) -> list[TileParts]:
        """Codes of a tile, and scales where columns of a stage share some."""
        layout, each = self.layout, self.layout.chunks_of_unit
        made = [TileParts(self.held_codes, self.codes, self.code_words, layout.chunks, 1, self.chunks)]
        if self.scales is not None and self.held_scales is not None:
            units = layout.chunks // each
            made.append(TileParts(self.held_scales, self.scales, self.scale_count, units, each, self._scale_units()))
        return made

    def _row_bytes(self) -> int:
        """Of the block's rows of x and their scales in a stage."""
        return self.shape.rows * (ROW_BYTES + (4 * STAGE // self.x_columns if self.x_columns else 0))

    def _scale_units(self) -> int:
        """Units of the weights' scales in a stage: one where groups are whole stages."""
        return 1 if self.w_columns == STAGE else self.chunks

    def _fetch_groups(self, bulk: BulkStage) -> None:
        """8 of the block's rows of x, and their scales, for each of some threads."""
        rows, group = self.shape.rows, group_of(self.row, self.thread, self.m)
        bulk.rows(self.held_x, bulk.stage * (rows // GROUP) + self.thread, self.x, self.tiled, group, self.m)
        if self.held_of_x is not None:
            units = self._x_units(bulk.number)
            for u, unit in enumerate(units):
                at = (bulk.stage * len(units) + u) * rows + self.thread * GROUP
                place = self.x_scales.place(unit, group * GROUP, self.m)
                self.b.bulk_copy(self.held_of_x, at, self.of_x, place, GROUP, self.barriers, bulk.stage)

    def _fetch_rows(self, chunk: Expr, stage: Expr, there: Expr) -> None:
        """Rows that are gathered, by 16 bytes; and four of their scales, which hold those of a stage."""
        b, shape = self.b, self.shape
        for (number, here), first in zip(self._share(shape.rows * self.pieces), self.places, strict=True):
            row, piece = number // self.pieces, number % self.pieces
            inside = there & (self.row + row).compare("lt", self.m)
            at = (stage * shape.rows + row) * ROW_BYTES + b.xor(piece, row % GROUP) * PIECE_BYTES
            source = first + chunk * ROW_BYTES + piece * PIECE_BYTES
            self._copy(self.held_x, at, self.x, source, inside, here)
        if self.held_of_x is None:
            return
        quad = self._x_units(chunk)[0] // _QUAD * _QUAD
        for (number, here), first in zip(self._share(shape.rows), self.scale_places, strict=True):
            inside = there & (self.row + number).compare("lt", self.m)
            at = (stage * shape.rows + number) * _QUAD
            self._copy(self.held_of_x, at, self.of_x, first + quad, inside, here)

    def _x_units(self, chunk: Expr) -> list[Expr]:
        """The groups of x in a stage; where the row has none, the last one."""
        count, group = STAGE // self.x_columns, self.x_scales.group
        if self.x_columns == STAGE:
            return [chunk // (group // STAGE)]
        each = group // self.x_columns
        return [((chunk * count + u) // each).min(self.x_scales.groups - 1) for u in range(count)]

    # -- products

    def _multiply(self, chunk: Expr, stage: Expr, sums: list[Expr]) -> list[Expr]:
        """Products of a stage, with half of the rows each; one is taken over while the next goes on."""
        b, shape, layout = self.b, self.shape, self.layout
        half, segments, units = shape.rows // 2, self.unit // SEGMENT, STAGE // self.unit
        words = [self._words_of(stage, c) for c in range(self.chunks)]
        codes = [w for s in range(2 * self.chunks) for w in int8_words(b, layout, words[s // 2], s % 2)]
        each = len(codes) // units
        lefts = [as_bytes(b, layout, codes[u * each : (u + 1) * each]) for u in range(units)]
        made, before = list(sums), None
        self.under_w: list[Expr] = []
        for side in range(2):
            tile = (stage * shape.rows + side * half) * ROW_BYTES
            for u, left in enumerate(lefts):
                zero = b.f32(0.0, half // 2) if layout.fp8 else b.constant(VectorType(half // 2, I32), 0)
                product = b.group_mma(zero, left, self.held_x, tile, step=u * segments)
                if before is not None:
                    self._take(made, chunk, stage, before, 1)
                before = (product, u, side)
        assert before is not None
        self._take(made, chunk, stage, before, 0)
        return made

    def _take(self, sums: list[Expr], chunk: Expr, stage: Expr, product: tuple[Expr, int, int], pending: int) -> None:
        """Adds a product under the scales of its groups to its sums. Where a group of x has several of w, what these
        add up to under their own scales is added under that of x."""
        b = self.b
        started, unit, side = product
        end = (unit + 1) * self.unit  # columns of the stage that are done behind it
        of_x = not self.x_columns or end % self.x_columns == 0  # whether it ends a group of x
        x_scales = self._x_scales(chunk, stage, unit, side) if of_x else []
        scale = self._w_scales(stage, unit) if self.w_columns else None
        apart = self.w_columns and self.x_columns > self.unit
        done = b.wait_mma(started, pending)
        count = self.shape.rows // 2 // ROWS
        exact = [b.part(done, 4 * part, 4).cast(F32) for part in range(count)]
        if apart and scale is not None:
            first = unit * self.unit % self.x_columns == 0
            under = [
                n * scale if first else b.fma(n, scale, t) for n, t in zip(exact, self.under_w or exact, strict=True)
            ]
            self.under_w = exact = under
            if not of_x:
                return
        for part, number in enumerate(exact):
            at = side * count + part
            factors = [*([scale] if scale is not None and not apart else []), *(x_scales[part : part + 1])]
            if len(factors) == 2:
                factors = [factors[0] * factors[1]]
            sums[at] = b.fma(number, factors[0], sums[at]) if factors else sums[at] + number

    def _words_of(self, stage: Expr, chunk: int) -> list[Expr]:
        """The words of this lane for a chunk of a stage."""
        tile = (stage * self.shape.tiles + self.warp_tile) * self.chunks + chunk
        first = tile * self.code_words + self.lane * 4
        return [self.held_codes.load(first + load * 128, 4) for load in range(self.layout.loads)]

    def _w_scales(self, stage: Expr, unit: int) -> Expr:
        """Of rows g and g + 8, as a part of the sums has them."""
        assert self.held_scales is not None
        column = unit * self.unit
        part = column // CHUNK if self._scale_units() > 1 else 0
        groups = self.layout.groups_of_unit
        tile = (stage * self.shape.tiles + self.warp_tile) * self.chunks * self.scale_count
        at = tile + part * self.scale_count + self.lane // 4 * (2 * groups)
        both = self.held_scales.load(at, 2 * groups).cast(F32)
        group = column // SEGMENT % groups
        return _rows(self.b, both.extract(group), both.extract(groups + group))

    def _x_scales(self, chunk: Expr, stage: Expr, unit: int, side: int) -> list[Expr]:
        """Of rows 2q and 2q + 1 of each part of a half, twice; none where whole rows share one."""
        if self.held_of_x is None:
            return []
        b, rows, made = self.b, self.shape.rows, []
        units = self._x_units(chunk)
        u = unit * self.unit // self.x_columns
        for part in range(rows // 2 // ROWS):
            row = side * (rows // 2) + part * ROWS + self.lane % 4 * 2
            if self.x_scales.by_row:
                first = stage * rows + row
                low, high = (self.held_of_x.load((first + r) * _QUAD + units[u] % _QUAD) for r in range(2))
                made.append(b.join(low, high, low, high))
            else:
                both = self.held_of_x.load((stage * len(units) + u) * rows + row, 2)
                made.append(b.join(both, both))
        return made

    def _scaled(self, sums: list[Expr]) -> list[Expr]:
        """The sums under the scales of whole rows."""
        made = list(sums)
        if not self.w_columns and self.scales is not None:
            tile = (self.tile + self.warp_tile).min(self.layout.tiles - 1)
            both = self.scales.load(tile * TILE + self.lane // 4 * 2, 2).cast(F32)
            scale = _rows(self.b, both.extract(0), both.extract(1))
            made = [total * scale for total in made]
        if not self.x_columns:
            made = [total * self._of_whole_rows(part) for part, total in enumerate(made)]
        return made

    def _of_whole_rows(self, part: int) -> Expr:
        """Scales of rows 2q and 2q + 1 of a part, twice; of the last ones behind them."""
        b, row = self.b, self.row + part * ROWS + self.lane % 4 * 2
        if not self.x_scales.by_row:
            both = self.of_x.load(row.min(self.x_scales.stride(self.m) - 2), 2)
            return b.join(both, both)
        rows = [self.row_of_x((row + i).min(self.m - 1)) for i in range(2)]
        low, high = (self.of_x.load(row * self.x_scales.row) for row in rows)
        return b.join(low, high, low, high)


def _shared_columns(group: int) -> int:
    """Columns of a stage that share a scale, where `group` do: all, or a chunk or segment."""
    return STAGE if group % STAGE == 0 else CHUNK if group % CHUNK == 0 else SEGMENT


def _rows(b: GridBuilder, low: Expr, high: Expr) -> Expr:
    return b.join(low, low, high, high)
