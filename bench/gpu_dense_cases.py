"""Experts of a prompt beside a dense product of as many operations, as cases of `bench.gpu_cases`."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase, numbers, packed_weights, products_of
from bench.gpu_moe_cases import CHECKED, experts_case
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape, gemm_wgmma_kernel
from ir.formats import BF16


def real_dense() -> list[GpuCase]:
    """4096 tokens of 8 experts are 32768 rows; for sm_90a the experts of `wgmma` too."""
    return [
        dense_case("dense_w16_m32768", 32768, 1536, 2048, PackedShape.of(32768)),
        dense_case("dense_wgmma_w16_m32768", 32768, 1536, 2048, WgmmaShape.of(32768)),
        experts_case("experts_wgmma_w16_m4096", 4096, 128, 8, 1536, 2048, BF16, shape=WgmmaShape.of(256)),
    ]


def small_dense() -> list[GpuCase]:
    """The same, a few blocks each."""
    return [
        dense_case("dense_w16", 20, 40, 192, PackedShape(16, 2, 16, 1, 2)),
        experts_case("experts_wgmma_w16", 20, 3, 1, 64, 128, BF16, shape=WgmmaShape.with_rows(16, 1, 4)),
    ]


def dense_case(name: str, m: int, n: int, k: int, shape: PackedShape) -> GpuCase:
    """The product that takes as many operations as those of experts do: all rows with one matrix, in bf16."""
    layout = Fragments.of(n, k, BF16)
    held: dict[str, np.ndarray] = {}
    chosen = np.unique(np.linspace(0, m - 1, CHECKED).astype(int))

    def make(rng: np.random.Generator) -> list[Any]:
        weights, held["w"] = packed_weights(rng, layout, BF16)
        return [*weights, numbers(rng, (m, k)), np.full((m, n), -1).astype(BF16.dtype), m]

    many = gemm_wgmma_kernel(layout, name, shape, BF16) if isinstance(shape, WgmmaShape) else None
    kernel = many or gemm_packed_kernel(layout, name, shape, BF16)
    return GpuCase(
        name, kernel, shape.blocks(m, layout), make, lambda a: [products_of(a[1][chosen], held["w"])], (2,),
        layout.nbytes + 2 * m * (k + n), 2 * m * n * k, 2.0**-8, rows=chosen,
    )  # fmt: skip
