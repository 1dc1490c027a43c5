"""Writing kernels for a grid: `KernelBuilder` with blocks, warps, shared memory, copies and matrix products.

k = GridBuilder("scale", threads=128)
x, y, n = k.buffer("x", F32), k.buffer("y", F32), k.size("n")
at = (k.block_id() * 128 + k.thread_id()) * 4
with k.when(at.compare("lt", n)):
    y.store(at, x.load(at, 4) * 2.0)
kernel = k.grid_kernel()
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import I1, PlainFormat
from ir.ops import grid, grid_async, grid_bulk, grid_matrix, grid_warpgroup
from ir.ops.builtin import FuncOp
from ir.types import INDEX, ScalarType

WARP = grid.WARP


@dataclass(frozen=True)
class GridKernel:
    """A kernel, how many threads each of its blocks has, and how many blocks a multiprocessor is to hold at once.

    The last bounds the registers of a thread: 65,536 are there for all.
    """

    func: FuncOp
    threads: int
    blocks_at_once: int = 1

    @property
    def name(self) -> str:
        return self.func.sym_name


class GridBuilder(KernelBuilder):
    """Builds one kernel for blocks of `threads` threads. Shared memory is placed at its top, as scratch is."""

    def __init__(self, name: str, threads: int) -> None:
        super().__init__(name)
        assert threads % WARP == 0, f"blocks of {threads} threads are no whole warps"
        self.threads = threads

    def grid_kernel(self, blocks_at_once: int = 1) -> GridKernel:
        """The kernel; nothing can be added any more."""
        return GridKernel(self.finish(), self.threads, blocks_at_once)

    def shared(self, size: int, element: PlainFormat) -> Buffer:
        """Memory of this block: a fixed number of elements."""
        op = grid.SharedOp(size=size, element=element)
        self.place_on_top(op)
        return Buffer(self, op.out)

    def block_id(self) -> Expr:
        return Expr(self, self.emit(grid.BlockIdOp()))

    def num_blocks(self) -> Expr:
        return Expr(self, self.emit(grid.NumBlocksOp()))

    def lane_and_warp(self) -> tuple[Expr, Expr]:
        """This thread's lane, and the number of its warp in the block."""
        thread = self.thread_id()
        return thread % WARP, thread // WARP

    def shuffle(self, x: Expr, mask: int) -> Expr:
        return Expr(self, self.emit(grid.ShuffleOp(x.value, mask=mask)))

    def exp2(self, x: Expr) -> Expr:
        return Expr(self, self.emit(grid.Exp2Op(x.value)))

    def fma_pairs(self, a: Expr, b: Expr, c: Expr) -> Expr:
        return Expr(self, self.emit(grid.FmaPairsOp(a.value, b.value, c.value)))

    def join(self, *parts: Expr) -> Expr:
        return Expr(self, self.emit(grid.JoinOp(*(p.value for p in parts))))

    def part(self, v: Expr, first: int, lanes: int) -> Expr:
        return Expr(self, self.emit(grid.PartOp(v.value, first=first, lanes=lanes)))

    def yes(self) -> Expr:
        """The condition that always holds."""
        return self.constant(ScalarType(I1), 1)

    def async_copy(
        self,
        target: Buffer,
        at: Expr | int,
        source: Buffer,
        source_at: Expr | int,
        condition: Expr | None = None,
        nbytes: int = 16,
    ) -> None:
        """4 or 16 bytes from global to shared memory, or zeros where the condition fails."""
        places = self.index(at).value, self.index(source_at).value
        chosen = self.yes() if condition is None else condition
        op = grid_async.AsyncCopyOp(target.value, places[0], source.value, places[1], chosen.value, bytes=nbytes)
        self.emit_op(op)

    def async_commit(self) -> None:
        self.emit_op(grid_async.AsyncCommitOp())

    def async_wait(self, pending: int) -> None:
        self.emit_op(grid_async.AsyncWaitOp(pending=pending))

    def mma(self, c: Expr, a: Expr, b: Expr) -> Expr:
        return Expr(self, self.emit(grid_matrix.MmaOp(c.value, a.value, b.value)))

    def load_matrix(self, buffer: Buffer, at: Expr | int, transposed: bool = False) -> Expr:
        index = self.index(at).value
        return Expr(self, self.emit(grid_matrix.LoadMatrixOp(buffer.value, index, transposed=transposed)))

    # -- sm_90a

    def init_barrier(self, barriers: Buffer, at: Expr | int) -> None:
        self.emit_op(grid_bulk.InitBarrierOp(barriers.value, self.index(at).value))

    def expect_bytes(self, barriers: Buffer, at: Expr | int, nbytes: int) -> None:
        self.emit_op(grid_bulk.ExpectBytesOp(barriers.value, self.index(at).value, bytes=nbytes))

    def bulk_copy(
        self, target: Buffer, at: Expr, source: Buffer, source_at: Expr, size: int, barriers: Buffer, barrier: Expr
    ) -> None:
        """`size` elements from global to shared memory, counted by a barrier."""
        operands = target.value, at.value, source.value, source_at.value, barriers.value, barrier.value
        self.emit_op(grid_bulk.BulkCopyOp(*operands, size=size))

    def wait_barrier(self, barriers: Buffer, at: Expr | int, parity: Expr | int) -> None:
        places = self.index(at).value, self.index(parity).value
        self.emit_op(grid_bulk.WaitBarrierOp(barriers.value, *places))

    def fence_async(self) -> None:
        self.emit_op(grid_warpgroup.FenceAsyncOp())

    def group_mma(self, c: Expr, a: Expr, b: Buffer, b_at: Expr | int, step: int = 0) -> Expr:
        """A product of the left factor's registers `a` with the tile at `b_at`, from that step of its columns on."""
        op = grid_warpgroup.GroupMmaOp(c.value, a.value, b.value, self.index(b_at).value, step=step)
        return Expr(self, self.emit(op))

    def wait_mma(self, c: Expr, pending: int) -> Expr:
        return Expr(self, self.emit(grid_warpgroup.WaitMmaOp(c.value, pending=pending)))

    # -- idioms

    def index_value(self, value: int) -> Expr:
        """A known index as a value, where one that is computed may stand too."""
        return self.constant(INDEX, value)

    def xor(self, a: Expr, b: Expr) -> Expr:
        """The bits that differ."""
        return (a | b) - (a & b)

    def warp_reduce(self, x: Expr, combine: Callable[[Expr, Expr], Expr], lanes: int = WARP) -> Expr:
        """x of `lanes` neighbouring lanes combined, in each of them: halves first, so that the order is fixed."""
        step = lanes // 2
        while step:
            x = combine(x, self.shuffle(x, step))
            step //= 2
        return x

    def block_sum(self, x: Expr, work: Buffer) -> Expr:
        """x added up over all threads of the block, in each; `work` is shared memory for a number of each warp."""
        lane, warp = self.lane_and_warp()
        x = self.warp_reduce(x, Expr.__add__)
        if self.threads == WARP:
            return x
        self.barrier()  # the last use of `work` is over
        with self.when(lane.compare("eq", 0)):
            work.store(warp, x)
        self.barrier()
        total = work.load(0)
        for other in range(1, self.threads // WARP):
            total = total + work.load(other)
        return total
