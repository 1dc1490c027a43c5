"""Products in f32: y[m, n] = x[m, k] w[n, k]. Routers are such, which stay wide beside narrow weights.

A warp makes one column of y for some rows: each lane takes 4 neighbouring columns of w at a time, and the warp adds up.
Refused: k that is no multiple of 4.
"""

from __future__ import annotations

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.tile_builder import Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F32

LANES = 4
WARPS = 4  # columns of y that a block makes


def wide_blocks(m: int, n: int, rows: int) -> int:
    """Blocks of the launch for y [m, n]."""
    return -(-m // rows) * -(-n // WARPS)


def wide_kernel(n: int, k: int, name: str, *, rows: int = 1) -> GridKernel:
    """A kernel (x f32 [m, k], w f32 [n, k], y f32 [m, n], m), launched with `wide_blocks(m, n, rows)` blocks, of which
    each takes `rows` rows of x."""
    if k % LANES or k == 0:
        raise DiagnosticError(f"a product of f32 weights of {k} columns on GPUs", expected=f"a multiple of {LANES}")
    b = GridBuilder(name, WARPS * WARP)
    x, w, y, m = b.buffer("x", F32), b.buffer("w", F32), b.buffer("y", F32), b.size("rows")
    across = -(-n // WARPS)
    lane, warp = b.lane_and_warp()
    column, first = b.block_id() % across * WARPS + warp, b.block_id() // across * rows
    with b.when(column.compare("lt", n)):
        starts = [(first + i).min(m - 1) * k for i in range(rows)]
        with b.loop(lane * LANES, k, WARP * LANES, [b.f32(0.0, LANES)] * rows) as loop:
            weights = w.load(column * k + loop.i, LANES)
            loop.carry(
                *(b.fma(x.load(s + loop.i, LANES), weights, c) for s, c in zip(starts, loop.carried, strict=True))
            )
        totals = [b.warp_reduce(total.reduce("add"), Expr.__add__) for total in loop.results]
        for i, total in enumerate(totals):
            with b.when(lane.compare("eq", i) & (first + i).compare("lt", m)):
                y.store((first + i) * n + column, total)
    return b.grid_kernel()
