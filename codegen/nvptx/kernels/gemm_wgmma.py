"""Matrix products of many rows on sm_90a by products of warpgroups (wgmma), weights as decoding has them.

y^T = w x^T: the weights are the left factor, which such a product takes from registers. So the bytes of
`codegen.nvptx.fragments` serve here too, in 16, 8 or 4 bits, and lie once: a lane unpacks its 16 bytes as it does for
`grid.mma`. Bulk copies bring them, counted by a barrier; one thread starts those of a stage.

x is the right factor, in shared memory with the 128-byte swizzle. Its columns must come in the order in which lanes
have those of w: of a segment of 32, pair j of piece q (8 columns) is pair q of piece j. Copies of 4 bytes put them so,
or x lies so already (`codegen.nvptx.kernels.row_tiles`) and comes by bulk copies as the weights do.

A product takes a segment and is waited for when the next but one is to be started: the matrix unit has one to go on
with while weights are unpacked. Scales multiply the weights here, in bf16, rounded once: sums of a group by themselves
would take as many registers again.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.nvptx.builder import WARP, GridKernel
from codegen.nvptx.fragments import CHUNK, SEGMENT, Fragments
from codegen.nvptx.kernels.bulk_stage import BulkStage, TileParts, group_of
from codegen.nvptx.kernels.gemm_packed import PackedGemm, PackedShape, product_kernel
from codegen.nvptx.kernels.row_tiles import GROUP, ROW_BYTES, RowTiles
from codegen.nvptx.kernels.weight_factors import left_factor
from codegen.tile_builder import Buffer, Expr
from ir.formats import BF16, F32, I32, I64, PlainFormat
from ir.ops.grid_warpgroup import WARPGROUP
from ir.types import VectorType

GROUP_TILES = WARPGROUP // WARP  # a tile of 16 rows for each warp of a warpgroup
SWIZZLED = 8  # rows until the swizzle begins again
PIECES = 4  # of 8 columns in a segment, and pairs of columns in a piece


@dataclass(frozen=True)
class WgmmaShape(PackedShape):
    """A block of warpgroups, each with 64 columns of y for all rows of the block, up to 256."""

    @classmethod
    def of(cls, rows: int) -> WgmmaShape:
        """A shape for up to `rows` rows of x: few rows take small blocks, so that there are enough of them."""
        shapes = ((32, 1, 6), (64, 1, 6), (128, 2, 5))
        return cls.with_rows(*next((shape for shape in shapes if rows <= shape[0]), (256, 2, 4)))

    @classmethod
    def with_rows(cls, rows: int, groups: int, stages: int) -> WgmmaShape:
        """`rows` (a multiple of 8) of x for each block of so many warpgroups."""
        return cls(rows, groups * GROUP_TILES, rows, 1, stages)


def gemm_wgmma_kernel(
    layout: Fragments,
    name: str,
    shape: WgmmaShape,
    out: PlainFormat = F32,
    *,
    gate_up: bool = False,
    tiled: bool = False,
) -> GridKernel:
    """A kernel (codes i32, [scales,] x bf16 [m, k], y f32 or bf16 [m, n], m) of `shape.blocks(m, layout)` blocks.

    As `gemm_packed_kernel`, for sm_90a only. `tiled`: x lies as `RowTiles(k, BF16)` says, and bulk copies bring all.
    """
    return product_kernel(TiledGemm if tiled else GroupGemm, layout, name, shape, out, gate_up=gate_up)


class GroupGemm(PackedGemm):
    """Writes the product of one block; warp w of it has tile w of the block's weights and all of its rows of x."""

    piece_bytes = 4

    def build(self) -> None:
        b, shape = self.b, self.shape
        assert isinstance(shape, WgmmaShape) and shape.rows <= 256
        stages, ahead = shape.stages, shape.stages - 2  # products with the two stages before one may go on
        assert ahead > 0
        self.places = self._places_of_rows(self.layout.k) if self.source is not None else []
        self.barriers = b.shared(stages, I64)
        with b.when(self.thread.compare("lt", stages)):
            b.init_barrier(self.barriers, self.thread)
        b.barrier()
        for stage in range(ahead):
            self._fetch(b.index_value(stage), b.index_value(stage))
        zero = b.index_value(0)
        with b.loop(0, self.layout.chunks, 1, [zero, zero, b.f32(0.0, shape.rows // 2)]) as loop:
            stage, parity, sums = loop.carried
            self._wait_for_own(ahead - 1)
            b.wait_barrier(self.barriers, stage, parity)
            b.barrier()  # this stage is there for all; products with the one to be filled are done
            sums = self._add_chunk(stage, sums)
            later = stage + ahead
            self._fetch(loop.i + ahead, b.select(later.compare("lt", stages), later, later - stages))
            last = stage.compare("eq", stages - 1)
            loop.carry(b.select(last, zero, stage + 1), b.select(last, 1 - parity, parity), sums)
        sums = b.wait_mma(loop.results[2], 0)
        self._write([b.part(sums, 4 * part, 4) for part in range(shape.rows // 8)])

    def _add_chunk(self, stage: Expr, sums: Expr) -> Expr:
        """Starts the products of a stage's two segments."""
        b, words, scales = self.b, self._words(stage, 0), self._scales(stage, 0)
        for s in range(2):
            factors = [self._left(words, scales, s, m) for m in range(2)]
            sums = b.wait_mma(sums, 1)  # the product that read these registers is done
            tile = stage * (self.shape.rows * PIECES * SEGMENT // 2)
            sums = b.group_mma(sums, b.join(*factors), self.held_x, tile, step=2 * s)
        return sums

    def _left(self, words: list[Expr], scales: Expr | None, s: int, m: int) -> Expr:
        """The 8 numbers of this lane for product m of segment s, under their scales."""
        b, layout = self.b, self.layout
        codes = left_factor(b, layout, words, s, m)
        if scales is None:
            return codes
        wide = [scales.extract(half * layout.groups_of_unit + s % layout.groups_of_unit) for half in range(2)]
        high = [x.cast(BF16) for x in wide]
        low = [(x - top.cast(F32)).cast(BF16) for x, top in zip(wide, high, strict=True)]
        first, second = (b.join(*(pair[row] for row in (0, 0, 1, 1, 0, 0, 1, 1))) for pair in (high, low))
        zero = b.constant(VectorType(4, I32), 0).bitcast(codes.type)
        return b.fma_pairs(codes, first, b.fma_pairs(codes, second, zero))

    # -- copies

    def _wait_for_own(self, pending: int) -> None:
        """For the copies that this thread has started; products may read them after the next barrier."""
        self.b.async_wait(pending)
        self.b.fence_async()

    def _fetch_rows(self, chunk: Expr, stage: Expr, there: Expr) -> None:
        """Rows of x, a warp one after the other: the places of all but the first are known numbers behind it."""
        b, shape, k = self.b, self.shape, self.layout.k
        step = b.threads // self.pieces  # rows that the block copies at once
        row, piece = self.thread // self.pieces, self.thread % self.pieces
        column = chunk * CHUNK + piece * self.piece
        if self.layout.ragged:
            there = there & column.compare("lt", k)
        left, first = self.m - self.row - row, (self.row + row) * k + column
        turns = max(1, SWIZZLED // step)  # rows of a warp until the swizzle begins again
        places = [self._place(stage, row + turn * step, piece) for turn in range(turns)]
        for number in range(shape.rows // step):
            again, turn = divmod(number, turns)
            at = places[turn] + again * turns * step * CHUNK
            source = first + number * step * k if self.source is None else self.places[number] + column
            b.async_copy(self.held_x, at, self.x, source, there & left.compare("gt", number * step), self.piece_bytes)

    def _place(self, stage: Expr, row: Expr, piece: Expr) -> Expr:
        """Where pair `piece` of a row of x goes: into the order of the weights' columns, and swizzled."""
        segment, q, j = piece // (PIECES * PIECES), piece // PIECES % PIECES, piece % PIECES
        at = self.b.xor(segment * PIECES + j, row % SWIZZLED) * PIECES + q
        return ((stage * self.shape.rows + row) * self.pieces + at) * self.piece

    def _fetch_tiles(
        self, held: Buffer, source: Buffer, size: int, piece: int, units: int, unit: Expr, stage: Expr, there: Expr
    ) -> None:
        """Codes by bulk copies; scales, which are few, as elsewhere. Tiles behind the last one are not stored."""
        if held is not self.held_codes:
            super()._fetch_tiles(held, source, size, piece, units, unit, stage, there)
            return
        b, tiles = self.b, self.shape.tiles
        with b.when(there & self.thread.compare("eq", 0)):
            b.expect_bytes(self.barriers, stage, tiles * size * held.element.dtype.itemsize)
            for t in range(tiles):
                tile = (self.tile + t).min(self.layout.tiles - 1)
                first = (tile * units + unit) * size
                b.bulk_copy(held, (stage * tiles + t) * size, source, first, size, self.barriers, stage)


class TiledGemm(GroupGemm):
    """As `GroupGemm`; weights, their scales and x come by bulk copies that the stage's barrier counts."""

    def _wait_for_own(self, pending: int) -> None:
        """No thread copies anything itself."""

    def _fetch(self, chunk: Expr, stage: Expr) -> None:
        b, shape, layout = self.b, self.shape, self.layout
        assert self.source is None, "rows that are gathered are no tiles"
        tiles, each = RowTiles(layout.k, BF16), layout.chunks_of_unit
        parts = [TileParts(self.held_codes, self.codes, self.code_words, layout.chunks, 1, 1)]
        if self.scales is not None and self.held_scales is not None:
            parts.append(TileParts(self.held_scales, self.scales, self.scale_count, layout.chunks // each, each, 1))
        bulk = BulkStage(b, self.barriers, 1, chunk, stage)
        with b.when(chunk.compare("lt", layout.chunks)):
            with b.when(self.thread.compare("eq", 0)):
                nbytes = shape.tiles * sum(of.nbytes for of in parts) + shape.rows * ROW_BYTES
                b.expect_bytes(self.barriers, stage, nbytes)
            with b.when(self.thread.compare("lt", shape.tiles)):
                tile = (self.tile + self.thread).min(layout.tiles - 1)
                for of in parts:
                    bulk.tile(of, stage * shape.tiles + self.thread, tile)
            with b.when(self.thread.compare("lt", shape.rows // GROUP)):
                group = group_of(self.row, self.thread, self.m)
                bulk.rows(self.held_x, stage * (shape.rows // GROUP) + self.thread, self.x, tiles, group, self.m)
