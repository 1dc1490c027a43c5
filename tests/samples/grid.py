"""grid.*: what all threads of one warp do together on the same operands."""

from __future__ import annotations

import numpy as np

from ir.formats import BF16, F8E4M3, F16, F32, F64, I1, I8, I32, I64, PlainFormat
from ir.types import INDEX, BufferType, ScalarType, VectorType
from tests.samples.base import Fault, Sample, Stored, fault, low_sample

F, D, INT, FLAG = (ScalarType(e) for e in (F32, F64, I32, I1))
GLOBAL, SHARED = BufferType(BF16), BufferType(BF16, "shared")


def v(*numbers: float, element: PlainFormat = BF16) -> np.ndarray:
    return np.array(numbers, np.float64).astype(element.dtype)


ROWS = Stored(np.arange(64).astype(BF16.dtype), "shared")
SOURCE = Stored(np.arange(64).astype(BF16.dtype))
BYTES = np.array([127, -128, 5, -3] * 4, np.int8)
BARRIERS = Stored(np.zeros(2, np.int64), "shared")
TILES = Stored((np.arange(80 * 64) % 7 - 3).astype(BF16.dtype), "shared")
COUNTED, OF_TILES, LEFT = BufferType(I64, "shared"), BufferType(BF16, "shared"), VectorType(8, BF16)
ROWS_OF_BYTES = Stored(np.tile(BYTES, 80), "shared")
OF_BYTES = (VectorType(32, I8), BufferType(I8, "shared"), INDEX)
SAMPLES: tuple[Sample, ...] = (
    low_sample("grid.block_id", "first"),
    low_sample("grid.num_blocks", "one"),
    low_sample("grid.shared", "f32", size=4, element=F32),
    low_sample("grid.shuffle", "f32", np.float32(1.5), mask=16),
    low_sample("grid.shuffle", "i32", np.int32(-7), mask=1),
    low_sample("grid.exp2", "scalar", np.float32(-1.5)),
    low_sample("grid.exp2", "no_subnormals", v(-126, -127, -200, 3, element=F32)),
    low_sample("grid.fma_pairs", "one_rounding", v(128, 1.5), v(1, 3), v(-136, 2**-9)),
    low_sample("grid.join", "two", v(1, 2), v(3, 4, 5)),
    low_sample("grid.join", "scalars", np.float32(1), np.float32(2)),
    low_sample("grid.part", "middle", v(1, 2, 3, 4), first=1, lanes=2),
    low_sample("grid.part", "one", v(1, 2), first=1, lanes=1),
    low_sample("grid.async_commit", "nothing_started"),
    low_sample("grid.async_wait", "all", pending=0),
    low_sample("grid.async_wait", "but_one", pending=1),
    low_sample("grid.async_copy", "copies", ROWS, 8, SOURCE, 16, np.bool_(True)),
    low_sample("grid.async_copy", "zeros", ROWS, 56, SOURCE, 800, np.bool_(False)),
    low_sample("grid.async_copy", "a_pair", ROWS, 6, SOURCE, 18, np.bool_(True), bytes=4),
    low_sample("grid.mma", "bf16", v(1, 2, 3, 4, element=F32), v(*range(8)), v(1, -1, 0.5, 2)),
    low_sample("grid.mma", "f16", v(*[0] * 4, element=F32), v(*range(8), element=F16), v(*range(4), element=F16)),
    low_sample("grid.mma", "i8", v(7, 0, -7, 2**31 - 1, element=I32), BYTES, -BYTES[:8]),
    low_sample("grid.mma", "f8e4m3", v(1, 2, 3, 4, element=F32), *(v(*range(n), element=F8E4M3) for n in (16, 8))),
    low_sample("grid.load_matrix", "one_row", ROWS, 8),
    low_sample("grid.load_matrix", "transposed", ROWS, 0, transposed=True),
    low_sample("grid.init_barrier", "second", BARRIERS, 1),
    low_sample("grid.expect_bytes", "some", BARRIERS, 0, bytes=32),
    low_sample("grid.bulk_copy", "some", ROWS, 8, SOURCE, 16, BARRIERS, 1, size=16),
    low_sample("grid.wait_barrier", "done_before", BARRIERS, 0, 1),
    low_sample("grid.fence_async", "nothing_written"),
    low_sample("grid.group_mma", "one_step", np.arange(8, dtype=np.float32), v(*range(8)), TILES, 4096),
    low_sample("grid.group_mma", "two_more", np.arange(8, dtype=np.float32), v(*range(16)), TILES, 0, step=2),
    low_sample("grid.group_mma", "i8", v(7, 0, -7, 2**31 - 1, element=I32), -BYTES, ROWS_OF_BYTES, 0),
    low_sample(
        "grid.group_mma",
        "f8e4m3",
        *(np.arange(8, dtype=np.float32), v(*range(16), element=F8E4M3)),
        *(Stored(v(*range(-8, 8), element=F8E4M3).repeat(128), "shared"), 0),
        step=3,
    ),
    low_sample("grid.wait_mma", "nothing_started", np.arange(8, dtype=np.float32), pending=0),
)

FAULTS: tuple[Fault, ...] = (
    fault("grid.shared", "expected a size above 0, got 0", size=0, element=F32),
    fault("grid.shared", "machine numbers, got buffer<i1, shared>", size=4, element=I1),
    fault("grid.shuffle", "expected f32 or i32, got f64", D, mask=1),
    fault("grid.shuffle", "expected a mask of 1 .. 31, got 32", F, mask=32),
    fault("grid.exp2", "expected f32, got i32", INT),
    fault("grid.fma_pairs", "expected three operands of one type", *(VectorType(n, BF16) for n in (2, 2, 4))),
    fault("grid.fma_pairs", "expected pairs of bf16, got vector<3 x bf16>", *[VectorType(3, BF16)] * 3),
    fault("grid.join", "expected one vector or more, got none"),
    fault("grid.join", "expected vectors of one element, got vector<2 x f32>, i32", VectorType(2, F32), INT),
    fault("grid.part", "expected a vector, got f32", F, first=0, lanes=1),
    fault("grid.part", "expected lanes of vector<4 x f32>, got 2 from 3 on", VectorType(4, F32), first=3, lanes=2),
    fault(
        "grid.async_copy", "expected a shared buffer, got buffer<bf16>", GLOBAL, INDEX, GLOBAL, INDEX, FLAG, bytes=16
    ),
    fault(
        "grid.async_copy", "expected a global buffer, got buffer<bf16, sh", SHARED, INDEX, SHARED, INDEX, FLAG, bytes=16
    ),
    fault(
        "grid.async_copy", "expected two buffers of one element", SHARED, INDEX, BufferType(F32), INDEX, FLAG, bytes=16
    ),
    fault("grid.async_copy", "expected an index, got i32 and index", SHARED, INT, GLOBAL, INDEX, FLAG, bytes=16),
    fault("grid.async_copy", "expected an i1 condition, got f32", SHARED, INDEX, GLOBAL, INDEX, F, bytes=16),
    fault("grid.async_copy", "expected a copy of 4 or 16 bytes, got 8", SHARED, INDEX, GLOBAL, INDEX, FLAG, bytes=8),
    fault("grid.async_wait", "expected 0 or more groups, got -1", pending=-1),
    fault("grid.mma", "expected vector<4 x f32> to add to, got f32", F, VectorType(8, BF16), VectorType(4, BF16)),
    fault(
        "grid.mma",
        "expected bf16, f16, i8 or f8e4m3 factors",
        VectorType(4, F32),
        VectorType(8, F32),
        VectorType(4, F32),
    ),
    fault("grid.mma", "expected vector<4 x i32> to add to", VectorType(4, F32), VectorType(16, I8), VectorType(8, I8)),
    fault(
        "grid.mma",
        "expected vectors of 8 and 4 bf16, got vector<8 x bf16> and vector<4 x f16>",
        *(VectorType(4, F32), VectorType(8, BF16), VectorType(4, F16)),
    ),
    fault("grid.load_matrix", "expected a shared buffer, got buffer<bf16>", GLOBAL, INDEX),
    fault("grid.load_matrix", "expected a buffer of bf16 or f16", BufferType(F32, "shared"), INDEX),
    fault("grid.load_matrix", "expected an index, got i32", SHARED, INT),
    fault("grid.init_barrier", "expected barriers in buffer<i64, shared>, got buffer<bf16>", GLOBAL, INDEX),
    fault("grid.expect_bytes", "a multiple of 16 below 2**20, got 24 bytes", COUNTED, INDEX, bytes=24),
    fault(
        "grid.bulk_copy",
        "a multiple of 16 bytes, got 4 of bf16",
        *(SHARED, INDEX, GLOBAL, INDEX, COUNTED, INDEX),
        size=4,
    ),
    fault("grid.bulk_copy", "expected a shared buffer", *(GLOBAL, INDEX, GLOBAL, INDEX, COUNTED, INDEX), size=8),
    fault(
        "grid.bulk_copy", "two buffers of one element", *(SHARED, INDEX, BufferType(F32), INDEX, COUNTED, INDEX), size=8
    ),
    fault("grid.wait_barrier", "expected an index for the parity, got i32", COUNTED, INDEX, INT),
    fault("grid.group_mma", "4, 8, ..., 128 lanes of f32 to add to", VectorType(6, F32), LEFT, OF_TILES, INDEX, step=0),
    fault(
        "grid.group_mma",
        "8, 16, 24 or 32 lanes of bf16",
        VectorType(8, F32),
        VectorType(4, BF16),
        OF_TILES,
        INDEX,
        step=0,
    ),
    fault(
        "grid.group_mma", "a shared buffer of bf16, got buffer<bf16>", VectorType(8, F32), LEFT, GLOBAL, INDEX, step=0
    ),
    fault("grid.group_mma", "a shared buffer of f16", VectorType(8, F32), VectorType(8, F16), OF_TILES, INDEX, step=0),
    fault("grid.group_mma", "expected an index, got i32", VectorType(8, F32), LEFT, OF_TILES, INT, step=0),
    fault("grid.group_mma", "1 of 4 steps, got those from 4 on", VectorType(8, F32), LEFT, OF_TILES, INDEX, step=4),
    fault("grid.group_mma", "4, 8, 12, 16 or a multiple of 8 lanes of i32", VectorType(20, I32), *OF_BYTES, step=0),
    fault("grid.group_mma", "a multiple of 8 lanes of i32 to add to", VectorType(8, F32), *OF_BYTES, step=0),
    fault("grid.group_mma", "2 of 4 steps, got those from 3 on", VectorType(8, I32), *OF_BYTES, step=3),
    fault("grid.wait_mma", "expected a vector of f32 or i32, got f32", F, pending=0),
    fault("grid.wait_mma", "expected 0 .. 7 products, got 8", VectorType(8, F32), pending=8),
)
