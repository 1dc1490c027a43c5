"""The two inner products of attention over one kind of cache block: scores = q . K^T and sums += p . V.

`FloatProducts` multiplies bf16 pairs (`tile.dot2`) or floats. `CodeProducts` multiplies codes as they lie in the cache
(`tile.dot4`): queries become 8-bit integers with a scale for each row, the weights of one step 8-bit integers with a
scale for each row and step, so that nothing is unpacked but nibbles into bytes. Integer sums are exact; a row's
rounding depends on nothing but the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from codegen.kernels.kv_layout import BLOCK, CodeBlocks, FloatBlocks
from codegen.kernels.math import exp2_short
from codegen.tile_builder import Buffer, Expr, KernelBuilder, bf16_pair
from ir.formats import F16, F32, I8, I32, U8
from ir.types import VectorType

LANES = 16
STEP = 64  # positions that are joined at once
STEP_BLOCKS = STEP // BLOCK
MOST_SUMS = 16  # accumulators of 16 lanes that stay in registers

BlockOf = Callable[[Expr], Buffer]  # position -> the block that holds it


def chunks(count: int, most: int) -> list[range]:
    """0 .. count in runs of at most `most`."""
    return [range(first, min(first + most, count)) for first in range(0, count, most)]


class FloatProducts:
    """Blocks of bf16, f16 or f32."""

    def __init__(self, k: KernelBuilder, blocks: FloatBlocks, rows: int, factor: float, ahead: int) -> None:
        self.k, self.blocks, self.factor, self.ahead = k, blocks, factor, ahead
        self.query = k.scratch(rows * blocks.dim, blocks.computed)
        self.weights = k.scratch(rows * STEP, blocks.computed)

    def take_query(self, row: Expr, source: Buffer) -> None:
        """Row `row` becomes the query in source[0 .. dim] (f32)."""
        for c in range(0, self.blocks.dim, LANES):
            self.query.store(row * self.blocks.dim + c, source.load(c, LANES).cast(self.blocks.computed))

    def begin_step(self, block_of: BlockOf, at: Expr, rows: int) -> None:
        """The step of positions at .. at + STEP begins. Nothing to prepare."""

    def scores(self, blocks: Sequence[tuple[Buffer, Expr]], rows: range) -> list[list[Expr]]:
        """[rows][blocks] vectors of 16 positions: factor * (q . k). Each block comes with its number in the step."""
        k, dim = self.k, self.blocks.dim
        left = [self.query.at(row * dim) for row in rows]
        zeros = [k.f32(0.0, LANES)] * (len(rows) * len(blocks))
        ahead = self.ahead if rows.start == 0 else 0
        sums = self._multiply(left, [block for block, _ in blocks], dim, zeros, 8, ahead)
        sums = [total * self.factor for total in sums]
        return [sums[i * len(blocks) : (i + 1) * len(blocks)] for i in range(len(rows))]

    def bound_weights(self, row: Expr, scores: list[Expr]) -> None:
        """The scores of a row in this step, masked. Floats need not know."""

    def scale_weights(self, row: int, maxima: Expr) -> None:
        """Weights of rows `row` .. + 16 will be 2**(score - maximum). Floats need not know."""

    def store_weights(self, row: Expr, weights: list[Expr]) -> None:
        """The weights of a row for every block of the step."""
        for b, weight in enumerate(weights):
            self.weights.store(row * STEP + b * BLOCK, weight.cast(self.blocks.computed))

    def add_values(
        self, block_of: BlockOf, at: Expr, blocks: Expr, rows: int, sums: Buffer, corrections: Buffer
    ) -> None:
        """sums[row] = sums[row] * corrections[row] + weights[row] . values, for all rows and columns."""
        k, dim = self.k, self.blocks.dim
        for chunk in chunks(rows, MOST_SUMS):
            for strips in chunks(dim // 16, max(1, MOST_SUMS // len(chunk))):
                places = [row * dim + strip * 16 for row in chunk for strip in strips]
                scale = [corrections.load(row) for row in chunk for _ in strips]
                before = [sums.load(place, LANES) * c for place, c in zip(places, scale, strict=True)]
                with k.loop(0, blocks, 1, before) as loop:
                    values = block_of(at + loop.i * BLOCK).at(self.blocks.values)
                    left = [self.weights.at(loop.i * BLOCK + row * STEP) for row in chunk]
                    right = [values.at(strip * 16 * BLOCK) for strip in strips]
                    ahead = self.ahead if chunk.start == 0 else 0
                    loop.carry(*self._multiply(left, right, BLOCK, loop.carried, 16, ahead))
                for place, total in zip(places, loop.results, strict=True):
                    sums.store(place, total)

    def constant_part(self, row: Expr) -> Expr | None:
        """A number to add to every column of a row's sums at the end."""
        return None

    def scale_constant_part(self, row: Expr, correction: Expr) -> None:
        """`constant_part` times `correction`; before the weights of a step are stored. There is none."""

    def _multiply(
        self, left: list[Buffer], right: list[Buffer], depth: int, sums: list[Expr], unroll: int, ahead: int
    ) -> list[Expr]:
        """sums [left][right] plus the products of rows of numbers and strips of 16 columns, along `depth` in order."""
        k, pack = self.k, self.blocks.pack
        steps = depth // pack
        unroll = min(unroll, steps)
        words = [row.view(I32) for row in left] if pack == 2 else left

        def step(at: Expr, sums: list[Expr]) -> list[Expr]:
            columns = [strip.load(at * (LANES * pack), LANES * pack) for strip in right]
            if ahead:
                for strip in right:
                    strip.prefetch(at * (LANES * pack) + ahead)
            if pack == 1:
                columns = [c.cast(F32) for c in columns]
            made: list[Expr] = []
            for i, row in enumerate(words):
                number = row.load(at)
                number = bf16_pair(number, LANES) if pack == 2 else k.splat(number, LANES)
                for j, column in enumerate(columns):
                    before = sums[i * len(right) + j]
                    made.append(k.dot2(before, column, number) if pack == 2 else k.fma(column, number, before))
            return made

        if steps == unroll:
            for at in range(steps):
                sums = step(k.index(at), sums)
            return sums
        assert steps % unroll == 0
        with k.loop(0, steps, unroll, sums) as loop:
            made = loop.carried
            for u in range(unroll):
                made = step(loop.i + u, made)
            loop.carry(*made)
        return loop.results


class CodeProducts:
    """Blocks of codes. Rows that share a scale by column over `key_group` positions have a query for each group."""

    def __init__(self, k: KernelBuilder, blocks: CodeBlocks, rows: int, factor: float, ahead: int) -> None:
        self.k, self.blocks, self.factor, self.ahead = k, blocks, factor, ahead
        self.sets = STEP // blocks.key_group if blocks.key_group else 1  # queries of a row in one step
        dim = blocks.dim
        self.query = k.scratch(rows * self.sets * dim, I8)
        self.factors = k.scratch(rows * self.sets, F32)  # what an integer of the query is worth
        self.starts = k.scratch(rows * self.sets, I32)  # the part of a sum that the offset of the codes takes off
        self.weights = k.scratch(rows * STEP, U8)
        padded = -(-rows // LANES) * LANES
        self.weight_bounds = k.scratch(padded, F32)  # largest score + value_logs of this step
        self.weight_factors = k.scratch(padded, F32)  # from a weight times the scale of its value to an integer
        self.weight_scales = k.scratch(padded, F32)  # and back
        self.value_scales = k.scratch(STEP, F32)
        self.value_logs = k.scratch(STEP, F32)  # their logarithms to base 2, up to 0.09 more
        if not blocks.signed:
            self.value_lows = k.scratch(STEP, F32)
            self.low_sums = k.scratch(rows * LANES, F32)  # weights times lowest values so far
        if blocks.key_group:
            self.wide = k.scratch(rows * dim, F32)  # the queries as they are
            self.bases = k.scratch(rows * self.sets, F32)  # query . lowest values

    # -- queries

    def take_query(self, row: Expr, source: Buffer) -> None:
        dim = self.blocks.dim
        if not self.blocks.signed:
            self.low_sums.store(row * LANES, self.k.f32(0.0, LANES))
        if self.blocks.key_group:
            for c in range(0, dim, LANES):
                self.wide.store(row * dim + c, source.load(c, LANES))
        else:
            self._round_query(row, [source.load(c, LANES) for c in range(0, dim, LANES)])

    def _round_query(self, place: Expr, parts: list[Expr]) -> None:
        """A query as 8-bit integers: `place` numbers row and set."""
        k = self.k
        extent = _largest([_magnitude(x) for x in parts]).reduce("max").max(1e-30)
        inverse = 127.0 / extent
        total = k.f32(0.0, LANES)
        for i, x in enumerate(parts):
            whole = k.round(x * inverse)
            total = total + whole
            self.query.store(place * self.blocks.dim + i * LANES, whole.cast(I32).cast(I8))
        self.factors.store(place, extent * (self.factor / 127))
        self.starts.store(place, (total.reduce("add") * float(-self.blocks.offset)).cast(I32))

    # -- one step

    def begin_step(self, block_of: BlockOf, at: Expr, rows: int) -> None:
        k, blocks = self.k, self.blocks
        for b in range(STEP_BLOCKS):
            halves = block_of(at + b * BLOCK).view(F16)
            scales = halves.load(blocks.value_scales // 2, BLOCK).cast(F32)
            if self.ahead:
                halves.prefetch((blocks.value_scales + self.ahead) // 2)
            self.value_scales.store(b * BLOCK, scales)
            bits = scales.bitcast(VectorType(BLOCK, I32)).cast(F32)  # exponent and mantissa as one number: a line
            self.value_logs.store(b * BLOCK, k.fma(bits, 2.0**-23, 0.0861 - 127.0))  # above the logarithm
            if not blocks.signed:
                self.value_lows.store(b * BLOCK, halves.load(blocks.value_scales // 2 + BLOCK, BLOCK).cast(F32))
        if not blocks.key_group:
            return
        for number in range(self.sets):
            scales = block_of(at + number * blocks.key_group).view(F16).at(blocks.key_scales // 2)
            lows = block_of(at + (number * blocks.key_group + BLOCK)).view(F16).at(blocks.key_scales // 2)
            with k.loop(0, rows) as row:
                base, parts = k.f32(0.0, LANES), []
                for c in range(0, blocks.dim, LANES):
                    x = self.wide.load(row.i * blocks.dim + c, LANES)
                    base = k.fma(x, lows.load(c, LANES).cast(F32), base)
                    parts.append(x * scales.load(c, LANES).cast(F32))
                place = row.i * self.sets + number
                self.bases.store(place, base.reduce("add") * self.factor)
                self._round_query(place, parts)

    def scores(self, blocks: Sequence[tuple[Buffer, Expr]], rows: range) -> list[list[Expr]]:
        k, layout = self.k, self.blocks
        words, fields = [block.view(I32) for block, _ in blocks], layout.fields
        groups = layout.dim // 4 // fields
        flat = [self._place(row, number) for row in rows for _, number in blocks]
        queries = [self.query.at(place * layout.dim).view(I32) for place in flat]
        sums = [k.splat(self.starts.load(place), LANES) for place in flat]

        def step(at: Expr, sums: list[Expr]) -> list[Expr]:
            packed = [block.load(at * LANES, LANES) for block in words]
            if self.ahead and rows.start == 0:
                for block in words:
                    block.prefetch(at * LANES + self.ahead // 4)
            made = list(sums)
            for f in range(fields):
                codes = [_field(x, f, layout.bits).bitcast(VectorType(4 * LANES, U8)) for x in packed]
                for i, query in enumerate(queries):
                    quad = k.splat(query.load(at * fields + f), LANES).bitcast(VectorType(4 * LANES, I8))
                    made[i] = k.dot4(made[i], codes[i % len(blocks)], quad)
            return made

        unroll = min(groups, max(1, 8 // fields))
        if groups > unroll:
            with k.loop(0, groups // unroll * unroll, unroll, sums) as loop:
                made = loop.carried
                for u in range(unroll):
                    made = step(loop.i + u, made)
                loop.carry(*made)
            sums = loop.results
            for at in range(groups // unroll * unroll, groups):
                sums = step(k.index(at), sums)
        else:
            for at in range(groups):
                sums = step(k.index(at), sums)
        numbers = [total.cast(F32) * self.factors.load(place) for total, place in zip(sums, flat, strict=True)]
        if layout.key_group:
            numbers = [x + self.bases.load(place) for x, place in zip(numbers, flat, strict=True)]
        else:
            scales = [block.view(F16).load(layout.key_scales // 2, BLOCK).cast(F32) for block, _ in blocks]
            numbers = [x * scales[i % len(blocks)] for i, x in enumerate(numbers)]
        return [numbers[i * len(blocks) : (i + 1) * len(blocks)] for i in range(len(rows))]

    def _place(self, row: int, number: Expr) -> Expr:
        """Where the query of a row for block `number` of the step lies."""
        if self.sets == 1:
            return self.k.index(row)
        return number // (self.blocks.key_group // BLOCK) + row * self.sets

    def scale_constant_part(self, row: Expr, correction: Expr) -> None:
        if not self.blocks.signed:
            self.low_sums.store(row * LANES, self.low_sums.load(row * LANES, LANES) * correction)

    def bound_weights(self, row: Expr, scores: list[Expr]) -> None:
        bounds = [score + self.value_logs.load(b * BLOCK, LANES) for b, score in enumerate(scores)]
        self.weight_bounds.store(row, _largest(bounds).reduce("max"))

    def scale_weights(self, row: int, maxima: Expr) -> None:
        most = exp2_short(self.k, self.weight_bounds.load(row, LANES) - maxima).max(1e-30)
        self.weight_factors.store(row, 255.0 / most)
        self.weight_scales.store(row, most * (1 / 255))

    def store_weights(self, row: Expr, weights: list[Expr]) -> None:
        k = self.k
        if not self.blocks.signed:
            low = self.low_sums.load(row * LANES, LANES)
            for b, weight in enumerate(weights):
                low = k.fma(weight, self.value_lows.load(b * BLOCK, LANES), low)
            self.low_sums.store(row * LANES, low)
        factor = self.weight_factors.load(row)
        for b, weight in enumerate(weights):
            scaled = weight * self.value_scales.load(b * BLOCK, LANES)
            whole = k.fma(scaled, factor, 0.5).cast(I32)  # not negative: rounded to nearest
            self.weights.store(row * STEP + b * BLOCK, whole.cast(U8))

    def add_values(
        self, block_of: BlockOf, at: Expr, blocks: Expr, rows: int, sums: Buffer, corrections: Buffer
    ) -> None:
        k, layout = self.k, self.blocks
        dim, fields = layout.dim, layout.fields
        groups = dim // 16 // fields  # bytes of 16 columns, each in `fields` strips
        for chunk in chunks(rows, MOST_SUMS // fields):
            for strips in chunks(groups, max(1, MOST_SUMS // (len(chunk) * fields))):
                count = len(strips) * fields
                zeros = [k.constant(VectorType(LANES, I32), 0)] * (len(chunk) * count)
                with k.loop(0, blocks, 1, zeros) as loop:
                    words = block_of(at + loop.i * BLOCK).at(layout.values).view(I32)
                    made = list(loop.carried)
                    weights = [self.weights.at(loop.i * BLOCK + row * STEP).view(I32) for row in chunk]
                    for quad in range(BLOCK // 4):
                        codes = []
                        for strip in strips:
                            place = (strip * (BLOCK // 4) + quad) * LANES
                            packed = words.load(place, LANES)
                            if self.ahead and chunk.start == 0:
                                words.prefetch(place + self.ahead // 4)
                            codes += [self._value_codes(packed, f) for f in range(fields)]
                        for i, row in enumerate(weights):
                            four = k.splat(row.load(quad), LANES).bitcast(VectorType(4 * LANES, U8))
                            for j, code in enumerate(codes):
                                made[i * count + j] = k.dot4(made[i * count + j], four, code)
                    loop.carry(*made)
                columns = [(strip * fields + f) * 16 for strip in strips for f in range(fields)]
                for i, row in enumerate(chunk):
                    correction, scale = corrections.load(row), self.weight_scales.load(row)
                    for j, column in enumerate(columns):
                        before = sums.load(row * dim + column, LANES) * correction
                        added = loop.results[i * count + j].cast(F32)
                        sums.store(row * dim + column, k.fma(added, scale, before))

    def _value_codes(self, packed: Expr, field: int) -> Expr:
        """Bytes with sign of one field: 64 codes, less their offset."""
        if self.blocks.fields == 1:
            return packed.bitcast(VectorType(4 * LANES, I8))
        if not self.blocks.signed:
            return _field(packed, field, self.blocks.bits).bitcast(VectorType(4 * LANES, I8))
        shifted = packed.shifted_right(field * self.blocks.bits) if field else packed
        entries = 1 << self.blocks.bits
        table = self.k.constant(VectorType(entries, I8), tuple(i - self.blocks.offset for i in range(entries)))
        return self.k.lookup(table, shifted)

    def constant_part(self, row: Expr) -> Expr | None:
        return None if self.blocks.signed else self.low_sums.load(row * LANES, LANES).reduce("add")


def _field(packed: Expr, field: int, bits: int) -> Expr:
    """Field `field` of every byte, as the whole byte."""
    if bits == 8:
        return packed
    mask = (1 << bits) - 1
    shifted = packed.shifted_right(field * bits) if field else packed
    return shifted & (mask * 0x01010101)


def _magnitude(x: Expr) -> Expr:
    return x.max(0.0 - x)


def _largest(parts: list[Expr]) -> Expr:
    largest = parts[0]
    for other in parts[1:]:
        largest = largest.max(other)
    return largest


Products = FloatProducts | CodeProducts


def products(k: KernelBuilder, blocks: FloatBlocks | CodeBlocks, rows: int, factor: float, ahead: int = 0) -> Products:
    """The products for a kind of block, with scratch memory for `rows` rows; scores are multiplied by `factor`.

    `ahead` elements behind each load the cache line is prefetched, 0 for none.
    """
    if isinstance(blocks, FloatBlocks):
        return FloatProducts(k, blocks, rows, factor, ahead)
    return CodeProducts(k, blocks, rows, factor, ahead)
