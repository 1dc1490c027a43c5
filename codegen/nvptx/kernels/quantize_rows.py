"""Rows of activations rounded to 8 bits under scales, or put in order, for the products that read them."""

from __future__ import annotations

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.int8 import ActivationScales
from codegen.nvptx.kernels.row_tiles import RowTiles
from codegen.tile_builder import Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F8E4M3, F32, I8, I32, PlainFormat
from ir.types import VectorType

_LARGEST = {I8: 127.0, F8E4M3: 448.0}
LANES = 8  # neighbouring columns of a thread
_THREADS = 256


def quantize_rows_kernel(
    x_scales: ActivationScales,
    name: str,
    element: PlainFormat = F32,
    to: PlainFormat = I8,
    tiles: RowTiles | None = None,
) -> GridKernel:
    """A kernel (x [m, k] of `element`, codes i8 or f8e4m3, scales f32, m), a block for each row of the codes.

    A scale is the largest magnitude of its group / 127, or 448; codes are the nearest numbers of scales. They lie as
    x does, or as `tiles` says, with `tiles.rows(m)` rows: what is behind the last row repeats it.
    """
    group = x_scales.group
    if group & (group - 1) or group > WARP * LANES:
        message = f"activations are rounded in groups of {group} columns"
        raise DiagnosticError(message, expected=f"a power of two of at most {WARP * LANES}, or whole rows")
    assert tiles is None or (tiles.element, tiles.gathered) == (to, x_scales.by_row)
    limit = _LARGEST[to]
    k = GridBuilder(name, _THREADS)
    x, codes, scales, m = k.buffer("x", element), k.buffer("codes", to), k.buffer("scales", F32), k.size("rows")
    work = k.shared(_THREADS // WARP, F32)
    row, width = k.block_id(), x_scales.k
    stored = width if tiles is None else tiles.padded
    source = (row if tiles is None or tiles.gathered else row.min(m - 1)) * width
    own = k.thread_id() * LANES

    def load(column: Expr) -> Expr:
        return x.load(source + column.min(width - LANES), LANES).cast(F32)

    def largest(values: Expr) -> Expr:
        return values.max(k.f32(0.0, LANES) - values).reduce("max")

    def store(column: Expr, values: Expr, most: Expr) -> None:
        """A row of zeros has scale 0 and codes 0; so have columns behind it."""
        some = most.compare("gt", 0.0)
        factor = k.select(some if stored == width else some & column.compare("lt", width), limit / most, 0.0)
        with k.when(column.compare("lt", stored)):
            numbers = values * factor
            made = (k.round(numbers) if to == I8 else numbers).cast(to)
            if tiles is None:
                codes.store(row * width + column, made)
            else:
                tiles.store(k, codes, row, column, made, m)

    def combine(a: Expr, b: Expr) -> Expr:
        return a.max(b)

    if group:
        with k.loop(0, -(-stored // (_THREADS * LANES))) as loop:
            column = own + loop.i * (_THREADS * LANES)
            values = load(column)
            most = k.warp_reduce(largest(values), combine, group // LANES)
            store(column, values, most)
            with k.when((column % group).compare("eq", 0) & column.compare("lt", width)):
                scales.store(x_scales.place(column // group, row, m), most * (1.0 / limit))
        return k.grid_kernel()
    with k.loop(own, width, _THREADS * LANES, [k.f32(0.0)]) as loop:
        loop.carry(loop.carried[0].max(largest(load(loop.i))))
    lane, warp = k.lane_and_warp()
    most = k.warp_reduce(loop.results[0], combine)
    with k.when(lane.compare("eq", 0)):
        work.store(warp, most)
    k.barrier()
    for other in range(_THREADS // WARP):
        most = most.max(work.load(other))
    with k.loop(own, stored, _THREADS * LANES) as loop:
        store(loop.i, load(loop.i), most)
    with k.when(k.thread_id().compare("eq", 0)):
        scales.store(x_scales.place(k.index_value(0), row, m), most * (1.0 / limit))
    return k.grid_kernel()


def arrange_rows_kernel(tiles: RowTiles, name: str) -> GridKernel:
    """A kernel (x [m, k], y, m) that puts rows where `tiles` says, a block for each of `tiles.rows(m)` rows."""
    if tiles.k % LANES:
        raise DiagnosticError(f"rows of {tiles.k} columns as tiles", expected=f"a multiple of {LANES}")
    k = GridBuilder(name, _THREADS)
    x, y, m = k.buffer("x", tiles.element), k.buffer("y", tiles.element), k.size("rows")
    row = k.block_id()
    source = row.min(m - 1) * tiles.k
    with k.loop(k.thread_id() * LANES, tiles.padded, _THREADS * LANES) as loop:
        numbers = x.load(source + loop.i.min(tiles.k - LANES), LANES)
        if tiles.padded != tiles.k:
            words = numbers.bitcast(VectorType(LANES * tiles.element.bits // 32, I32))
            numbers = k.select(loop.i.compare("lt", tiles.k), words, 0).bitcast(numbers.type)
        tiles.store(k, y, row, loop.i, numbers, m)
    return k.grid_kernel()
