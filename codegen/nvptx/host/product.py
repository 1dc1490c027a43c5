"""A CPU's product with weights that lie in the order of a GPU's lanes (`codegen.nvptx.fragments`).

y = x w^T for a few rows, w read once a row, in f32 with one rounding a step. The weights of an expert lie once, in
pinned memory: the GPU copies them from there, or a CPU multiplies them there. 64 bytes of codes belong to two rows of a
tile, g and g + 8, so a vector of 16 words gives numbers of both by shifts and masks alone; which columns they are
depends on the width of the codes only, so x is laid out that way once for all tiles of a thread. Codes are multiplied
as they are stored, from 0 up: the sums of x that this adds are taken away with the first product of each group.

With a gate, a tile has 8 rows of gate and the 8 rows of up that belong to them: y is silu(gate) * up. Where a GPU
rounds x to 8 bits, the same is done here while x is laid out: each number becomes that of its code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from codegen.kernels.math import silu
from codegen.nvptx.fragments import CHUNK, SEGMENT, TILE, Fragments
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I32, PlainFormat
from ir.ops.builtin import FuncOp
from ir.types import VectorType

LANES = 16
HALF = TILE // 2  # rows g and g + 8 lie together
_WORDS = VectorType(LANES, I32)
_NUMBERS = VectorType(LANES, F32)
MOST_COLUMNS = 1 << 16  # of x on a thread's stack
LARGEST_CODE = 127.0  # of int8


@dataclass(frozen=True)
class HostProduct:
    """The product of a matrix that lies as `layout` says. With `gather` row r of y is made of row sources[r] of x. Its
    numbers are of `element` (bf16 or f32); `rounded`: they are rounded to int8 under scales of so many columns, 0 for
    whole rows, None for not at all. y has numbers of `out`."""

    layout: Fragments
    gate: bool = False
    gather: bool = False
    element: PlainFormat = BF16
    rounded: int | None = None
    out: PlainFormat = F32

    def check(self) -> None:
        """Raises DiagnosticError for matrices that have no product on CPUs."""
        layout = self.layout
        if layout.n % TILE or layout.k % CHUNK or layout.k > MOST_COLUMNS or layout.fp8:
            raise DiagnosticError(
                f"no product on CPUs for {layout.n} x {layout.k} numbers of {layout.bits} bits as GPUs have them",
                expected=f"integers or bf16, a multiple of {TILE} rows and of {CHUNK} columns, at most {MOST_COLUMNS}",
            )
        if self.rounded and (layout.k % self.rounded or self.rounded % LANES):
            raise DiagnosticError(
                f"no product on CPUs of {layout.k} columns rounded in groups of {self.rounded}",
                expected=f"groups of a multiple of {LANES} columns that divides them",
            )

    @property
    def width(self) -> int:
        """Columns of y."""
        return self.layout.n // 2 if self.gate else self.layout.n


def host_product(product: HostProduct, name: str) -> FuncOp:
    """A kernel (codes i32, [scales,] x, [sources i32,] y, rows), for a team."""
    product.check()
    k, layout = KernelBuilder(name), product.layout
    codes = k.buffer("codes", I32)
    scales = k.buffer("scales", layout.scale_element) if layout.group else None
    x = k.buffer("x", product.element)
    sources = k.buffer("sources", I32) if product.gather else None
    y, rows = k.buffer("y", product.out), k.size("rows")
    spread = _Spread.of(k, product)
    tile = _Tile(k, layout, codes, scales, spread)
    first, last = k.thread_share(layout.tiles)
    with k.loop(0, rows) as row:
        source = row.i if sources is None else sources.load(row.i).to_index()
        spread.write(x.at(source * layout.k))
        target = y.at(row.i * product.width)
        with k.loop(first, last) as at:
            sums = tile.sums(at.i)
            if product.gate:
                made = silu(k, sums.load(0, HALF)) * sums.load(HALF, HALF)
                target.store(at.i * HALF, made.cast(product.out))
            else:
                target.store(at.i * TILE, sums.load(0, TILE).cast(product.out))
    return k.finish()


def _columns(bits: int) -> list[list[int]]:
    """Of each vector of x in a chunk, which columns its lanes have; vectors in the order of `_Tile._vectors`."""
    lanes = range(LANES)
    if bits == 4:  # lane 4q + 2s + m, vector c
        return [[SEGMENT * (i // 2 % 2) + 8 * (i // 4) + 4 * (i % 2) + c for i in lanes] for c in range(4)]
    if bits == 8:  # vector (s, b)
        return [[SEGMENT * s + 2 * i + b for i in lanes] for s in range(2) for b in range(2)]
    # lane 4q + 2j + row, vector (s, m, half of a word)
    return [
        [SEGMENT * s + 8 * (i // 4) + 4 * m + 2 * (i // 2 % 2) + h for i in lanes]
        for s in range(2) for m in range(2) for h in range(2)
    ]  # fmt: skip


@dataclass(frozen=True)
class _Spread:
    """A row of x in f32 in the order of the codes: for each chunk its vectors, and what sums of codes begin with."""

    k: KernelBuilder
    layout: Fragments
    numbers: Buffer
    chunk: Buffer  # as it lies
    places: Sequence[Expr]
    group: int  # columns that are rounded under one scale, 0 for none
    factors: Buffer | None  # of each group: to codes, and back

    @classmethod
    def of(cls, k: KernelBuilder, product: HostProduct) -> _Spread:
        layout, rounded = product.layout, product.rounded
        columns = _columns(layout.bits)
        size = layout.chunks * LANES * (len(columns) + cls.begins(layout.bits))
        numbers, chunk, table = k.scratch(size, F32), k.scratch(CHUNK, F32), k.scratch(LANES, I32)
        places = []
        for numbers_of_vector in columns:
            for lane, column in enumerate(numbers_of_vector):
                table.store(lane, k.index(column).from_index())
            places.append(table.load(0, LANES))
        group = 0 if rounded is None else rounded or layout.k
        factors = k.scratch(2 * (layout.k // group), F32) if group else None
        return cls(k, layout, numbers, chunk, places, group, factors)

    @staticmethod
    def begins(bits: int) -> int:
        """Vectors of a chunk that sums begin with: of a chunk in 4 bits, of a segment in 8."""
        return {4: 1, 8: 2, 16: 0}[bits]

    @property
    def vectors(self) -> int:
        """Of a chunk."""
        return len(self.places) + self.begins(self.layout.bits)

    def write(self, x: Buffer) -> None:
        """Lays out a row."""
        k, begins = self.k, self.begins(self.layout.bits)
        zero = 1 << (self.layout.bits - 1)  # the code that means 0
        if self.factors is not None:
            self._find_factors(self.factors, x)
        with k.loop(0, self.layout.chunks) as loop:
            for i in range(0, CHUNK, LANES):
                at = loop.i * CHUNK + i
                self.chunk.store(i, self._rounded(x.load(at, LANES).cast(F32), at))
            found = [self.chunk.gather(place) for place in self.places]
            target = self.numbers.at(loop.i * (self.vectors * LANES))
            for i, vector in enumerate(found):
                target.store(i * LANES, vector)
            each = len(found) // begins if begins else 0
            for i in range(begins):
                total = found[i * each]
                for vector in found[i * each + 1 : (i + 1) * each]:
                    total = total + vector
                target.store((len(found) + i) * LANES, total * float(-zero))

    def _find_factors(self, factors: Buffer, x: Buffer) -> None:
        """As `codegen.nvptx.kernels.quantize_rows`: a scale is the largest magnitude of its group / 127; a group of
        zeros has factor and scale 0."""
        k, none = self.k, self.k.constant(_NUMBERS, 0.0)
        with k.loop(0, self.layout.k // self.group) as group:
            with k.loop(0, self.group // LANES, 1, [none]) as loop:
                values = x.load(group.i * self.group + loop.i * LANES, LANES).cast(F32)
                loop.carry(loop.carried[0].max(values.max(none - values)))
            most = loop.results[0].reduce("max")
            factors.store(group.i * 2, k.select(most.compare("gt", 0.0), LARGEST_CODE / most, 0.0))
            factors.store(group.i * 2 + 1, most * (1.0 / LARGEST_CODE))

    def _rounded(self, values: Expr, column: Expr) -> Expr:
        """Numbers from a column on, as their codes stand for them."""
        k, factors = self.k, self.factors
        if factors is None:
            return values
        group = column // self.group
        code = k.round(values * k.splat(factors.load(group * 2), LANES))
        return code * k.splat(factors.load(group * 2 + 1), LANES)

    def of_chunk(self, chunk: Expr) -> tuple[list[Expr], list[Expr]]:
        """Its vectors, and those that sums begin with."""
        target = self.numbers.at(chunk * (self.vectors * LANES))
        loaded = [target.load(i * LANES, LANES) for i in range(self.vectors)]
        return loaded[: len(self.places)], loaded[len(self.places) :]


class _Tile:
    """Sums of the 16 rows of a tile."""

    def __init__(
        self, k: KernelBuilder, layout: Fragments, codes: Buffer, scales: Buffer | None, spread: _Spread
    ) -> None:
        self.k, self.layout, self.codes, self.scales, self.spread = k, layout, codes, scales, spread
        self.out = k.scratch(TILE, F32)
        self.factors = k.scratch(2 * TILE, F32)  # of a chunk: by g, row, group
        lane = k.iota(LANES)
        zero = k.constant(_WORDS, 0)
        self.second_segment = (lane & 2).compare("ne", zero)  # in 4 bits
        self.second_row = (lane & 1).compare("ne", zero)  # in 16 bits
        self.zero = k.constant(_NUMBERS, 0.0)

    def sums(self, tile: Expr) -> Buffer:
        """The 16 numbers of the tile for the row of x that is laid out."""
        k, layout = self.k, self.layout
        count = HALF if layout.bits == 16 else TILE
        with k.loop(0, layout.chunks, 1, [self.zero] * count) as loop:
            loop.carry(*self._chunk(tile, loop.i, loop.carried))
        for i, total in enumerate(loop.results):
            if layout.bits == 16:
                self.out.store(i, k.select(self.second_row, self.zero, total).reduce("add"))
                self.out.store(i + HALF, k.select(self.second_row, total, self.zero).reduce("add"))
            else:
                self.out.store(i, total.reduce("add"))
        return self.out

    def _chunk(self, tile: Expr, chunk: Expr, sums: Sequence[Expr]) -> list[Expr]:
        layout = self.layout
        begin = (tile * layout.chunks + chunk) * (layout.loads * 128)
        vectors, starts = self.spread.of_chunk(chunk)
        if self.scales is not None:
            self._load_factors(self.scales, tile, chunk)
        made = list(sums)
        for g in range(HALF):
            words = [self.codes.load(begin + load * 128 + g * LANES, LANES) for load in range(layout.loads)]
            if layout.bits == 16:
                made[g] = self._of_16_bits(words, vectors, made[g])
                continue
            for row in range(2):
                of = self._of_4_bits if layout.bits == 4 else self._of_8_bits
                made[g + HALF * row] = of(words, vectors, starts, g, row, made[g + HALF * row])
        return made

    def _load_factors(self, scales: Buffer, tile: Expr, chunk: Expr) -> None:
        """The scales of a chunk in f32."""
        layout = self.layout
        units, each = layout.chunks // layout.chunks_of_unit, TILE * layout.groups_of_unit
        begin = (tile * units + chunk // layout.chunks_of_unit) * each
        for i in range(0, each, LANES):
            self.factors.store(i, scales.load(begin + i, LANES).cast(F32))

    def _factor(self, g: int, row: int, group: int) -> Expr:
        of_unit = self.layout.groups_of_unit
        return self.k.splat(self.factors.load((g * 2 + row) * of_unit + group * (of_unit - 1)), LANES)

    def _of_4_bits(
        self, words: Sequence[Expr], vectors: Sequence[Expr], starts: Sequence[Expr], g: int, row: int, total: Expr
    ) -> Expr:
        """Code i of a word is in bits 4 * (i / 2) + 16 * (i % 2), and belongs to row i / 2 % 2."""
        k, part = self.k, starts[0]
        for c in range(4):
            i = 4 * (c // 2) + 2 * row + c % 2
            code = words[0].shifted_right(4 * (i // 2) + 16 * (i % 2)) & 15
            part = k.fma(code.cast(F32), vectors[c], part)
        factor = self._factor(g, row, 0)
        if self.layout.groups_of_unit == 2:
            factor = k.select(self.second_segment, self._factor(g, row, 1), factor)
        return k.fma(part, factor, total)

    def _of_8_bits(
        self, words: Sequence[Expr], vectors: Sequence[Expr], starts: Sequence[Expr], g: int, row: int, total: Expr
    ) -> Expr:
        """Bytes 0 and 1 of a word belong to row g, 2 and 3 to row g + 8."""
        k = self.k
        for s in range(2):
            part = starts[s]
            for b in range(2):
                code = words[s].shifted_right(16 * row + 8 * b) & 255
                part = k.fma(code.cast(F32), vectors[2 * s + b], part)
            total = k.fma(part, self._factor(g, row, s), total)
        return total

    def _of_16_bits(self, words: Sequence[Expr], vectors: Sequence[Expr], total: Expr) -> Expr:
        """A word has two columns; odd lanes belong to row g + 8."""
        k = self.k
        for number, word in enumerate(words):
            low, high = word.shifted_left(16), word & -65536
            total = k.fma(low.bitcast(_NUMBERS), vectors[2 * number], total)
            total = k.fma(high.bitcast(_NUMBERS), vectors[2 * number + 1], total)
        return total
