"""Matrix products of many rows on sm_90a: y[m, n] = x[m, k] w[n, k] in bf16 by products of warpgroups (wgmma).

A block makes 64 rows of y for each of its warpgroups and `columns` columns. The weights lie as tiles of 64 rows and 64
columns whose pieces are swizzled as shared memory has them (`swizzled_tiles`): one bulk copy of 8 KiB brings a tile, a
barrier counts its bytes, one thread starts it. Rows of x come by copies of 16 bytes, each to its swizzled place. A
product is started when its stage is there and waited for one stage later: two are under way. Refused: k or n that is no
multiple of 64 or 8.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from codegen.nvptx.builder import GridBuilder, GridKernel
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I64, PlainFormat
from ir.ops.grid_warpgroup import DEPTH, ROWS, WARPGROUP

PIECE = 8  # elements of a copy of 16 bytes
PIECES = DEPTH // PIECE
TILE = ROWS * DEPTH  # elements of a tile of weights


@dataclass(frozen=True)
class WgmmaShape:
    """Warpgroups of a block, its columns of y, and how many stages of x and w are in shared memory."""

    groups: int = 2
    columns: int = 256
    stages: int = 4

    @property
    def rows(self) -> int:
        return self.groups * ROWS

    def blocks(self, m: int, n: int) -> int:
        """Blocks of the launch for y [m, n]."""
        return -(-m // self.rows) * -(-n // self.columns)


def swizzled_tiles(w: np.ndarray) -> np.ndarray:
    """bf16 [ceil(n / 64), k / 64, 64, 64] of w [n, k]: piece p of row r of a tile at piece p xor (r mod 8)."""
    n, k = w.shape
    padded = np.zeros((-(-n // ROWS) * ROWS, k), w.dtype)
    padded[:n] = w
    tiles = padded.reshape(-1, ROWS, k // DEPTH, PIECES, PIECE).swapaxes(1, 2)
    rows = np.arange(ROWS)[:, None]
    return np.ascontiguousarray(tiles[:, :, rows, np.arange(PIECES) ^ rows % 8]).reshape(-1, k // DEPTH, ROWS, DEPTH)


def gemm_wgmma_kernel(
    n: int, k: int, name: str, shape: WgmmaShape = WgmmaShape(), out: PlainFormat = F32
) -> GridKernel:
    """A kernel (x bf16 [m, k], w = swizzled_tiles, y f32 or bf16 [m, n], m) of `shape.blocks(m, n)` blocks."""
    if n % PIECE or k % DEPTH or k == 0:
        raise DiagnosticError(
            f"a product of {n} x {k} weights on sm_90a", expected=f"multiples of {PIECE} rows and {DEPTH} columns"
        )
    assert shape.columns % ROWS == 0 and shape.columns <= 256 and shape.stages >= 3
    b = GridBuilder(name, shape.groups * WARPGROUP)
    x, w, y, m = b.buffer("x", BF16), b.buffer("w", BF16), b.buffer("y", out), b.size("rows")
    _WgmmaKernel(b, shape, (x, w, y), (m, n, k)).build()
    return b.grid_kernel()


class _WgmmaKernel:
    def __init__(
        self, b: GridBuilder, shape: WgmmaShape, buffers: tuple[Buffer, Buffer, Buffer], sizes: tuple[Expr, int, int]
    ) -> None:
        self.b, self.shape = b, shape
        (self.x, self.w, self.y), (self.m, self.n, self.k) = buffers, sizes
        self.steps = self.k // DEPTH
        self.thread = b.thread_id()
        self.group = self.thread // WARPGROUP
        block, down = b.block_id(), (self.m + (shape.rows - 1)) // shape.rows
        self.row, self.column = block % down * shape.rows, block // down * shape.columns
        self.held_x = b.shared(shape.stages * shape.rows * DEPTH, BF16)
        self.held_w = b.shared(shape.stages * shape.columns * DEPTH, BF16)
        self.barriers = b.shared(shape.stages, I64)

    def build(self) -> None:
        b, shape, stages = self.b, self.shape, self.shape.stages
        ahead = stages - 2  # of a step: the two stages before it are read by products that may go on
        with b.when(self.thread.compare("lt", stages)):
            b.init_barrier(self.barriers, self.thread)
        b.barrier()
        for stage in range(ahead):
            self._fetch(b.index_value(stage), b.index_value(stage))
        zero = b.index_value(0)
        sums = b.f32(0.0, shape.columns // 2)
        with b.loop(0, self.steps, 1, [zero, zero, sums]) as loop:
            stage, parity, sums = loop.carried
            b.async_wait(ahead - 1)
            b.fence_async()
            b.wait_barrier(self.barriers, stage, parity)
            b.barrier()  # this stage is there for all; products with the one to be filled are done
            x_tile = (stage * shape.rows + self.group * ROWS) * DEPTH
            sums = b.group_mma(sums, self.held_x, x_tile, self.held_w, stage * (shape.columns * DEPTH))
            later = stage + ahead
            self._fetch(loop.i + ahead, b.select(later.compare("lt", stages), later, later - stages))
            sums = b.wait_mma(sums, 1)
            last = stage.compare("eq", stages - 1)
            loop.carry(b.select(last, zero, stage + 1), b.select(last, 1 - parity, parity), sums)
        self._write(b.wait_mma(loop.results[2], 0))

    def _fetch(self, step: Expr, stage: Expr) -> None:
        """Starts the copies of a step into a stage; zeros where x ends."""
        b, shape = self.b, self.shape
        there = step.compare("lt", self.steps)
        for first in range(0, shape.rows * PIECES, b.threads):
            number = self.thread + first
            row, piece = number // PIECES, number % PIECES
            source = (self.row + row) * self.k + step * DEPTH + piece * PIECE
            at = ((stage * shape.rows + row) * PIECES + b.xor(piece, row % 8)) * PIECE
            b.async_copy(self.held_x, at, self.x, source, there & (self.row + row).compare("lt", self.m))
        b.async_commit()
        tiles = shape.columns // ROWS
        with b.when(there & self.thread.compare("eq", 0)):
            b.expect_bytes(self.barriers, stage, tiles * TILE * 2)
            for t in range(tiles):
                tile = (self.column // ROWS + t).min(-(-self.n // ROWS) - 1)  # those behind the last are not stored
                at = (stage * tiles + t) * TILE
                b.bulk_copy(self.held_w, at, self.w, (tile * self.steps + step) * TILE, TILE, self.barriers, stage)

    def _write(self, sums: Expr) -> None:
        b, shape = self.b, self.shape
        lane, warp = self.thread % 32, self.thread % WARPGROUP // 32
        for j in range(shape.columns // 8):
            column = self.column + j * 8 + lane % 4 * 2
            for half in range(2):
                row = self.row + self.group * ROWS + warp * 16 + half * 8 + lane // 4
                with b.when(row.compare("lt", self.m) & column.compare("lt", self.n)):
                    pair = b.part(sums, 4 * j + 2 * half, 2)
                    self.y.store(row * self.n + column, pair.cast(self.y.element))
