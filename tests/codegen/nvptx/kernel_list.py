"""The kernels for GPUs at sizes of real models, for tests of what compilers make of them."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

from codegen.nvptx.builder import GridBuilder, GridKernel
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import join_kernel, split_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from codegen.nvptx.kernels.decode import decode_kernel
from codegen.nvptx.kernels.gemm import gemm_kernel
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape, gemm_wgmma_kernel
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, wgmma_bytes_kernel
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    decode_int8_kernel,
    gemm_int8_kernel,
)
from codegen.nvptx.kernels.moe_products import Experts, grouped_decode_kernel, grouped_gemm_kernel
from codegen.nvptx.kernels.moe_route import dispatch_kernel, route_kernel
from codegen.nvptx.kernels.quantize_rows import quantize_rows_kernel
from codegen.nvptx.kernels.rope import rope_table_kernel
from codegen.nvptx.kernels.rope_append import HeadNorm, Projection, rope_append_kernel
from codegen.nvptx.kernels.row_tiles import RowTiles
from codegen.nvptx.kernels.rowwise import row_kernel
from codegen.nvptx.kernels.wide import wide_kernel
from codegen.nvptx.kv_planes import KvPlanes
from ir.formats import BF16, F8E4M3, F16, F32, I8, I32, I64, FP8Format, GroupedIntFormat
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import SwigluOp
from ir.types import KVCacheType, VectorType
from tests.codegen.op_kernels import single
from tests.samples.base import TOKENS, t

HEADS = AttentionShape(32, 8, 128)  # of an 8-billion-parameter model
WIDE_HEADS = AttentionShape(16, 8, 256)
Q4, Q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)

RING = {"rotate": 64, "recent": 16}


@cache
def kernels() -> tuple[GridKernel, ...]:
    """One of each family and format."""
    norm = single([t(TOKENS, 4096), t(4096, element=BF16)], lambda x, w: RmsNormOp(x, w, eps=1e-5))
    gate = single([t(TOKENS, 2 * 14336, element=BF16)], SwigluOp)
    return (
        row_kernel(norm, "rms_norm").kernel,
        row_kernel(gate, "swiglu").kernel,
        decode_kernel(Fragments.of(4096, 4096, BF16), "decode_w16"),
        decode_kernel(Fragments.of(4096, 4096, Q8), "decode_w8"),
        decode_kernel(Fragments.of(4096, 4096, Q4), "decode_w4"),
        decode_kernel(Fragments.of(4096, 4096, Q4), "decode_w4_16", rows=16),
        gemm_kernel(4096, 4096, "gemm"),
        gemm_packed_kernel(Fragments.of(4096, 4096, BF16), "gemm_w16"),
        gemm_packed_kernel(Fragments.of(4096, 4096, Q8), "gemm_w8"),
        gemm_packed_kernel(Fragments.of(4096, 4096, Q4), "gemm_w4"),
        gemm_packed_kernel(Fragments.of(4096, 4096, Q4), "gemm_w4_64", PackedShape.of(64)),
        decode_int8_kernel(Fragments.of(4096, 4096, Q8), ActivationScales(4096, 128), "decode_w8a8"),
        decode_int8_kernel(Fragments.of(4096, 4096, Q4), ActivationScales(4096, 128), "decode_w4a8_16", rows=16),
        gemm_int8_kernel(Fragments.of(4096, 4096, GroupedIntFormat(8, 0)), ActivationScales(4096), "gemm_w8a8"),
        gemm_int8_kernel(Fragments.of(4096, 4096, Q4), ActivationScales(4096, 128), "gemm_w4a8"),
        quantize_rows_kernel(ActivationScales(4096, 128), "quantize_rows", BF16),
        prefill_kernel(HEADS, 128**-0.5, "prefill"),
        split_kernel(HEADS, 128**-0.5, "split"),
        join_kernel(HEADS, "join"),
        prefill_kernel(WIDE_HEADS, 256**-0.5, "prefill_256"),
        split_kernel(WIDE_HEADS, 256**-0.5, "split_256"),
        *_model_kernels(),
    )


def _model_kernels() -> list[GridKernel]:
    """What a step needs besides: caches in one go with rope, routers, products of 128 experts."""
    plain, eight, four = (
        KvPlanes.of(KVCacheType(8, 128, element, **more))
        for element, more in ((BF16, {}), (GroupedIntFormat(8, 0), {}), (GroupedIntFormat(4, 0), RING))
    )
    forms = [
        (f"rope_append{end}", Projection(32, kv, HeadNorm(1e-6, False))) for end, kv in (("", plain), ("_kv4", four))
    ]
    made = [rope_table_kernel(64, 1.0, "rope_table"), *(rope_append_kernel(form, name) for name, form in forms)]
    made += [wide_kernel(128, 2048, "router_8", rows=8)]
    made += [route_kernel(128, 8, True, F32, "route"), dispatch_kernel(128, 8, "dispatch")]
    for end, format in (("w16", BF16), ("w4", Q4)):
        layout = Fragments.of(1536, 2048, format)
        up = Experts(layout, layout.nbytes, 8, True, BF16)
        made.append(grouped_decode_kernel(up, f"experts_{end}"))
        made.append(grouped_gemm_kernel(up, f"experts_many_{end}", PackedShape.of(64)))
    layout = Fragments.of(1536, 2048, Q4)
    up = Experts(layout, layout.nbytes, 8, True, F32, ActivationScales(2048, 128, by_row=True))
    made.append(grouped_decode_kernel(up, "experts_w4a8"))
    made.append(grouped_gemm_kernel(up, "experts_many_w4a8", PackedShape.of(64)))
    made.append(prefill_kernel(HEADS, 128**-0.5, "prefill_kv4", planes=four))
    made.append(split_kernel(HEADS, 128**-0.5, "split_kv8", planes=eight))
    return [*made, join_kernel(HEADS, "join_rotated", rotate=64)]


@cache
def hopper_kernels() -> tuple[GridKernel, ...]:
    """What only sm_90a runs."""
    made = [
        gemm_wgmma_kernel(Fragments.of(4096, 4096, format), f"wgmma_{name}", WgmmaShape.of(rows))
        for name, format, rows in (("w16", BF16, 512), ("w8", Q8, 512), ("w4", Q4, 512), ("w4_32", Q4, 32))
    ]
    made.append(gemm_wgmma_kernel(Fragments.of(4096, 4096, BF16), "wgmma_w16_tiled", WgmmaShape.of(512), tiled=True))
    made += [
        wgmma_bytes_kernel(
            Fragments.of(4096, 4096, format),
            ActivationScales(4096, group, rows=8),
            f"wgmma_{name}",
            BytesShape.of(rows),
        )
        for name, format, group, rows in (
            ("w8a8", Q8, 128, 512), ("w8a8_rows", GroupedIntFormat(8, 0), 0, 512), ("w4a8", Q4, 128, 512),
            ("w4a8_32", Q4, 128, 32), ("fp8", FP8Format(F8E4M3, 128, 128), 128, 512),
        )
    ]  # fmt: skip
    made.append(
        quantize_rows_kernel(
            ActivationScales(4096, 128, rows=8), "quantize_rows_tiles", BF16, I8, RowTiles(4096, I8, crossed=True)
        )
    )
    layout = Fragments.of(1536, 2048, Q4)
    up = Experts(layout, layout.nbytes, 8, True, BF16)
    rounded = replace(up, x_scales=ActivationScales(2048, 128, by_row=True))
    return (
        *made,
        grouped_gemm_kernel(up, "experts_wgmma_w4", WgmmaShape.of(32)),
        grouped_gemm_kernel(rounded, "experts_wgmma_w4a8", BytesShape.of(128)),
    )


@cache
def fp8_kernels() -> tuple[GridKernel, ...]:
    """Products and casts of f8e4m3, from sm_89 on."""
    layout = Fragments.of(4096, 4096, FP8Format(F8E4M3))
    return (
        decode_int8_kernel(layout, ActivationScales(4096), "decode_fp8"),
        gemm_int8_kernel(layout, ActivationScales(4096), "gemm_fp8"),
        quantize_rows_kernel(ActivationScales(4096, 128), "quantize_rows_fp8", BF16, F8E4M3),
    )


def one_of_each() -> GridKernel:
    """Every grid op, and every tile op that a GPU does otherwise."""
    k = GridBuilder("one_of_each", threads=64)
    x, y, n = k.buffer("x", BF16), k.buffer("y", F32), k.size("n")
    s = k.shared(1024, BF16)
    lane, warp = k.lane_and_warp()
    at = (k.block_id() * k.num_threads() + k.thread_id()) * 8
    k.async_copy(s, k.thread_id() * 8, x, at, at.compare("lt", n))
    k.async_commit()
    k.async_wait(0)
    k.barrier()
    a = k.load_matrix(s, lane * 8 + warp * 256)
    b = k.load_matrix(s, lane * 8 + warp * 256, transposed=True)
    a = k.fma_pairs(a, a, b)
    c = k.mma(k.f32(0.0, 4), a, k.part(b, 4, 4))
    half = VectorType(8, F16), VectorType(4, F16)
    c = k.mma(c, a.bitcast(half[0]), k.part(b, 0, 4).bitcast(half[1]))
    whole = VectorType(16, I8), VectorType(8, I8)
    d = k.mma(k.constant(VectorType(4, I32), 1), a.bitcast(whole[0]), k.part(b, 0, 4).bitcast(whole[1]))
    c = k.fma(d.cast(F32), k.f32(2.0**-20, 4), c)
    total = k.warp_reduce(k.exp2(c).reduce("add"), lambda p, q: p + q)
    same = k.shuffle(lane.from_index(), 1).cast(F32)
    x.prefetch(at)
    total = total + x.load(at).cast(F32)
    pair = k.join(k.exp2(total), same).cast(BF16).cast(F32)
    y.store((k.block_id() + k.num_blocks()) * 128 + k.thread_id() * 2, pair)
    return k.grid_kernel()


def one_of_each_on_hopper() -> GridKernel:
    """Every op that only sm_90a has."""
    k = GridBuilder("one_of_each_on_hopper", threads=128)
    x, y = k.buffer("x", BF16), k.buffer("y", F32)
    right, barriers = k.shared(16 * 64, BF16), k.shared(1, I64)
    first, thread = k.thread_id().compare("eq", 0), k.thread_id()
    zero = k.index_value(0)
    with k.when(first):
        k.init_barrier(barriers, 0)
    k.barrier()
    with k.when(first):
        k.expect_bytes(barriers, 0, 8 * 64 * 2)
        k.bulk_copy(right, zero, x, zero, 8 * 64, barriers, zero)
    with k.when(thread.compare("lt", 64)):
        right.store(512 + thread * 8, x.load(512 + thread * 8, 8))
    k.fence_async()
    k.wait_barrier(barriers, 0, 0)
    k.barrier()
    left = k.join(*(x.load(1024 + thread * 16 + half * 8, 8) for half in range(2)))
    c = k.group_mma(k.f32(1.0, 8), left, right, 0, step=2)
    y.store(thread * 8, k.part(k.wait_mma(c, 0), 0, 4))
    whole = k.part(left, 0, 8).bitcast(VectorType(16, I8))
    d = k.group_mma(k.constant(VectorType(8, I32), 3), whole, right.view(I8), 0)
    y.store(thread * 8 + 4, k.part(k.wait_mma(k.group_mma(d, whole, right.view(I8), 0, step=3), 0), 4, 4).cast(F32))
    return k.grid_kernel()
