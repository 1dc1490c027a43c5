"""Products with weights in f8e4m3: exact against the formats' meaning, with activations in bf16 and in f8e4m3."""

from __future__ import annotations

import numpy as np
import pytest

from codegen.nvptx.builder import GridBuilder, GridKernel
from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import decode_kernel
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    decode_int8_kernel,
    gemm_int8_kernel,
)
from codegen.nvptx.kernels.quantize_rows import quantize_rows_kernel
from codegen.nvptx.kernels.weight_factors import from_fp8
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, F8E5M2, F32, I32, FP8Format, PackedArray
from ir.grid_interpreter import interpret_grid
from tests.samples.base import normal

N, K = 40, 256
FORMATS = [FP8Format(F8E4M3), FP8Format(F8E4M3, 1, 64), FP8Format(F8E4M3, 16, 128)]
SHAPE = PackedShape(32, 2, 16, 1, 2)


def weights(format: FP8Format) -> PackedArray:
    """Whole numbers with scales that are powers of two, so that sums are exact."""
    rng = np.random.default_rng(4)
    codes = rng.integers(-8, 9, (N, K)).astype(F8E4M3.dtype).view(np.uint8)
    scales = 2.0 ** rng.integers(-1, 2, (-(-N // format.block_rows), format.groups(K)))
    return PackedArray(format, (N, K), codes, scales.astype(np.float32))


def run(kernel: GridKernel, blocks: int, layout: Fragments, w: PackedArray, *x: np.ndarray) -> np.ndarray:
    m = len(x[0])
    y = np.full((m, N), np.nan, np.float32)
    arguments = [layout.codes(w), layout.scales(w), *x, y, m]
    assert interpret_grid(kernel.func, arguments, blocks=blocks, threads=kernel.threads).bank_conflicts == 0
    return y


def test_every_code_is_itself_in_bf16() -> None:
    k = GridBuilder("codes", 64)
    x, y = k.buffer("x", I32), k.buffer("y", BF16)
    word = x.load(k.thread_id())
    y.store(k.thread_id() * 4, k.join(from_fp8(k, word, 0), from_fp8(k, word, 1)))
    codes, got = np.arange(256, dtype=np.uint8), np.zeros(256, BF16.dtype)
    interpret_grid(k.grid_kernel().func, [codes.view(np.int32), got], blocks=1, threads=64)
    meant = codes.view(F8E4M3.dtype).astype(np.float32)
    known = ~np.isnan(meant)
    assert known.sum() == 254
    np.testing.assert_array_equal(got[known].astype(np.float32), meant[known])
    np.testing.assert_array_equal(np.signbit(got[known]), np.signbit(meant[known]))


@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_activations_in_bf16(format: FP8Format) -> None:
    w, layout = weights(format), Fragments.of(N, K, format)
    assert layout.codes(w).nbytes + layout.scales(w).nbytes == layout.nbytes
    x = np.random.default_rng(5).integers(-4, 5, (19, K)).astype(BF16.dtype)
    meant = x.astype(np.float32) @ format.unpack(w).T
    got = run(decode_kernel(layout, "product", warps=2), layout.tiles, layout, w, x[:3])
    np.testing.assert_array_equal(got, meant[:3])
    got = run(gemm_packed_kernel(layout, "product", SHAPE), SHAPE.blocks(19, layout), layout, w, x)
    np.testing.assert_array_equal(got, meant)


@pytest.mark.parametrize("x_group", [0, 128])
@pytest.mark.parametrize("format", FORMATS, ids=str)
def test_activations_in_fp8(format: FP8Format, x_group: int) -> None:
    w, layout, held = weights(format), Fragments.of(N, K, format), ActivationScales(K, x_group)
    rng = np.random.default_rng(6)
    x = rng.integers(-8, 9, (19, K)).astype(F8E4M3.dtype)
    of_x = (2.0 ** rng.integers(-1, 2, (held.groups, 20))).astype(np.float32)
    meant = (x.astype(np.float32) * np.repeat(of_x[:, :19].T, K // held.groups, axis=1)) @ format.unpack(w).T
    few = np.ascontiguousarray(of_x[:, :12])
    got = run(decode_int8_kernel(layout, held, "product", rows=16, warps=2), layout.tiles, layout, w, x[:11], few)
    np.testing.assert_array_equal(got, meant[:11])
    got = run(gemm_int8_kernel(layout, held, "product", SHAPE), SHAPE.blocks(19, layout), layout, w, x, of_x)
    np.testing.assert_array_equal(got, meant)


@pytest.mark.parametrize("group", [0, 64])
def test_rows_are_rounded(group: int) -> None:
    m, held = 3, ActivationScales(192, group)
    x = normal(m, 192)
    x[0, :64] = 0
    codes, scales = np.zeros((m, 192), F8E4M3.dtype), np.zeros((held.groups, 4), np.float32)
    made = quantize_rows_kernel(held, "rounded", F32, F8E4M3)
    interpret_grid(made.func, [x, codes, scales, m], blocks=m, threads=made.threads)
    largest = np.abs(x.reshape(m, held.groups, -1)).max(axis=-1)
    np.testing.assert_allclose(scales[:, :m].T, largest / 448, rtol=1e-6)
    back = codes.astype(np.float32).reshape(m, held.groups, -1) * scales[:, :m].T[..., None]
    error = np.abs(back.reshape(m, -1) - x)
    assert (error <= 2.0**-4 * np.abs(x) + np.repeat(largest, 192 // held.groups, axis=1) / 448 * 2.0**-10 + 1e-9).all()


def test_what_has_no_product() -> None:
    for format in (FP8Format(F8E5M2), FP8Format(F8E4M3, 1, 32), FP8Format(F8E4M3, 128, 192)):
        with pytest.raises(DiagnosticError, match="columns has no product on GPUs"):
            Fragments.of(N, K, format)
    layout = Fragments.of(N, K, FORMATS[0])
    made = gemm_int8_kernel(layout, ActivationScales(K), "product", SHAPE)
    with pytest.raises(DiagnosticError, match="@product has instructions that sm_80 lacks") as caught:
        compile_ptx([made], "sm_80")
    assert "sm_89 or sm_90" in str(caught.value) and "in bf16" in str(caught.value)
    assert ".version 8.4" in compile_ptx([made], "sm_89")
    compile_ptx([gemm_packed_kernel(layout, "product", SHAPE)], "sm_80")


def test_casts_of_single_numbers_are_refused() -> None:
    k = GridBuilder("one", 32)
    x, y = k.buffer("x", F32), k.buffer("y", F8E4M3)
    y.store(k.thread_id(), x.load(k.thread_id()).cast(F8E4M3))
    with pytest.raises(DiagnosticError, match="cast to f8e4m3 on GPUs in pairs"):
        compile_ptx([k.grid_kernel()], "sm_89")
