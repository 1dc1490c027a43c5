"""Low-bit weights in registers: the codes of a step, and what they are worth to each kind of inner product.

pack 4, `tile.dot4`   bytes without sign: level + bias; sums begin at -bias * (sum of the activations)
pack 2, `tile.dot2`   pairs of bf16, exact: every level is an integer of 8 bits or a number of FP8
pack 1, `tile.fma`    f32
"""

from __future__ import annotations

import numpy as np

from codegen.packed_strips import LANES, PackedStrips
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import BF16, F16, F32, I8, I32, U8, ScaledFormat
from ir.formats.fp8 import FP8Format
from ir.types import VectorType

WORDS = VectorType(LANES, I32)
_TABLE_BITS = 5  # a register holds the bf16 values of that many bits


class WeightDecoder:
    """Writes the decoding of one matrix. `table` is the buffer of the learned table, for formats that have one."""

    def __init__(self, k: KernelBuilder, w: PackedStrips, table: Buffer | None = None) -> None:
        self.k, self.w, self.pack = k, w, w.layout.pack
        self.levels = _levels(w)
        self.float8 = w.format.element if isinstance(w.format, FP8Format) else None
        self.linear = self.levels is not None and _is_linear(self.levels)
        self.bias = self.bias_of(w)
        self.words = table.view(I32) if table is not None and w.dim > 1 else None
        self.table = self._table(table) if self.words is None else None
        # One bit means -1 and 1: where no table says so, the code counts double.
        self.lift = 1 if self.table is None and self.levels is not None and self.levels[1] - self.levels[0] == 2 else 0

    @staticmethod
    def bias_of(w: PackedStrips) -> int:
        """What bytes without sign are more than the levels they stand for."""
        levels = _levels(w)
        if levels is not None and _is_linear(levels):
            return -int(levels[0])
        return 0 if isinstance(w.format, FP8Format) else 128

    # -- tables

    def _table(self, stored: Buffer | None) -> Expr | None:
        """The register that codes are looked up in, if they are."""
        if stored is not None:
            return self._stored_table(stored)
        if self.levels is None or (self.linear and (self.pack != 2 or self.w.bits > _TABLE_BITS or self.w.has_zeros)):
            return None
        entries = max(len(self.levels), 4)
        levels = np.zeros(entries, np.int64)
        levels[: len(self.levels)] = self.levels
        if self.pack == 4:
            raw = (levels + self.bias).astype(np.uint8)
            return self._constant(raw, VectorType(entries, U8))
        if self.pack == 2:
            raw = levels.astype(BF16.dtype)
            assert np.array_equal(raw.astype(np.int64), levels)
            return self._constant(raw, VectorType(entries, BF16))
        return self._constant(levels.astype(np.float32), VectorType(entries, F32))

    def _constant(self, raw: np.ndarray, type: VectorType) -> Expr:
        words = raw.view(np.int32)
        return self.k.constant(VectorType(len(words), I32), tuple(int(w) for w in words)).bitcast(type)

    def _stored_table(self, stored: Buffer) -> Expr:
        """A learned table: int8 levels as they lie before the strips of a matrix."""
        entries = 1 << self.w.bits
        levels = stored.view(I8).load(0, entries)
        if self.pack == 4:
            return (levels.cast(I32) + self.bias).cast(U8)
        return levels.cast(F32).cast(BF16) if self.pack == 2 else levels.cast(F32)

    # -- steps

    def registers(self, block: Buffer) -> list[Expr]:
        """The registers of a block of 16 rows, as words."""
        if self.words is not None:
            return [block.load(LANES * i, LANES).cast(I32) for i in range(self.w.steps)]
        return [block.load(64 * i, 64).bitcast(WORDS) for i in range(self.w.bits)]

    def codes(self, registers: list[Expr], step: int, cut: bool = True) -> Expr:
        """i32 lanes whose slots hold the codes of a step; if not `cut`, with other bits above a code of one piece."""
        slots = range(0, 32, self.w.slot_bits)
        total: Expr | None = None
        for piece in self.w.pieces[step]:
            word, low = registers[piece.register], piece.low + self.lift
            if piece.shift > low:
                word = word.shifted_right(piece.shift - low)
            elif piece.shift < low:
                word = word.shifted_left(low - piece.shift)
            if piece.width < self.w.slot_bits and (cut or len(self.w.pieces[step]) > 1):
                mask = sum((((1 << piece.width) - 1) << low) << slot for slot in slots)
                word = word & (mask - (1 << 32) if mask >> 31 else mask)
            total = word if total is None else total | word
        assert total is not None
        return total

    def step(self, registers: list[Expr], step: int, zeros: Expr | None) -> Expr:
        """The weights of a step: 64 u8, 32 bf16 or 16 f32. `zeros` are zero points as i32 lanes; bytes ignore them."""
        if self.words is not None:
            return self.words.gather(registers[step]).bitcast(VectorType(4 * LANES, U8))
        if self.table is not None:
            whole = self.table.lanes == 1 << self.w.bits  # then an index counts modulo all codes
            return self.k.lookup(self.table, self.codes(registers, step, cut=not whole))
        codes = self.codes(registers, step)
        if self.float8 is not None:
            return self._float8(codes)
        if self.pack == 4:
            return codes.bitcast(VectorType(4 * LANES, U8))
        less = zeros if zeros is not None else self.bias
        if self.pack == 1:
            return (codes - less).cast(F32)
        return self._join_pairs((codes & 0xFFFF) - less, (codes.shifted_right(16) & 0xFFFF) - less)

    def _join_pairs(self, low: Expr, high: Expr) -> Expr:
        """Two i32 of at most 8 bits a lane -> a pair of bf16 a lane: the upper halves of their f32."""
        first, second = (x.cast(F32).bitcast(WORDS) for x in (low, high))
        return ((first.shifted_right(16) & 0xFFFF) | (second & -65536)).bitcast(VectorType(2 * LANES, BF16))

    def _float8(self, codes: Expr) -> Expr:
        """FP8 -> f32 by moving its fields and multiplying by the difference of the biases, which is exact."""
        assert self.float8 is not None
        shift, scale = (20, 2.0**120) if self.float8.name == "f8e4m3" else (21, 2.0**112)

        def widen(code: Expr) -> Expr:
            sign = (code & 0x80).shifted_left(24)
            return (sign | (code & 0x7F).shifted_left(shift)).bitcast(VectorType(LANES, F32)) * scale

        if self.pack == 1:
            return widen(codes)
        pair = [widen(c).bitcast(WORDS) for c in (codes & 0xFF, codes.shifted_right(16) & 0xFF)]
        return ((pair[0].shifted_right(16) & 0xFFFF) | (pair[1] & -65536)).bitcast(VectorType(2 * LANES, BF16))

    # -- scales

    def scales(self, group: Buffer, vector: int) -> Expr:
        """f32 scales of 16 rows of a group; what integers of other units than one owe is in them."""
        w, fmt = self.w, self.w.scale
        at = vector * LANES * (fmt.bits // 8)
        if fmt in (F32, F16, BF16):
            return group.at(at).view(fmt).load(0, LANES).cast(F32)
        if fmt == I8:
            return group.at(at).view(I8).load(0, LANES).cast(I32).cast(F32)
        raw = group.load(at, LANES).cast(I32)
        if isinstance(w.format, ScaledFormat) and w.format.channel is not None:
            return raw.cast(F32)
        # A power of two: its exponent, moved into an f32. Levels of MXFP4 are counted in halves.
        return raw.shifted_left(23).bitcast(VectorType(LANES, F32)) * 0.5

    def zeros(self, group: Buffer, vector: int) -> Expr | None:
        """i32 zero points of 16 rows of a group."""
        if not self.w.has_zeros:
            return None
        return group.load(self.w.zeros_at + vector * LANES, LANES).cast(I32)

    def channel(self, strip: Buffer, vector: int) -> Expr | None:
        """f32 channel scales of 16 rows."""
        if not self.w.has_channel:
            return None
        return strip.at(self.w.channel_at + vector * LANES * 4).view(F32).load(0, LANES)


def _levels(w: PackedStrips) -> np.ndarray | None:
    """What each code is worth, where that is known now."""
    if isinstance(w.format, FP8Format) or w.format.integer_levels is None:
        return None
    return np.asarray(w.format.integer_levels, np.int64)


def _is_linear(levels: np.ndarray) -> bool:
    """Codes in steps of one; or the two levels -1 and 1."""
    steps = np.diff(levels)
    return bool((steps == steps[0]).all()) and (steps[0] == 1 or (steps[0] == 2 and len(levels) == 2))
