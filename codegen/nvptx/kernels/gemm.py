"""Matrix products of many rows: y[m, n] = x[m, k] w[n, k] in bf16 with f32 sums, on the matrix unit.

A block makes a tile of y. Its threads copy tiles of x and w of 64 columns into shared memory, some stages ahead of the
computation, and each warp multiplies its part from there. The eight 16-byte pieces of a row of 64 are stored at their
number xor the row's last three bits: eight rows that `grid.load_matrix` reads together then lie in different banks.
Refused: k or n that is no multiple of 8. With `gate_up` w has gate and up rows in turns of 8 (`fragments`), and y is
silu(gate) * up: both lie in one lane.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.gate import check_gate_up, gated
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, PlainFormat

DEPTH = 64  # columns of x and w in a stage
PIECE = 8  # elements of a copy of 16 bytes
PIECES = DEPTH // PIECE


@dataclass(frozen=True)
class GemmShape:
    """A block's tile of y, cut into warps, and how many stages of x and w are in shared memory."""

    rows: int = 128
    columns: int = 128
    warp_rows: int = 64
    warp_columns: int = 32
    stages: int = 3

    @property
    def threads(self) -> int:
        return (self.rows // self.warp_rows) * (self.columns // self.warp_columns) * WARP

    @property
    def blocks_at_once(self) -> int:
        """What registers allow: a lane holds 1/32 of a warp's sums, 64 of its 128 registers where there are two."""
        return 2 if self.warp_rows * self.warp_columns <= 64 * WARP and self.threads <= 256 else 1

    def blocks(self, m: int, n: int) -> int:
        """Blocks of the launch for y [m, n]."""
        return -(-m // self.rows) * -(-n // self.columns)


def gemm_kernel(
    n: int, k: int, name: str, shape: GemmShape = GemmShape(), out: PlainFormat = F32, *, gate_up: bool = False
) -> GridKernel:
    """A kernel (x bf16 [m, k], w bf16 [n, k], y f32 or bf16 [m, n], m), launched with `shape.blocks(m, n)` blocks.

    With `gate_up` y is [m, n / 2].
    """
    check_gemm(n, k, shape, gate_up)
    b = GridBuilder(name, shape.threads)
    x, w, y, m = b.buffer("x", BF16), b.buffer("w", BF16), b.buffer("y", out), b.size("rows")
    tiles = (m + (shape.rows - 1)) // shape.rows
    block = b.block_id()
    tile = GemmTile(block % tiles * shape.rows, m, block // tiles * shape.columns)
    GemmKernel(b, shape, (x, w, y), (n, k), tile, gate_up).build()
    return b.grid_kernel(blocks_at_once=shape.blocks_at_once)


def check_gemm(n: int, k: int, shape: GemmShape, gate_up: bool) -> None:
    """Raises DiagnosticError for a matrix without a product."""
    if n % PIECE or k % PIECE or k == 0:
        raise DiagnosticError(f"a product of {n} x {k} weights on GPUs", expected=f"multiples of {PIECE}")
    if gate_up:
        check_gate_up(n)
    assert shape.warp_rows % 16 == 0 and shape.warp_columns % 16 == 0 and shape.stages >= 2


@dataclass(frozen=True)
class GemmTile:
    """What a block makes of y: rows from `row` to `end`, columns from `column` on.

    Row r of y is made of row `source(r)` of x, of row r without it.
    """

    row: Expr
    end: Expr
    column: Expr
    source: Callable[[Expr], Expr] | None = None


@dataclass
class _Operand:
    """One of x and w: where it comes from, and its stages in shared memory, `rows` rows each."""

    source: Buffer
    memory: Buffer
    rows: int
    first: Expr  # row of the source that the tile begins with
    end: Expr  # its rows
    places: list[Expr]  # where the rows begin that this thread copies


class GemmKernel:
    """Writes the product of one block."""

    def __init__(
        self, b: GridBuilder, shape: GemmShape, buffers: tuple[Buffer, Buffer, Buffer], sizes: tuple[int, int],
        tile: GemmTile, gate_up: bool = False,
    ) -> None:  # fmt: skip
        self.b, self.shape, self.gate_up = b, shape, gate_up
        (x, w, self.y), (self.n, self.k) = buffers, sizes
        self.m, self.row, self.column = tile.end, tile.row, tile.column
        self.steps = -(-self.k // DEPTH)
        self.thread = b.thread_id()
        self.lane, warp = b.lane_and_warp()
        across = shape.columns // shape.warp_columns
        self.warp_row, self.warp_column = warp // across * shape.warp_rows, warp % across * shape.warp_columns
        memories = [b.shared(shape.stages * size * DEPTH, BF16) for size in (shape.rows, shape.columns)]
        self.x = self._operand(x, memories[0], shape.rows, self.row, self.m, tile.source)
        self.w = self._operand(w, memories[1], shape.columns, self.column, b.index(self.n), None)

    def _operand(
        self, source: Buffer, memory: Buffer, rows: int, first: Expr, end: Expr, of: Callable[[Expr], Expr] | None
    ) -> _Operand:
        """Rows are looked up once, before the loop; those behind the end are the last one, and not copied."""
        places: list[Expr] = []
        for start in range(0, rows * PIECES, self.b.threads) if of is not None else ():
            assert of is not None
            row = (first + (self.thread + start) // PIECES).min(end - 1)
            places.append(of(row) * self.k)
        return _Operand(source, memory, rows, first, end, places)

    def build(self) -> None:
        b, stages = self.b, self.shape.stages
        for stage in range(stages - 1):
            self._fetch(b.index(stage), b.index(stage))
        count = self.shape.warp_rows // 16 * (self.shape.warp_columns // 8)
        sums = [b.f32(0.0, 4) for _ in range(count)]
        zero = b.index_value(0)
        with b.loop(0, self.steps, 1, [zero, *sums]) as loop:
            stage, *sums = loop.carried
            b.async_wait(stages - 2)
            b.barrier()  # this stage is there for all; the one before it has been read by all
            before = b.select(stage.compare("eq", 0), b.index_value(stages - 1), stage - 1)
            self._fetch(loop.i + (stages - 1), before)
            sums = self._multiply(stage, sums)
            loop.carry(b.select(stage.compare("eq", stages - 1), zero, stage + 1), *sums)
        self._write(loop.results[1:])

    def _fetch(self, step: Expr, stage: Expr) -> None:
        """Starts the copies of a step into a stage; zeros where x and w end."""
        b = self.b
        for operand in (self.x, self.w):
            for i, first in enumerate(range(0, operand.rows * PIECES, b.threads)):
                number = self.thread + first
                row, piece = number // PIECES, number % PIECES
                column = step * DEPTH + piece * PIECE
                inside = (operand.first + row).compare("lt", operand.end) & column.compare("lt", self.k)
                place = operand.places[i] if operand.places else ((operand.first + row).min(operand.end - 1)) * self.k
                source = place + column.min(self.k - PIECE)
                at = (stage * operand.rows + row) * DEPTH + self._swizzled(piece, row) * PIECE
                if operand.rows * PIECES - first < b.threads:
                    with b.when(number.compare("lt", operand.rows * PIECES)):
                        b.async_copy(operand.memory, at, operand.source, source, inside)
                else:
                    b.async_copy(operand.memory, at, operand.source, source, inside)
        b.async_commit()

    def _swizzled(self, piece: Expr, row: Expr) -> Expr:
        return self.b.xor(piece, row % PIECES)

    def _multiply(self, stage: Expr, sums: list[Expr]) -> list[Expr]:
        """The warp's sums with one stage: for each 16 columns, all pairs of 16 rows of x and 8 rows of w."""
        b, shape, lane = self.b, self.shape, self.lane
        made = list(sums)
        for step in range(DEPTH // 16):
            left = [
                self._load(self.x, stage, self.warp_row + i * 16 + lane % 16, lane // 16 + 2 * step)
                for i in range(shape.warp_rows // 16)
            ]
            right = []
            for j in range(shape.warp_columns // 16):
                row = self.warp_column + j * 16 + lane // 16 * 8 + lane % 8
                both = self._load(self.w, stage, row, lane // 8 % 2 + 2 * step)
                right += [b.part(both, 0, 4), b.part(both, 4, 4)]
            for i, a in enumerate(left):
                for j, c in enumerate(right):
                    at = i * len(right) + j
                    made[at] = b.mma(made[at], a, c)
        return made

    def _load(self, operand: _Operand, stage: Expr, row: Expr, piece: Expr) -> Expr:
        at = (stage * operand.rows + row) * DEPTH + self._swizzled(piece, row) * PIECE
        return self.b.load_matrix(operand.memory, at)

    def _write(self, sums: list[Expr]) -> None:
        b, shape = self.b, self.shape
        across = shape.warp_columns // 8
        turns = 2 if self.gate_up else 1  # fragments that make one of y
        width = self.n // turns
        for number in range(0, len(sums), turns):
            i, j = divmod(number, across)
            total = gated(b, sums[number], sums[number + 1]) if self.gate_up else sums[number]
            column = (self.column + self.warp_column) // turns + j // turns * 8 + self.lane % 4 * 2
            for half in range(2):
                row = self.row + self.warp_row + (i * 16 + half * 8) + self.lane // 4
                with b.when(row.compare("lt", self.m) & column.compare("lt", width)):
                    self.y.store(row * width + column, b.part(total, 2 * half, 2).cast(self.y.element))
