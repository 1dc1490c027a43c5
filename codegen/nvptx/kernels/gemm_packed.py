"""Matrix products of many rows with weights as decoding has them: y[m, n] = x[m, k] w[n, k], w in 16, 8 or 4 bits.

The weights lie once, in the order of `codegen.nvptx.fragments`, for this kernel and for that of a few rows. They are
the left factor of the matrix unit: a lane copies the 16 bytes it wants into shared memory some stages ahead, turns
them into bf16 in registers (`codegen.nvptx.kernels.weight_factors`) and multiplies them with 8 rows of x at a time.
Scales multiply the f32 sum of their group. A row's pieces of x are stored so that two rows that are read together lie
in different banks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.fragments import CHUNK, SEGMENT, TILE, Fragments
from codegen.nvptx.kernels.gate import check_gate_up, gated
from codegen.nvptx.kernels.weight_factors import add_scaled, left_factor
from codegen.tile_builder import Buffer, Expr
from ir.formats import BF16, F32, I32, PlainFormat

ROWS = 8  # of x that one product of the matrix unit takes
PIECE_BYTES = 16  # of a copy


@dataclass(frozen=True)
class PackedShape:
    """A block's rows of x and tiles of 16 columns of y, cut into warps, and how many chunks are in shared memory."""

    rows: int = 128
    tiles: int = 8
    warp_rows: int = 64
    warp_tiles: int = 2
    stages: int = 3

    @classmethod
    def of(cls, rows: int) -> PackedShape:
        """A shape for up to `rows` rows of x: smaller tiles where few rows would leave a block idle."""
        return cls() if rows > 64 else cls(64, 4, 32, 2, 4) if rows > 32 else cls(32, 4, 32, 1, 5)

    @property
    def threads(self) -> int:
        return (self.rows // self.warp_rows) * (self.tiles // self.warp_tiles) * WARP

    def blocks(self, m: int, layout: Fragments) -> int:
        """Blocks of the launch for m rows."""
        return -(-m // self.rows) * -(-layout.tiles // self.tiles)


@dataclass(frozen=True)
class PackedTile:
    """What a block makes of y: rows from `row` to `end`, columns of the weights' tiles from `tile` on.

    Row r of y is made of row `source(r)` of x, of row r without it.
    """

    row: Expr
    end: Expr
    tile: Expr
    source: Callable[[Expr], Expr] | None = None


def gemm_packed_kernel(
    layout: Fragments,
    name: str,
    shape: PackedShape = PackedShape(),
    out: PlainFormat = F32,
    *,
    gate_up: bool = False,
) -> GridKernel:
    """A kernel (codes i32, [scales,] x bf16 [m, k], y f32 or bf16 [m, n], m) of `shape.blocks(m, layout)` blocks.

    With `gate_up` rows of w are in turns (`codegen.nvptx.kernels.gate`) and y [m, n / 2] is silu(gate) * up.
    """
    return product_kernel(PackedGemm, layout, name, shape, out, gate_up=gate_up)


def product_kernel(
    kind: type[PackedGemm], layout: Fragments, name: str, shape: PackedShape, out: PlainFormat, *, gate_up: bool
) -> GridKernel:
    """A kernel of blocks that `kind` writes, with the arguments of `gemm_packed_kernel`."""
    b = GridBuilder(name, shape.threads)
    codes = b.buffer("codes", I32)
    scales = b.buffer("scales", layout.scale_element) if layout.group else None
    x, y, m = b.buffer("x", BF16), b.buffer("y", out), b.size("rows")
    block, down = b.block_id(), (m + (shape.rows - 1)) // shape.rows
    tile = PackedTile(block % down * shape.rows, m, block // down * shape.tiles)
    kind(b, shape, layout, (codes, scales), (x, y), tile, gate_up).build()
    return b.grid_kernel()


class PackedGemm:
    """Writes the product of one block, as lane 4g + q of a warp sees it. Copies of x have `piece_bytes`."""

    element = BF16
    piece_bytes = PIECE_BYTES
    chunks = 1  # of a stage

    def __init__(
        self,
        b: GridBuilder,
        shape: PackedShape,
        layout: Fragments,
        weights: tuple[Buffer, Buffer | None],
        numbers: tuple[Buffer, Buffer],
        tile: PackedTile,
        gate_up: bool = False,
    ) -> None:
        assert shape.warp_rows % ROWS == 0 and shape.rows % shape.warp_rows == 0 and shape.stages >= 2
        assert shape.tiles % shape.warp_tiles == 0
        if gate_up:
            check_gate_up(layout.n)
        self.b, self.shape, self.layout, self.gate_up = b, shape, layout, gate_up
        (self.codes, self.scales), (self.x, self.y) = weights, numbers
        self.row, self.m, self.tile = tile.row, tile.end, tile.tile
        self.code_words = layout.loads * WARP * 4  # of a tile and chunk
        self.scale_count = 8 * 2 * layout.groups_of_unit if layout.group else 0  # of a tile and unit
        stages = shape.stages
        self.piece = self.piece_bytes // self.element.dtype.itemsize  # elements of x in a copy
        self.pieces = CHUNK * self.chunks // self.piece
        held = stages * shape.tiles * self.chunks  # chunks of tiles in shared memory
        self.held_x = b.shared(stages * shape.rows * CHUNK * self.chunks, self.element)
        self.held_codes = b.shared(held * self.code_words, I32)
        self.held_scales = b.shared(held * self.scale_count, layout.scale_element) if self.holds_scales else None
        self.thread = b.thread_id()
        self.lane, warp = b.lane_and_warp()
        across = shape.tiles // shape.warp_tiles
        self.warp_row, self.warp_tile = warp // across * shape.warp_rows, warp % across * shape.warp_tiles
        self.source = tile.source

    @property
    def holds_scales(self) -> bool:
        """Whether scales of weights come to shared memory."""
        return self.layout.group > 0

    def _places_of_rows(self, width: int) -> list[Expr]:
        """Where the rows of x begin that this thread copies pieces of: looked up once, before the loop."""
        shared = self._share(self.shape.rows * self.pieces)
        return [self.row_of_x(self.row + number // self.pieces) * width for number, _ in shared]

    def row_of_x(self, row: Expr) -> Expr:
        """What a row of y is made of; of the last one for rows behind it."""
        return row if self.source is None else self.source(row.min(self.m - 1))

    def build(self) -> None:
        b, shape = self.b, self.shape
        self.places = self._places_of_rows(self.layout.k)
        for stage in range(shape.stages - 1):
            self._fetch(b.index(stage), b.index(stage))
        sums = [b.f32(0.0, 4) for _ in range(shape.warp_tiles * shape.warp_rows // ROWS)]
        zero = b.index_value(0)
        with b.loop(0, self.layout.chunks, 1, [zero, *sums]) as loop:
            stage, *sums = loop.carried
            b.async_wait(shape.stages - 2)
            b.barrier()  # this stage is there for all; the one before it has been read by all
            before = b.select(stage.compare("eq", 0), b.index_value(shape.stages - 1), stage - 1)
            self._fetch(loop.i + (shape.stages - 1), before)
            sums = self._multiply(loop.i, stage, sums)
            loop.carry(b.select(stage.compare("eq", shape.stages - 1), zero, stage + 1), *sums)
        self._write(loop.results[1:])

    # -- copies

    def _share(self, count: int) -> Iterator[tuple[Expr, Expr | None]]:
        """This thread's numbers below `count`, each with a condition where not all threads have one."""
        for first in range(0, count, self.b.threads):
            number = self.thread + first
            yield number, number.compare("lt", count) if count - first < self.b.threads else None

    def _copy(self, held: Buffer, at: Expr, source: Buffer, source_at: Expr, inside: Expr, here: Expr | None) -> None:
        if here is None:
            self.b.async_copy(held, at, source, source_at, inside)
            return
        with self.b.when(here):
            self.b.async_copy(held, at, source, source_at, inside)

    def _fetch(self, chunk: Expr, stage: Expr) -> None:
        """Starts the copies of a chunk into a stage; zeros where x and w end."""
        b, layout = self.b, self.layout
        there = chunk.compare("lt", layout.chunks)
        self._fetch_rows(chunk, stage, there)
        self._fetch_tiles(self.held_codes, self.codes, self.code_words, 4, layout.chunks, chunk, stage, there)
        if self.scales is not None and self.held_scales is not None:
            units = layout.chunks // layout.chunks_of_unit
            unit, piece = chunk // layout.chunks_of_unit, PIECE_BYTES // layout.scale_element.dtype.itemsize
            self._fetch_tiles(self.held_scales, self.scales, self.scale_count, piece, units, unit, stage, there)
        self._fetch_more(chunk, stage, there)
        b.async_commit()

    def _fetch_rows(self, chunk: Expr, stage: Expr, there: Expr) -> None:
        """The block's rows of x."""
        shape, layout = self.shape, self.layout
        for (number, here), first in zip(self._share(shape.rows * self.pieces), self.places, strict=True):
            row, piece = number // self.pieces, number % self.pieces
            column = chunk * CHUNK + piece * self.piece
            inside = there & (self.row + row).compare("lt", self.m)
            if layout.ragged:
                inside = inside & column.compare("lt", layout.k)
            self._copy(self.held_x, self._place(stage, row, piece), self.x, first + column, inside, here)

    def _fetch_more(self, chunk: Expr, stage: Expr, there: Expr) -> None:
        """What x has besides its numbers: nothing."""

    def _fetch_tiles(
        self, held: Buffer, source: Buffer, size: int, piece: int, units: int, unit: Expr, stage: Expr, there: Expr
    ) -> None:
        """`size` elements of each of the block's tiles in pieces of 16 bytes; a tile has `units` times as many."""
        shape, pieces = self.shape, size // piece
        for number, here in self._share(shape.tiles * pieces):
            tile, at = self.tile + number // pieces, number % pieces * piece
            inside = there & tile.compare("lt", self.layout.tiles)
            first = (tile * units + unit) * size
            self._copy(held, (stage * (shape.tiles * pieces) + number) * piece, source, first + at, inside, here)

    def _place(self, stage: Expr, row: Expr, piece: Expr) -> Expr:
        """Lanes read four pieces of each of two rows at once: halves of the banks that neighbours do not share."""
        return ((stage * self.shape.rows + row) * self.pieces + self.b.xor(piece, row % 2 * 4)) * self.piece

    # -- products

    def _multiply(self, chunk: Expr, stage: Expr, sums: list[Expr]) -> list[Expr]:
        """The warp's sums with a chunk, which lies in a stage. Of a segment its tiles' factors first, then 8 rows of x
        after the other.

        Scales are applied to the sum of each segment, also where wider groups share one: few registers are live so.
        """
        b, shape = self.b, self.shape
        tiles = [self._words(stage, t) for t in range(shape.warp_tiles)]
        scales = [self._scales(stage, t) for t in range(shape.warp_tiles)]
        made = list(sums)
        for s in range(2):
            factors = [[left_factor(b, self.layout, words, s, m) for m in range(2)] for words in tiles]
            for part in range(shape.warp_rows // ROWS):
                row = self.warp_row + part * ROWS + self.lane // 4
                x = self.held_x.load(self._place(stage, row, self.lane % 4 + s * (SEGMENT // self.piece)), self.piece)
                for t in range(shape.warp_tiles):
                    at = part * shape.warp_tiles + t
                    made[at] = self._add_segment(factors[t], scales[t], s, x, made[at])
        return made

    def _words(self, stage: Expr, t: int) -> list[Expr]:
        """The words of this lane for a chunk of a tile."""
        first = (stage * self.shape.tiles + self.warp_tile + t) * self.code_words + self.lane * 4
        return [self.held_codes.load(first + load * WARP * 4, 4) for load in range(self.layout.loads)]

    def _scales(self, stage: Expr, t: int) -> Expr | None:
        """Of rows g and g + 8 by group, f32."""
        if self.held_scales is None:
            return None
        lanes = 2 * self.layout.groups_of_unit
        at = (stage * self.shape.tiles + self.warp_tile + t) * self.scale_count + self.lane // 4 * lanes
        return self.held_scales.load(at, lanes).cast(F32)

    def _add_segment(self, factors: list[Expr], scale: Expr | None, s: int, x: Expr, total: Expr) -> Expr:
        b, layout = self.b, self.layout
        partial = total if scale is None else b.f32(0.0, 4)
        for m in range(2):
            partial = b.mma(partial, factors[m], b.part(x, 4 * m, 4))
        return partial if scale is None else add_scaled(b, layout, total, partial, scale, s % layout.groups_of_unit)

    def _write(self, sums: list[Expr]) -> None:
        """Stores what lies inside of y: elements 0 and 1 are two rows of y at column g, 2 and 3 at g + 8."""
        b, shape = self.b, self.shape
        for number, total in enumerate(sums):
            part, t = divmod(number, shape.warp_tiles)
            first = self.row + self.warp_row + part * ROWS + self.lane % 4 * 2
            tile = self.tile + self.warp_tile + t
            if self.gate_up:
                total = gated(b, b.part(total, 0, 2), b.part(total, 2, 2))
            each = TILE // 2 if self.gate_up else TILE
            width = self.layout.n * each // TILE
            for element in range(2 * each // ROWS):
                row, column = first + element % 2, tile * each + self.lane // 4 + element // 2 * 8
                with b.when(row.compare("lt", self.m) & column.compare("lt", width)):
                    self.y.store(row * width + column, total.extract(element).cast(self.y.element))
