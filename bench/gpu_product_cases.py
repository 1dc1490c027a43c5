"""Cases of products of many rows with weights in the order of decoding, for `bench.gpu` and the tests."""

from __future__ import annotations

from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase, numbers, packed_weights, products_of
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from ir.formats import BF16, GroupedIntFormat

Q4, Q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)


def real_products() -> list[GpuCase]:
    """A batch of 64 and the rows of a prompt."""
    return [
        _packed(f"gemm_{name}_m{m}", m, 14336, 4096, format, PackedShape.of(m))
        for name, format in (("w16", BF16), ("w8", Q8), ("w4", Q4))
        for m in (64, 4096)
    ]


def small_products() -> list[GpuCase]:
    """The same kernels, a few blocks each."""
    shape = PackedShape(16, 2, 16, 1, 2)
    return [
        _packed("gemm_w16", 20, 40, 192, BF16, shape),
        _packed("gemm_w8", 17, 32, 128, GroupedIntFormat(8, 128), shape),
        _packed("gemm_w4", 17, 40, 128, Q4, PackedShape(32, 2, 16, 2, 3)),
    ]


def _packed(name: str, m: int, n: int, k: int, format: Any, shape: PackedShape) -> GpuCase:
    layout = Fragments.of(n, k, format)
    held: dict[str, np.ndarray] = {}  # the weights as numbers, which the arguments hold packed

    def make(rng: np.random.Generator) -> list[Any]:
        weights, held["w"] = packed_weights(rng, layout, format)
        return [*weights, numbers(rng, (m, k)), np.full((m, n), -1).astype(BF16.dtype), m]

    kernel = gemm_packed_kernel(layout, name, shape, BF16)
    last = 3 if layout.group else 2
    return GpuCase(
        name, kernel, shape.blocks(m, layout), make, lambda a: [products_of(a[last - 1], held["w"])], (last,),
        layout.nbytes + 2 * m * (k + n), 2 * m * n * k, 2.0**-8,
    )  # fmt: skip
