"""Bulk copies and products of warpgroups in the interpreter: what is read or written too early is found.

The good kernel copies half of a tile, stores the other, multiplies both with registers, and stores the sums; bad ones
lack one thing.
"""

from __future__ import annotations

import numpy as np
import pytest

from codegen.nvptx.builder import GridBuilder
from ir.formats import BF16, F32, I64
from ir.grid_interpreter import interpret_grid
from ir.tile_memory_model import KernelFault
from tests.samples.base import normal

LACKS = {
    "the barrier": "uses a barrier that nobody has made",
    "the bytes": r"waits in vain: 1024 of bytes that nobody has expected were copied",
    "half of the copy": r"waits in vain: 512 of 1024 were copied",
    "the other parity": "waits in vain",
    "waiting": r"reads shared memory .* whose copy has not been waited for",
    "meeting": r"reads shared memory .* written by another without a barrier between",
    "the fence": r"multiplies bytes of shared memory .* written without grid.fence_async between",
    "the sums": r"'grid.part' reads sums of a product that has not been waited for",
    "enough waiting": r"'grid.part' reads sums of a product that has not been waited for",
    "old tiles": r"writes shared memory .* read by a product that goes on",
    "meeting again": r"writes shared memory .* read by another without a barrier between",
    "old registers": r"thread 0 of block 0 writes registers of a left factor, read by a product that goes on",
    "one tile for all": "and others of its warpgroup name different tiles",
    "whole tiles": "no multiple of 1024",
    "all threads": "is not reached by thread 127 of block 0, but by others of its warpgroup",
}
COLUMNS = 16


def kernel(lacks: str = "") -> GridBuilder:
    k = GridBuilder("product", threads=128)
    a, w, y = k.buffer("a", BF16), k.buffer("w", BF16), k.buffer("y", F32)
    right, barriers = k.shared(2 * COLUMNS * 64, BF16), k.shared(1, I64)
    thread, zero = k.thread_id(), k.index_value(0)
    first = thread.compare("eq", 0)
    if lacks != "the barrier":
        with k.when(first):
            k.init_barrier(barriers, 0)
    k.barrier()
    with k.when(first):
        if lacks != "the bytes":
            k.expect_bytes(barriers, 0, 1024)
        k.bulk_copy(right, zero, w, zero, 256 if lacks == "half of the copy" else 512, barriers, zero)
    with k.when(thread.compare("lt", 64)):
        right.store(thread * 8 + 512, w.load(thread * 8 + 512, 8))
    if lacks != "the fence":
        k.fence_async()
    if lacks != "waiting":
        k.wait_barrier(barriers, 0, 1 if lacks == "the other parity" else 0)
        if lacks == "the other parity":
            k.wait_barrier(barriers, 0, 1)
    if lacks != "meeting":
        k.barrier()
    at = {"whole tiles": k.index_value(64), "one tile for all": (thread // 32).min(1) * 512}.get(lacks, zero)
    left = a.load(thread * 32, 8), k.join(*(a.load(thread * 32 + 8 * i, 8) for i in range(1, 4)))
    if lacks == "all threads":
        with k.when(thread.compare("lt", 127)):
            k.group_mma(k.f32(1.0, 8), left[0], right, at)
    sums = k.group_mma(k.group_mma(k.f32(1.0, 8), left[0], right, at), left[1], right, at, step=1)
    k.barrier()
    if lacks == "old tiles":
        with k.when(first):
            right.store(0, w.load(0))
    if lacks == "old registers":
        with k.loop(0, 3, 1, [sums]) as loop:
            loop.carry(k.wait_mma(k.group_mma(loop.carried[0], left[0], right, at), 1))
        sums = loop.results[0]
    if lacks == "enough waiting":
        sums = k.wait_mma(k.group_mma(sums, left[0], right, 0), 1)
    elif lacks != "the sums":
        sums = k.wait_mma(sums, 0)
    if lacks == "meeting again":
        with k.when(first):
            right.store(0, w.load(0))
    lane, warp = k.lane_and_warp()
    for i in range(4):
        row = warp * 16 + lane // 4 + i % 2 * 8
        y.store(row * COLUMNS + i // 2 * 8 + lane % 4 * 2, k.part(sums, 2 * i, 2))
    return k


def run(lacks: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(y, what it should be)"""
    thread, i = np.indices((128, 32))
    rows = thread // 32 * 16 + thread % 32 // 4 + i // 2 % 2 * 8
    columns = i // 8 * 16 + i // 4 % 2 * 8 + thread % 4 * 2 + i % 2
    a, b = normal(64, 64, element=BF16), normal(COLUMNS, 64, seed="b", element=BF16)
    row = np.arange(COLUMNS)[:, None]
    w = b.reshape(COLUMNS, 8, 8)[row, np.arange(8) ^ row % 8].reshape(-1)
    y = np.zeros((64, COLUMNS), np.float32)
    interpret_grid(kernel(lacks).grid_kernel().func, [a[rows, columns], w, y], blocks=1, threads=128)
    return y, 1 + a.astype(np.float32) @ b.astype(np.float32).T


def test_a_product() -> None:
    got, meant = run()
    np.testing.assert_allclose(got, meant, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("lacks", list(LACKS))
def test_what_is_missing_is_found(lacks: str) -> None:
    with pytest.raises(KernelFault, match=LACKS[lacks]):
        run(lacks)


def test_what_is_expected_twice() -> None:
    k = GridBuilder("twice", threads=32)
    barriers = k.shared(1, I64)
    with k.when(k.thread_id().compare("eq", 0)):
        k.init_barrier(barriers, 0)
        k.expect_bytes(barriers, 0, 32)
        k.expect_bytes(barriers, 0, 32)
    with pytest.raises(KernelFault, match="says what a barrier expects, which has been said"):
        interpret_grid(k.grid_kernel().func, [], blocks=1, threads=32)
