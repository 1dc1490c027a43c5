"""Where rows of x lie for products of warpgroups: in the order of the weights' columns, and as bulk copies want them.

A row is cut into pieces of 128 bytes (64 columns of bf16, 128 of 8 bits), the last one filled up with zeros. Of each 32
columns lane q of a product has columns 8q .. 8q + 7 of the weights (`codegen.nvptx.fragments`), 4 bytes in each of the
steps that it takes; so word j of these is stored as word q of the j-th 16 bytes.

for dense products   [pieces][rows / 8, rounded up][8][128 bytes] with the 128-byte swizzle: 8 rows are one bulk copy,
                     and those of a block are neighbours; rows behind the last one are some row again
for rows that are    [rows][pieces][128 bytes]; whoever copies 16 bytes puts them where the swizzle wants them
gathered
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.fragments import SEGMENT, STEP
from codegen.tile_builder import Buffer, Expr
from ir.formats import I32, PlainFormat
from ir.ops.tile_types import lanes_of
from ir.types import VectorType

ROW_BYTES = 128  # of a row in a tile of the matrix unit
GROUP = 8  # rows until the swizzle begins again
GROUP_BYTES = GROUP * ROW_BYTES
PIECE_BYTES = 16
LANES = PIECE_BYTES // 4  # words of a piece, one for each lane q


@dataclass(frozen=True)
class RowTiles:
    """Rows of `k` columns of an element. `gathered`: row by row. `crossed`: for weights of 4 bits, the 4 bytes of a
    word are columns 0, 2, 1, 3 of it, as these are unpacked."""

    k: int
    element: PlainFormat
    gathered: bool = False
    crossed: bool = False

    @property
    def columns(self) -> int:
        """Of a piece of 128 bytes."""
        return ROW_BYTES * 8 // self.element.bits

    @property
    def pieces(self) -> int:
        return -(-self.k // self.columns)

    @property
    def padded(self) -> int:
        """Columns of a row as they lie."""
        return self.pieces * self.columns

    def rows(self, m: int) -> int:
        """Rows that are stored for m rows."""
        return m if self.gathered else -(-m // GROUP) * GROUP

    def count(self, m: int) -> int:
        """Numbers that are stored for m rows."""
        return self.rows(m) * self.padded

    def store(self, b: GridBuilder, x: Buffer, row: Expr, column: Expr, numbers: Expr, m: Expr) -> None:
        """Stores up to 8 neighbouring numbers of a row, from `column` (a multiple of how many they are) on."""
        each, lanes = 32 // self.element.bits, lanes_of(numbers.type)  # numbers of a word
        if lanes < each:
            assert lanes == 1 and not self.crossed
            x.store(self._word(b, row, column, column % STEP // each, m) * each + column % each, numbers)
            return
        bits = numbers.bitcast(VectorType(lanes // each, I32))
        for i in range(lanes // each):
            word = bits.extract(i)
            if self.crossed:
                word = (word & -0xFFFF01) | (word.shifted_right(8) & 0xFF00) | (word & 0xFF00).shifted_left(8)
            j = i if lanes == STEP else column % STEP // each + i
            x.view(I32).store(self._word(b, row, column, j, m), word)

    def _word(self, b: GridBuilder, row: Expr, column: Expr, j: Expr | int, m: Expr) -> Expr:
        """Where word j of the 8 numbers that `column` is among lies."""
        piece, within = column // self.columns, column % self.columns
        segment, q = within // SEGMENT, within % SEGMENT // STEP
        sixteen = segment * (STEP * self.element.bits // 32) + j
        if self.gathered:
            first = (row * self.pieces + piece) * ROW_BYTES + sixteen * PIECE_BYTES
        else:
            first = self.first(piece, row // GROUP, m) + row % GROUP * ROW_BYTES
            first = first + b.xor(sixteen, row % GROUP) * PIECE_BYTES
        return first // 4 + q

    def arranged(self, x: np.ndarray) -> np.ndarray:
        """Rows [m, k] as they lie: [pieces, eights of rows, 8, numbers], or [rows, pieces, numbers]."""
        rows = np.concatenate([x, np.repeat(x[-1:], self.rows(len(x)) - len(x), axis=0)])
        padded = np.zeros((len(rows), self.padded), x.dtype)
        padded[:, : self.k] = rows
        each = 4 // x.itemsize  # numbers of a word
        words = padded.reshape(len(rows), self.pieces, -1, LANES, STEP // each, each)  # [row, piece, segment, q, j, i]
        if self.crossed:
            words = words[..., [0, 2, 1, 3]]
        made = words.swapaxes(3, 4).reshape(len(rows), self.pieces, GROUP, -1)  # by 16 bytes
        if self.gathered:
            return np.ascontiguousarray(made.reshape(len(rows), self.pieces, -1))
        row, swizzled = np.arange(len(rows))[:, None], np.empty_like(made)
        swizzled[row, :, np.arange(GROUP) ^ row % GROUP] = made.swapaxes(1, 2)
        by_eights = swizzled.reshape(-1, GROUP, self.pieces, self.columns)
        return np.ascontiguousarray(by_eights.transpose(2, 0, 1, 3))

    def first(self, piece: Expr, group: Expr, m: Expr) -> Expr:
        """First byte of 8 rows, for dense products."""
        return (piece * row_groups(m) + group) * GROUP_BYTES


def row_groups(m: Expr) -> Expr:
    """Eights of m rows, the last one filled up."""
    return (m + (GROUP - 1)) // GROUP
