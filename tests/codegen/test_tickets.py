"""Work shared by tickets: every piece is done once, whoever does it, again after each barrier."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.tickets import Tickets
from codegen.tile_builder import Expr, KernelBuilder
from ir import verify
from ir.formats import I32
from ir.ops.builtin import FuncOp
from ir.tile_interpreter import interpret_kernel
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import native_kernels

REPEATS = 40


def counting_kernel() -> FuncOp:
    """done[i] += 1 and by[i] = thread for each of `n` pieces; then done[n + i] += 10 with tickets of the next phase."""
    k = KernelBuilder("count")
    done, by, n = k.buffer("done", I32), k.buffer("by", I32), k.size("n")

    def all_pieces(first: int, start: Expr | int) -> None:
        tickets = Tickets(k)
        with k.loop(0, n) as piece, tickets.piece(piece.i):
            at = piece.i + start
            done.store(at, done.load(at) + first)
            by.store(at, k.thread_id().from_index())

    all_pieces(1, 0)
    k.barrier()
    all_pieces(10, n)
    return k.finish()


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize("pieces", [0, 1, 5, 64])
def test_the_interpreter_gives_each_piece_to_one_thread(threads: int, pieces: int) -> None:
    kernel = counting_kernel()
    verify(kernel)
    done, by = np.zeros(2 * pieces + 1, np.int32), np.full(2 * pieces + 1, -1, np.int32)
    interpret_kernel(kernel, [done, by, pieces], threads)
    np.testing.assert_array_equal(done, [1] * pieces + [10] * pieces + [0])
    assert all(0 <= thread < threads for thread in by[:-1])


def test_native_threads_do_each_piece_once_in_every_run() -> None:
    with native_kernels([counting_kernel()], host_target()) as kernels:
        for threads in (1, 2, 3):
            for pieces in (0, 1, 7, 300):
                done, by = np.zeros(2 * pieces + 1, np.int32), np.full(2 * pieces + 1, -1, np.int32)
                for _ in range(REPEATS):
                    kernels.run("count", done, by, pieces, threads=threads)
                np.testing.assert_array_equal(done, [REPEATS] * pieces + [10 * REPEATS] * pieces + [0])
                assert all(0 <= thread < threads for thread in by[:-1])
