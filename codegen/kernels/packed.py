"""The inner product of low-bit weights: a few rows of activations times some registers of a strip.

    int8 activations    sums of a segment in i32 (`tile.dot4`), then   y += sums * (scale of weights * of activations)
    bf16, f32           sums of a group in f32, then                   y += sums * scale of weights

A segment is the columns that share both scales. Its i32 sum cannot overflow: |sum| <= columns * 255 * 127 plus the
start value of the same size, so segments of up to 2**31 / (2 * 255 * 127) = 33,154 columns are taken and longer ones
refused. Each output element is added up in one order, whatever the tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from codegen.kernels.decode import WORDS, WeightDecoder
from codegen.packed_strips import BLOCK, LANES, PackedStrips
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I8, I32
from ir.types import VectorType

LONGEST_SEGMENT = (2**31 - 1) // (2 * 255 * 127) // BLOCK * BLOCK
_LINE = 64  # bytes that come together
_UNROLLED_STEPS = 16  # inner products of a segment that are written out; longer segments loop over their blocks
_UNROLLED_SEGMENTS = 4  # of a group


@dataclass(frozen=True)
class Activations:
    """Rows of a product as a kernel stores them: [rows, pitch], and for int8 scales and sums of their segments.

    `starts` are the values that i32 sums begin with: minus the bias of the weights times the sum of the segment; with
    zero points, the sum itself.
    """

    values: Buffer  # i8, bf16 or f32
    scales: Buffer | None = None  # f32 [rows, groups]
    starts: Buffer | None = None  # i32 [rows, segments]
    group: int = 0  # columns that share a scale of activations; 0: all
    pitch: int = 0  # elements from one row to the next; 0: as many as a row has


@dataclass(frozen=True)
class Ahead:
    """What a tile asks memory for while it computes: of each group of the strip `distance` bytes on, the lines whose
    `turn` it is of so many `turns`; in turn 0 with `again` also all lines so many bytes behind those in use."""

    distance: Expr
    turn: Expr
    turns: int
    again: Expr | None = None


def segment_of(w: PackedStrips, group: int, integer: bool) -> int:
    """Columns that share the scales of weights and activations (`group` columns, 0 = all of them)."""
    segment = math.gcd(w.group, group or w.group)
    if integer and segment > LONGEST_SEGMENT:
        raise DiagnosticError(
            f"i32 sums of {segment} columns of int8 products might overflow",
            expected=f"groups of at most {LONGEST_SEGMENT} columns for weights or activations",
        )
    return segment


def multiply_packed(
    k: KernelBuilder,
    x: Activations,
    rows: list[Expr],
    vectors: list[tuple[Buffer, int]],
    w: PackedStrips,
    decoder: WeightDecoder,
    ahead: Ahead | None = None,
) -> list[list[Expr]]:
    """f32 sums [len(rows)][len(vectors)] of 16 lanes. `rows` are row numbers of x, a vector is a strip and 16 rows."""
    product = _PackedProduct(k, x, rows, vectors, w, decoder, ahead)
    zeros = [k.f32(0.0, LANES)] * (len(rows) * len(vectors))
    together = product.together
    with k.loop(0, w.groups // together, 1, zeros) as loop:
        if together == 1:
            loop.carry(*product.group(loop.i, loop.carried))
        else:
            with k.loop(0, together, 1, zeros) as inner:
                inner.carry(*product.group(loop.i * together + inner.i, inner.carried))
            loop.carry(*product.scaled(loop.i, inner.results, loop.carried))
    return product.finish(loop.results)


class _PackedProduct:
    """Writes one tile."""

    def __init__(
        self,
        k: KernelBuilder,
        x: Activations,
        rows: list[Expr],
        vectors: list[tuple[Buffer, int]],
        w: PackedStrips,
        decoder: WeightDecoder,
        ahead: Ahead | None,
    ) -> None:
        self.k, self.x, self.rows, self.vectors, self.w, self.decoder = k, x, rows, vectors, w, decoder
        self.ahead = ahead if vectors[0][1] == 0 else None  # once for all registers of a strip
        self.integer = x.scales is not None
        self.segment = segment_of(w, x.group, self.integer)
        self.segments = w.group // self.segment  # of a group of weights
        words_per_row = (x.pitch or w.stored_k) // w.layout.pack
        self.words = x.values.view(I32) if w.layout.pack > 1 else x.values
        self.row_words = [row * words_per_row for row in rows]
        self.row_segments = [row * (w.stored_k // self.segment) for row in rows]
        self.row_scales = [row * (w.stored_k // x.group) for row in rows] if x.group else list(rows)
        # Groups of weights that share a scale of activations: their sums are scaled together.
        self.together = x.group // w.group if self.integer and x.group else 1
        if self.together < 1 or x.group % w.group:
            self.together = 1

    def group(self, number: Expr, sums: list[Expr]) -> list[Expr]:
        """Adds one group of weights to f32 sums."""
        d = self.decoder
        groups = [strip.at(number * self.w.group_bytes) for strip, _ in self.vectors]
        if self.ahead is not None:
            self._ask(groups[0], self.ahead)
        scales = [d.scales(g, j) for g, (_, j) in zip(groups, self.vectors, strict=True)]
        zeros = [d.zeros(g, j) for g, (_, j) in zip(groups, self.vectors, strict=True)]
        if self.segments <= _UNROLLED_SEGMENTS:
            for inner in range(self.segments):
                sums = self._segment(number, self.k.index(inner), groups, scales, zeros, sums)
            return sums
        with self.k.loop(0, self.segments, 1, sums) as loop:
            loop.carry(*self._segment(number, loop.i, groups, scales, zeros, loop.carried))
        return loop.results

    def _ask(self, group: Buffer, ahead: Ahead) -> None:
        """Asks for the lines of a group whose turn it is, and maybe for lines that come soon a second time."""
        lines = -(-self.w.group_bytes // _LINE)
        part = -(-lines // ahead.turns)
        later = group.at(ahead.distance + ahead.turn * (part * _LINE))
        for line in range(part):
            later.prefetch(line * _LINE, level=2)
        if ahead.again is not None:
            with self.k.when(ahead.turn.compare("eq", 0)):
                soon = group.at(ahead.again)
                for line in range(lines):
                    soon.prefetch(line * _LINE, level=2)

    def _segment(
        self,
        group: Expr,
        inner: Expr,
        groups: list[Buffer],
        scales: list[Expr],
        zeros: list[Expr | None],
        sums: list[Expr],
    ) -> list[Expr]:
        """Adds one segment: its own sums first, then scaled."""
        k, w, count = self.k, self.w, len(self.vectors)
        segment = group * self.segments + inner
        parts = self._starts(segment, zeros)
        blocks = self.segment // BLOCK
        inside = inner * blocks  # first block, counted in the group
        across = segment * blocks  # and in the row
        if blocks == 1 or blocks * w.steps <= _UNROLLED_STEPS:
            for b in range(blocks):
                parts = self._block(
                    across + b, [g.at((inside + b) * w.block_bytes + w.blocks_at) for g in groups], zeros, parts
                )
        else:
            with k.loop(0, blocks, 1, parts) as loop:
                places = [g.at((inside + loop.i) * w.block_bytes + w.blocks_at) for g in groups]
                loop.carry(*self._block(across + loop.i, places, zeros, loop.carried))
            parts = loop.results
        new = []
        for i in range(len(self.rows)):
            factor = self._activation_scale(i, segment)
            for j in range(count):
                scale = scales[j] * k.splat(factor, LANES) if factor is not None else scales[j]
                new.append(k.fma(parts[i * count + j].cast(F32), scale, sums[i * count + j]))
        return new

    def _starts(self, segment: Expr, zeros: list[Expr | None]) -> list[Expr]:
        k = self.k
        if not self.integer:
            return [k.f32(0.0, LANES)] * (len(self.rows) * len(self.vectors))
        assert self.x.starts is not None
        made = []
        for row in self.row_segments:
            start = k.splat(self.x.starts.load(row + segment), LANES)
            made += [start if zero is None else 0 - zero * start for zero in zeros]
        return made

    def _activation_scale(self, row: int, segment: Expr) -> Expr | None:
        """The scale of a row's activations in a segment, where it changes along the row."""
        if not self.integer or not self.x.group or self.together > 1:
            return None
        assert self.x.scales is not None
        ratio = self.x.group // self.segment
        return self.x.scales.load(self.row_scales[row] + segment // ratio)

    def scaled(self, number: Expr, parts: list[Expr], sums: list[Expr]) -> list[Expr]:
        """`sums` and the parts of one group of activations times its scale."""
        k, count = self.k, len(self.vectors)
        assert self.x.scales is not None
        new = []
        for i, row in enumerate(self.row_scales):
            factor = k.splat(self.x.scales.load(row + number), LANES)
            for j in range(count):
                new.append(k.fma(parts[i * count + j], factor, sums[i * count + j]))
        return new

    def _block(self, block: Expr, places: list[Buffer], zeros: list[Expr | None], parts: list[Expr]) -> list[Expr]:
        """Adds 32 columns to the sums of a segment."""
        w, d, count = self.w, self.decoder, len(self.vectors)
        registers = [
            d.registers(place.at(j * w.vector_bytes)) for place, (_, j) in zip(places, self.vectors, strict=True)
        ]
        parts = list(parts)
        for step in range(w.steps):
            weights = [d.step(r, step, zero) for r, zero in zip(registers, zeros, strict=True)]
            for i, row in enumerate(self.row_words):
                x = self._activation(row + block * w.steps + step)
                for j in range(count):
                    parts[i * count + j] = self._product(parts[i * count + j], weights[j], x)
        return parts

    def _activation(self, at: Expr) -> Expr:
        """What every lane multiplies its weights of a step with."""
        word = self.k.splat(self.words.load(at), LANES)
        match self.w.layout.pack:
            case 4:
                return word.bitcast(VectorType(4 * LANES, I8))
            case 2:
                return word.bitcast(VectorType(2 * LANES, BF16))
            case _:
                return word.cast(F32)

    def _product(self, total: Expr, weights: Expr, x: Expr) -> Expr:
        match self.w.layout.pack:
            case 4:
                return self.k.dot4(total, weights, x)
            case 2:
                return self.k.dot2(total, weights, x)
            case _:
                return self.k.fma(weights, x, total)

    def finish(self, sums: list[Expr]) -> list[list[Expr]]:
        """Channel scales, and activation scales of whole rows."""
        k, count = self.k, len(self.vectors)
        channels = [self.decoder.channel(strip, j) for strip, j in self.vectors]
        made = []
        for i, row in enumerate(self.rows):
            values = sums[i * count : (i + 1) * count]
            values = [v if c is None else v * c for v, c in zip(values, channels, strict=True)]
            if self.integer and not self.x.group:
                assert self.x.scales is not None
                factor = k.splat(self.x.scales.load(row), LANES)
                values = [v * factor for v in values]
            made.append(values)
        return made


assert WORDS.lanes == LANES
