"""Bulk copies and products of warpgroups in the interpreter: what is read or written too early is found.

The good kernel copies a tile, multiplies it with one that was stored, and stores the sums; bad ones lack one thing.
"""

from __future__ import annotations

import numpy as np
import pytest

from codegen.nvptx.builder import GridBuilder
from codegen.tile_builder import Buffer
from ir.formats import BF16, F32, I64
from ir.grid_interpreter import interpret_grid
from ir.tile_memory_model import KernelFault
from tests.samples.base import normal

LACKS = {
    "the barrier": "uses a barrier that nobody has made",
    "the bytes": r"waits in vain: 8192 of bytes that nobody has expected were copied",
    "half of the copy": r"waits in vain: 4096 of 8192 were copied",
    "the other parity": "waits in vain",
    "waiting": r"reads shared memory .* whose copy has not been waited for",
    "meeting": r"reads shared memory .* written by another without a barrier between",
    "the fence": r"multiplies bytes of shared memory .* written without grid.fence_async between",
    "the sums": r"'grid.part' reads sums of a product that has not been waited for",
    "enough waiting": r"'grid.part' reads sums of a product that has not been waited for",
    "old factors": r"writes shared memory .* read by a product that goes on",
    "old tiles": r"writes shared memory .* read by a product that goes on",
    "one tile for all": "and others of its warpgroup name different tiles",
    "whole tiles": "no multiple of 1024",
    "all threads": "is not reached by thread 127 of block 0, but by others of its warpgroup",
}


def kernel(lacks: str = "") -> GridBuilder:
    k = GridBuilder("product", threads=128)
    x, w, y = k.buffer("x", BF16), k.buffer("w", BF16), k.buffer("y", F32)
    left, right, barriers = k.shared(2 * 64 * 64, BF16), k.shared(8 * 64, BF16), k.shared(1, I64)
    thread, zero = k.thread_id(), k.index_value(0)
    first = thread.compare("eq", 0)
    if lacks != "the barrier":
        with k.when(first):
            k.init_barrier(barriers, 0)
    k.barrier()
    with k.when(first):
        if lacks != "the bytes":
            k.expect_bytes(barriers, 0, 8192)
        k.bulk_copy(left, zero, x, zero, 2048 if lacks == "half of the copy" else 4096, barriers, zero)
    with k.when(thread.compare("lt", 64)):
        right.store(thread * 8, w.load(thread * 8, 8))
    if lacks != "the fence":
        k.fence_async()
    if lacks != "waiting":
        k.wait_barrier(barriers, 0, 1 if lacks == "the other parity" else 0)
        if lacks == "the other parity":
            k.wait_barrier(barriers, 0, 1)
    if lacks != "meeting":
        k.barrier()
    at = {"whole tiles": k.index_value(64), "one tile for all": (thread // 32).min(1) * 4096}.get(lacks, zero)
    if lacks == "all threads":
        with k.when(thread.compare("lt", 127)):
            k.group_mma(k.f32(1.0, 4), left, at, right, 0)
    sums = k.group_mma(k.f32(1.0, 4), left, at, right, 0)
    _then(k, lacks, left, right)
    if lacks == "enough waiting":
        sums = k.wait_mma(k.group_mma(sums, left, 0, right, 0), 1)
    elif lacks != "the sums":
        sums = k.wait_mma(sums, 0)
    lane, warp = k.lane_and_warp()
    for half in range(2):
        row = warp * 16 + lane // 4 + half * 8
        y.store(row * 8 + lane % 4 * 2, k.part(sums, 2 * half, 2))
    return k


def _then(k: GridBuilder, lacks: str, left: Buffer, right: Buffer) -> None:
    """What is done while the product goes on."""
    k.barrier()
    if lacks == "old factors":
        with k.when(k.thread_id().compare("eq", 0)):
            right.store(0, right.load(0))
    if lacks == "old tiles":
        left.store(k.thread_id() * 8, right.load(k.thread_id() % 64 * 8, 8))


def run(lacks: str = "") -> tuple[np.ndarray, np.ndarray]:
    """(y, what it should be)"""
    rows = np.arange(64)[:, None]
    a, b = normal(64, 64, element=BF16), normal(8, 64, seed="b", element=BF16)
    order = np.arange(8) ^ rows % 8
    x = a.reshape(64, 8, 8)[rows, order].reshape(-1)
    w = b.reshape(8, 8, 8)[rows[:8], order[:8]].reshape(-1)
    y = np.zeros((64, 8), np.float32)
    interpret_grid(kernel(lacks).grid_kernel().func, [x, w, y], blocks=1, threads=128)
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
