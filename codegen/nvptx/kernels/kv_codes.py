"""A head of the KV cache as codes with a scale (`ir.kv_low_bit`), packed by the warp that has its columns.

A lane holds neighbouring columns of the head's first half and the same of its second. Lanes that share a word of codes
put theirs together by exchanging registers.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.kv_append import scale_for
from codegen.nvptx.builder import GridBuilder
from codegen.tile_builder import Buffer, Expr
from ir.formats import F16, I32
from ir.ops import tile
from ir.types import ScalarType


@dataclass(frozen=True)
class HeadCodes:
    """For each half the word that this lane's columns are in, and the scale of the head."""

    k: GridBuilder
    bits: int
    lane: Expr
    lanes: int  # columns of a lane in each half
    words: tuple[Expr, ...]
    scale: Expr

    @classmethod
    def of(cls, k: GridBuilder, bits: int, values: tuple[Expr, Expr], lane: Expr) -> HeadCodes:
        """`ir.kv_low_bit.pack_symmetric`, step by step. The whole warp is here; lanes without columns have zeros."""
        lanes, offset = values[0].lanes, 1 << (bits - 1)
        largest = values[0].max(0.0 - values[0]).max(values[1].max(0.0 - values[1]))
        scale = scale_for(k, k.warp_reduce(largest.reduce("max") if lanes > 1 else largest, Expr.max), offset - 1)
        inverse = 1.0 / scale
        words = []
        for value in values:
            levels = k.round(value * inverse).max(float(1 - offset)).min(float(offset - 1))
            words.append(_joined(k, levels.cast(I32) + offset, bits, lane))
        return cls(k, bits, lane, lanes, tuple(words), scale)

    def store(
        self, codes: Buffer, scales: Buffer, place: Expr, column: Expr, half: int, stored: int, here: Expr
    ) -> None:
        """Words and scale of the row at `place` of the planes, by lanes that are `here`, from `column` on."""
        k, each = self.k, 32 // self.bits
        with k.when(here & (self.lane % (each // self.lanes)).compare("eq", 0)):
            for part, word in enumerate(self.words):
                codes.store(place * (stored // each) + (column + part * half) // each, word)
        with k.when(self.lane.compare("eq", 0)):
            scales.store(place, self.scale.cast(F16))


def _joined(k: GridBuilder, codes: Expr, bits: int, lane: Expr) -> Expr:
    """The word of 32 / bits neighbouring columns, in every lane that has some of them."""
    each, lanes = 32 // bits, codes.lanes
    group = each // lanes
    assert group >= 1
    word = k.constant(ScalarType(I32), 0)
    for i in range(lanes):
        shift = k.constant(ScalarType(I32), code_place(i, bits))
        for member in range(1, group):
            at = k.constant(ScalarType(I32), code_place(member * lanes + i, bits))
            shift = k.select((lane % group).compare("eq", member), at, shift)
        code = codes.extract(i) if lanes > 1 else codes
        word = word | code._binary(tile.ShlOp, shift)
    mask = 1
    while mask < group:
        word = word | k.shuffle(word, mask)
        mask *= 2
    return word


def code_place(number: int, bits: int) -> int:
    """The bit at which code `number` of a word begins: 4-bit codes lie in its two halves in turns."""
    return bits * number if bits == 8 else bits * (number // 2) + 16 * (number % 2)
