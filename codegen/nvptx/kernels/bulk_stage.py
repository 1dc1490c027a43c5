"""What bulk copies bring for a stage of a product of warpgroups: weights and their scales by tiles, rows by eights."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.kernels.row_tiles import GROUP, GROUP_BYTES, RowTiles, row_groups
from codegen.tile_builder import Buffer, Expr


@dataclass(frozen=True)
class TileParts:
    """Codes or scales of tiles: `units` of `size` elements a tile, each for `each` chunks; a stage takes `parts`."""

    held: Buffer
    source: Buffer
    size: int
    units: int
    each: int
    parts: int

    @property
    def nbytes(self) -> int:
        """Of a tile in a stage."""
        return self.parts * self.size * self.held.element.dtype.itemsize


@dataclass(frozen=True)
class BulkStage:
    """Copies into `stage` of what stage number `number` of the row has, counted by the stage's barrier; a stage has
    `chunks` chunks of 64 columns of the weights."""

    b: GridBuilder
    barriers: Buffer
    chunks: int
    number: Expr
    stage: Expr

    def tile(self, of: TileParts, at: Expr, tile: Expr) -> None:
        """What a tile has for the stage, to place `at` of the tiles. Where the row ends within the stage its last chunk
        comes twice: x is 0 there."""
        size = of.size
        first, slot = tile * of.units, at * (self.chunks * size)
        if of.parts == 1:
            self._copy(of, slot, (first + self.number * self.chunks // of.each) * size, size)
        elif of.each == 1 and of.units % self.chunks == 0:
            self._copy(of, slot, (first + self.number * self.chunks) * size, self.chunks * size)
        else:
            for part in range(of.parts):
                unit = (self.number * self.chunks + part) // of.each
                self._copy(of, slot + part * size, (first + unit.min(of.units - 1)) * size, size)

    def _copy(self, of: TileParts, slot: Expr, source: Expr, size: int) -> None:
        self.b.bulk_copy(of.held, slot, of.source, source, size, self.barriers, self.stage)

    def rows(self, held: Buffer, at: Expr, x: Buffer, tiles: RowTiles, group: Expr, m: Expr) -> None:
        """8 rows of x to place `at` of these."""
        item = tiles.element.dtype.itemsize
        size, source = GROUP_BYTES // item, tiles.first(self.number, group, m) // item
        self.b.bulk_copy(held, at * size, x, source, size, self.barriers, self.stage)


def group_of(row: Expr, thread: Expr, m: Expr) -> Expr:
    """The eight of rows that a thread copies of a block whose first row is `row`; the last one behind them."""
    return (row // GROUP + thread).min(row_groups(m) - 1)
