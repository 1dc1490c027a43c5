"""Products of activations of 8 bits with weights of 8 or 4: y[m, n] = x[m, k] w[n, k] with sums in i32, then f32.

A row of x has a scale for `group` columns or for all (`ActivationScales`); `codegen.nvptx.kernels.quantize_rows` makes
both. The weights are those of `codegen.nvptx.fragments`, the same bytes as for products in bf16, as i8 in registers.
A sum of at most 64 columns stays below 2**22: begun with the bits of 1.5 * 2**23 it is a number in f32 without a
conversion. Weights in f8e4m3 meet activations in f8e4m3, with sums in f32, from sm_89 on.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.fragments import CHUNK, SEGMENT, Fragments
from codegen.nvptx.kernels.decode import ROWS, WARPS, DecodePart, DecodeProduct, blocks_at_once
from codegen.nvptx.kernels.gemm_packed import PackedGemm, PackedShape, PackedTile
from codegen.nvptx.kernels.weight_factors import add_int8, int8_left, int8_right, int8_zero
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F8E4M3, F32, I8, I32, PlainFormat

_MANY = PackedShape()
_QUAD = 4  # scales that are copied together
_COPY = 16  # activations that are


@dataclass(frozen=True)
class ActivationScales:
    """Scales of x [m, k]: f32 [groups, m rounded up to a multiple of `rows`], so that those of a block are neighbours.

    With `by_row` f32 [m, groups rounded up to a multiple of 4]: those of a row are, for rows that are gathered.
    """

    k: int
    group: int = 0  # columns that share a scale, 0 for whole rows
    by_row: bool = False
    rows: int = _QUAD

    def __post_init__(self) -> None:
        fits = self.group in (0, SEGMENT) or self.group % CHUNK == 0
        if not fits or self.k % (self.group or 1) or self.k % _COPY:
            raise DiagnosticError(
                f"activations of 8 bits and {self.k} columns in groups of {self.group} have no product on GPUs",
                expected=f"a multiple of {_COPY} columns, in whole rows or groups of {SEGMENT} or a multiple of {CHUNK}"
                " that divides them",
            )

    @property
    def groups(self) -> int:
        return self.k // self.group if self.group else 1

    @property
    def row(self) -> int:
        """Numbers of a row where those of a row are neighbours."""
        return -(-self.groups // _QUAD) * _QUAD

    def count(self, m: int) -> int:
        """How many there are for m rows."""
        return m * self.row if self.by_row else self.groups * -(-m // self.rows) * self.rows

    def stride(self, m: Expr) -> Expr:
        """From a row's scale to that of its next group, where those of a block are neighbours."""
        return (m + (self.rows - 1)) // self.rows * self.rows

    def place(self, group: Expr, row: Expr, m: Expr) -> Expr:
        """Where the scale of a row's group lies; `m` rows there are."""
        return row * self.row + group if self.by_row else group * self.stride(m) + row

    @property
    def each(self) -> int:
        """Groups of a chunk of columns: one, or one for each segment."""
        return 2 if self.group == SEGMENT else 1

    def units(self, chunk: Expr) -> list[Expr]:
        """The groups of a chunk. Where the row has none, weights are 0 and it is the last group."""
        if not self.group:
            return [chunk * 0]
        if self.each == 1:
            return [chunk // (self.group // CHUNK)]
        return [chunk * 2, (chunk * 2 + 1).min(self.groups - 1)]


def check_int8(layout: Fragments) -> None:
    """Raises DiagnosticError for weights that are no integers."""
    if not layout.group:
        raise DiagnosticError("int8 activations meet weights in bf16 on GPUs", expected="weights in q4_sym or q8_sym")


def element_of_x(layout: Fragments) -> PlainFormat:
    """What activations are rounded to."""
    return F8E4M3 if layout.fp8 else I8


def _buffers(k: GridBuilder, layout: Fragments) -> tuple[Buffer, Buffer, Buffer, Buffer]:
    """Codes and scales of w, those of x."""
    codes, scales = k.buffer("codes", I32), k.buffer("scales", layout.scale_element)
    return codes, scales, k.buffer("x", element_of_x(layout)), k.buffer("xs", F32)


def decode_int8_kernel(
    layout: Fragments,
    x_scales: ActivationScales,
    name: str,
    *,
    rows: int = ROWS,
    warps: int = WARPS,
    ahead: int = 0,
    out: PlainFormat = F32,
    gate_up: bool = False,
) -> GridKernel:
    """A kernel (codes i32, scales, x i8 or f8e4m3 [m, k], x_scales f32, y f32 or bf16 [m, n], m) for `rows` rows.

    It is launched with `layout.tiles` blocks, as that of bf16 (`codegen.nvptx.kernels.decode`).
    """
    check_int8(layout)
    k = GridBuilder(name, warps * WARP)
    codes, scales, x, held = _buffers(k, layout)
    y, count = k.buffer("y", out), k.size("rows")
    part = DecodePart(k.block_id(), count, k.index(0))
    DecodeInt8(k, layout, (codes, scales), (x, y), part, rows, gate_up).with_scales(x_scales, held).build(ahead)
    return k.grid_kernel(blocks_at_once=blocks_at_once(rows))


class DecodeInt8(DecodeProduct):
    """A product of a few rows of int8 or f8e4m3; rows that are gathered have their scales by row."""

    x_scales: ActivationScales
    of_x: Buffer

    def with_scales(self, x_scales: ActivationScales, of_x: Buffer) -> DecodeInt8:
        """With the scales of x, before `build`."""
        self.x_scales, self.of_x = x_scales, of_x
        parts = [self.q * 2 + part * ROWS for part in range(self.parts)]
        if x_scales.by_row:
            self.scale_rows = [[self.row_of_x((first + i).min(self.count - 1)) for i in range(2)] for first in parts]
        else:
            self.scale_rows = [[first.min(x_scales.stride(self.count) - 2)] for first in parts]
        return self

    def _activations(self, chunk: Expr, part: int) -> list[Expr]:
        """Of each segment 8 neighbours of this lane's row; then the scales of rows 2q and 2q + 1, twice."""
        k, words = self.k, self.x.view(I32)
        places = [(self.places[part] + self._column(chunk, s)) // 4 for s in range(2)]
        right = [int8_right(k, self.layout, words.load(at, 2)) for at in places]
        rows = self.scale_rows[part]
        lanes = 2 // len(rows)
        for group in self.x_scales.units(chunk):
            both = [self.of_x.load(self.x_scales.place(group, row, self.count), lanes) for row in rows]
            right.append(k.join(*both, *both))
        return right

    def _add_chunk(self, words: list[Expr], scale: Expr | None, xs: list[list[Expr]], sums: list[Expr]) -> list[Expr]:
        assert scale is not None
        left = [int8_left(self.k, self.layout, words, s) for s in range(2)]
        return [_add_columns(self.k, self.layout, t, left, x[:2], scale, x[2:]) for t, x in zip(sums, xs, strict=True)]


def _add_columns(
    k: GridBuilder, layout: Fragments, total: Expr, left: list[Expr], right: list[Expr], scale: Expr,
    x_scales: list[Expr],
) -> Expr:  # fmt: skip
    """total and the products of a chunk; segments are apart where their scales are."""
    partial, groups = int8_zero(k, layout), layout.groups_of_unit
    apart = groups == 2 or len(x_scales) == 2
    for s in range(2):
        partial = k.mma(partial, left[s], right[s])
        if apart or s == 1:
            total = add_int8(k, layout, total, partial, scale, s % groups, x_scales[s % len(x_scales)])
            partial = int8_zero(k, layout)
    return total


def gemm_int8_kernel(
    layout: Fragments,
    x_scales: ActivationScales,
    name: str,
    shape: PackedShape = _MANY,
    out: PlainFormat = F32,
    *,
    gate_up: bool = False,
) -> GridKernel:
    """A kernel (codes i32, scales, x i8 or f8e4m3 [m, k], x_scales f32, y f32 or bf16 [m, n], m) for any m.

    It is launched with `shape.blocks(m, layout)` blocks, as that of bf16 (`codegen.nvptx.kernels.gemm_packed`).
    """
    check_int8(layout)
    b = GridBuilder(name, shape.threads)
    codes, scales, x, held = _buffers(b, layout)
    y, m = b.buffer("y", out), b.size("rows")
    block, down = b.block_id(), (m + (shape.rows - 1)) // shape.rows
    tile = PackedTile(block % down * shape.rows, m, block // down * shape.tiles)
    GemmInt8(b, shape, layout, (codes, scales), (x, y), tile, gate_up).with_scales(x_scales, held).build()
    return b.grid_kernel()


class GemmInt8(PackedGemm):
    """A product of many rows of int8 or f8e4m3; rows that are gathered have their scales by row."""

    x_scales: ActivationScales
    of_x: Buffer

    @property
    def element(self) -> PlainFormat:
        return element_of_x(self.layout)

    def with_scales(self, x_scales: ActivationScales, of_x: Buffer) -> GemmInt8:
        """With the scales of x, before `build`."""
        self.x_scales, self.of_x = x_scales, of_x
        held = self.shape.stages * self.shape.rows * (_QUAD if x_scales.by_row else x_scales.each)
        self.held_of_x = self.b.shared(held, F32)
        self.scale_rows = []
        if x_scales.by_row:
            shared = self._share(self.shape.rows)
            self.scale_rows = [self.row_of_x(self.row + number) * x_scales.row for number, _ in shared]
        return self

    def _fetch_more(self, chunk: Expr, stage: Expr, there: Expr) -> None:
        """The scales of the block's rows of x: of four rows at once, or by row those of four groups."""
        groups = self.x_scales.units(chunk)
        if self.x_scales.by_row:
            for (number, here), first in zip(self._share(self.shape.rows), self.scale_rows, strict=True):
                inside = there & (self.row + number).compare("lt", self.m)
                at = (stage * self.shape.rows + number) * _QUAD
                self._copy(self.held_of_x, at, self.of_x, first + groups[0] // _QUAD * _QUAD, inside, here)
            return
        stride = self.x_scales.stride(self.m)
        for i, group in enumerate(groups):
            first = group * stride + self.row
            for number, here in self._share(self.shape.rows // _QUAD):
                inside = there & (self.row + number * _QUAD).compare("lt", stride)
                at = (stage * len(groups) + i) * self.shape.rows + number * _QUAD
                self._copy(self.held_of_x, at, self.of_x, first + number * _QUAD, inside, here)

    def _x_scale(self, stage: Expr, part: int, groups: list[Expr], i: int) -> Expr:
        """Of rows 2q and 2q + 1 of a part in group i of a chunk, twice."""
        row = self.warp_row + part * ROWS + self.lane % 4 * 2
        if not self.x_scales.by_row:
            both = self.held_of_x.load((stage * len(groups) + i) * self.shape.rows + row, 2)
            return self.b.join(both, both)
        first = stage * self.shape.rows + row
        low, high = (self.held_of_x.load((first + r) * _QUAD + groups[i] % _QUAD) for r in range(2))
        return self.b.join(low, high, low, high)

    def _place(self, stage: Expr, row: Expr, piece: Expr) -> Expr:
        """Lanes read half of each of four rows of 64 bytes at once: rows 2 and 3 change their halves."""
        return ((stage * self.shape.rows + row) * self.pieces + self.b.xor(piece, row // 2 % 2 * 2)) * self.piece

    def _multiply(self, chunk: Expr, stage: Expr, sums: list[Expr]) -> list[Expr]:
        groups = self.x_scales.units(chunk)
        b, shape, layout = self.b, self.shape, self.layout
        left, scales = [], []
        for t in range(shape.warp_tiles):
            words, scale = self._words(stage, t), self._scales(stage, t)
            assert scale is not None
            left.append([int8_left(b, layout, words, s) for s in range(2)])
            scales.append(scale)
        words_of_x, made = self.held_x.view(I32), list(sums)
        for part in range(shape.warp_rows // ROWS):
            row = self.warp_row + part * ROWS + self.lane // 4
            right = []
            for s in range(2):
                at = self._place(stage, row, self.lane % 4 // 2 + s * 2) // 4 + self.lane % 2 * 2
                right.append(int8_right(b, layout, words_of_x.load(at, 2)))
            x_scales = [self._x_scale(stage, part, groups, i) for i in range(len(groups))]
            for t in range(shape.warp_tiles):
                at = part * shape.warp_tiles + t
                made[at] = _add_columns(b, layout, made[at], left[t], right, scales[t], x_scales)
        return made
