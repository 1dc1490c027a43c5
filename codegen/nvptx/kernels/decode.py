"""Products of a few rows of activations with a weight matrix, for decoding: y[m, n] = x[m, k] w[n, k], m <= 16.

What counts is that every byte of w is read once, in loads of 16 bytes of which several are under way. A block makes 16
columns of y; its warps take chunks of 64 columns of w in turn and add up what they have at the end. Codes become bf16
in registers (exactly) and go through the matrix unit, whose 8 columns are the rows of x; the scales of a group multiply
the sum over that group. Weights lie in the order of `codegen.nvptx.fragments`.

With `gate_up` rows of w are in turns (`codegen.nvptx.kernels.gate`): a lane has both numbers of a result.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.fragments import CHUNK, SEGMENT, TILE, Fragments
from codegen.nvptx.kernels.gate import check_gate_up, gated
from codegen.nvptx.kernels.weight_factors import add_scaled, left_factor
from codegen.tile_builder import Buffer, Expr
from ir.formats import BF16, F32, I32, PlainFormat

ROWS = 8  # of x that one product of the matrix unit takes
WARPS = 8
MAX_ROWS = 16


def decode_kernel(
    layout: Fragments, name: str, *, rows: int = ROWS, warps: int = WARPS, ahead: int = 0, out: PlainFormat = F32,
    gate_up: bool = False,
) -> GridKernel:  # fmt: skip
    """A kernel (codes i32, [scales,] x bf16 [m, k], y f32 or bf16 [m, n], m) for up to `rows` rows, 8 or 16.

    It is launched with `layout.tiles` blocks. `ahead` chunks of a warp are loaded at once (0: 64 bytes a lane or more).
    With `gate_up` y is [m, n / 2].
    """
    k = GridBuilder(name, warps * WARP)
    codes = k.buffer("codes", I32)
    scales = k.buffer("scales", layout.scale_element) if layout.group else None
    x, y, count = k.buffer("x", BF16), k.buffer("y", out), k.size("rows")
    part = DecodePart(k.block_id(), count, k.index(0))
    DecodeProduct(k, layout, (codes, scales), (x, y), part, rows, gate_up).build(ahead)
    return k.grid_kernel(blocks_at_once=blocks_at_once(rows))


def blocks_at_once(rows: int) -> int:
    """Blocks of a multiprocessor, as registers allow."""
    return 3 if rows == ROWS else 2


@dataclass(frozen=True)
class DecodePart:
    """What a block makes of y: 16 columns from those of the weights' tile `tile` on, `count` rows from `first` on.

    Row r of them is made of row `source(r)` of x, of row r without it.
    """

    tile: Expr
    count: Expr
    first: Expr
    source: Callable[[Expr], Expr] | None = None


class DecodeProduct:
    """One thread's view: lane 4g + q of a warp."""

    def __init__(
        self, k: GridBuilder, layout: Fragments, weights: tuple[Buffer, Buffer | None], numbers: tuple[Buffer, Buffer],
        part: DecodePart, rows: int, gate_up: bool = False,
    ) -> None:  # fmt: skip
        assert rows in (ROWS, MAX_ROWS)
        if gate_up:
            check_gate_up(layout.n)
        self.k, self.layout, self.gate_up = k, layout, gate_up
        (self.codes, self.scales), (self.x, self.y) = weights, numbers
        self.tile, self.count, self.first, self.parts = part.tile, part.count, part.first, rows // ROWS
        self.lane, self.warp = k.lane_and_warp()
        self.g, self.q = self.lane // 4, self.lane % 4
        own = [(self.g + p * ROWS).min(self.count - 1) for p in range(self.parts)]  # what is not there repeats the last
        self.row_of_x = part.source or (lambda row: row)
        self.places = [self.row_of_x(row) * layout.k for row in own]

    def build(self, ahead: int = 0) -> None:
        ahead = ahead or max(2, 4 // self.layout.loads)
        k, warps = self.k, self.k.threads // WARP
        chunks = self.layout.chunks
        sums = [k.f32(0.0, 4) for _ in range(self.parts)]
        together = warps * ahead
        # Warp w takes chunks w, w + warps, ...: as often as all of `ahead` chunks are there, then one by one.
        rest = (chunks - warps * (ahead - 1) - self.warp).max(0)
        rounds = (rest + (together - 1)) // together
        with k.loop(0, rounds, 1, sums) as loop:
            first = loop.i * together + self.warp
            loop.carry(*self._add([first + i * warps for i in range(ahead)], loop.carried))
        with k.loop(rounds * together + self.warp, chunks, warps, loop.results) as last:
            last.carry(*self._add([last.i], last.carried))
        self._write(last.results)

    def _add(self, chunks: list[Expr], sums: list[Expr]) -> list[Expr]:
        """The sums with these chunks. All loads come first."""
        words = [self._words(chunk) for chunk in chunks]
        scales = [self._scales(chunk) for chunk in chunks]
        xs = [[self._activations(chunk, part) for part in range(self.parts)] for chunk in chunks]
        for w, scale, x in zip(words, scales, xs, strict=True):
            sums = self._add_chunk(w, scale, x, sums)
        return sums

    def _words(self, chunk: Expr) -> list[Expr]:
        """A lane's part of a chunk, 4 words for each load."""
        at = ((self.tile * self.layout.chunks + chunk) * self.layout.loads * WARP + self.lane) * 4
        return [self.codes.load(at + load * WARP * 4, 4) for load in range(self.layout.loads)]

    def _scales(self, chunk: Expr) -> Expr | None:
        """Of rows g and g + 8 by group, f32."""
        if self.scales is None:
            return None
        layout = self.layout
        units = layout.chunks // layout.chunks_of_unit
        lanes = 2 * layout.groups_of_unit
        at = ((self.tile * units + chunk // layout.chunks_of_unit) * 8 + self.g) * lanes
        return self.scales.load(at, lanes).cast(F32)

    def _activations(self, chunk: Expr, part: int) -> list[Expr]:
        """Of each segment 8 neighbours of this lane's row."""
        return [self.x.load(self.places[part] + self._column(chunk, s), 8) for s in range(2)]

    def _column(self, chunk: Expr, s: int) -> Expr:
        """The first of 8 neighbours of a segment. Where the row has none, weights are 0 and it is the last eight's."""
        column = chunk * CHUNK + self.q * 8 + s * SEGMENT
        return column.min(self.layout.k - 8) if self.layout.ragged else column

    def _add_chunk(self, words: list[Expr], scale: Expr | None, xs: list[list[Expr]], sums: list[Expr]) -> list[Expr]:
        k, layout = self.k, self.layout
        shared = scale is not None and layout.groups_of_unit == 1
        partial = [k.f32(0.0, 4)] * self.parts if shared else sums
        for s in range(2):
            if scale is not None and not shared:
                partial = [k.f32(0.0, 4)] * self.parts
            for m in range(2):
                a = left_factor(k, layout, words, s, m)
                partial = [k.mma(p, a, k.part(x[s], 4 * m, 4)) for p, x in zip(partial, xs, strict=True)]
            if scale is not None and (s == 1 or not shared):
                group = 0 if shared else s
                sums = [add_scaled(k, layout, t, p, scale, group) for t, p in zip(sums, partial, strict=True)]
        return sums if scale is not None else partial

    def _write(self, sums: list[Expr]) -> None:
        """Adds up the warps through shared memory, in their order, and stores what lies inside of y."""
        k, warps = self.k, self.k.threads // WARP
        width = self.parts * TILE * ROWS
        work = k.shared(warps * width, F32)
        for part, total in enumerate(sums):
            work.store((self.warp * self.parts + part) * (TILE * ROWS) + self.lane * 4, total)
        k.barrier()
        together = 4 if self.gate_up else 1  # elements of a lane that a thread takes
        with k.loop(k.thread_id(), width // together, k.threads) as loop:
            at = loop.i * together
            total = work.load(at, together)
            for warp in range(1, warps):
                total = total + work.load(at + warp * width, together)
            lane = at // 4 % WARP
            row = at // (TILE * ROWS) * ROWS + lane % 4 * 2
            if self.gate_up:
                both = gated(k, k.part(total, 0, 2), k.part(total, 2, 2))
                for i in range(2):
                    self._store(row + i, self.tile * (TILE // 2) + lane // 4, both.extract(i))
            else:
                element = at % 4
                self._store(row + element % 2, self.tile * TILE + lane // 4 + element // 2 * 8, total)

    def _store(self, row: Expr, column: Expr, value: Expr) -> None:
        k, width = self.k, self.layout.n // (2 if self.gate_up else 1)
        with k.when(row.compare("lt", self.count)), k.when(column.compare("lt", width)):
            self.y.store((self.first + row) * width + column, value.cast(self.y.element))
