"""Cases of products of many rows with weights in the order of decoding, and of int8, for `bench.gpu` and the tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase, numbers, packed_weights, products_of
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape, gemm_wgmma_kernel
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, row_tiles, wgmma_bytes_kernel
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    decode_int8_kernel,
    gemm_int8_kernel,
)
from codegen.nvptx.kernels.quantize_rows import arrange_rows_kernel, quantize_rows_kernel
from codegen.nvptx.kernels.row_tiles import GROUP, RowTiles
from ir.formats import BF16, F8E4M3, I8, FP8Format, GroupedIntFormat, PlainFormat

Q4, Q8 = GroupedIntFormat(4, 32), GroupedIntFormat(8, 32)


def real_products() -> list[GpuCase]:
    """A batch of 64 and the rows of a prompt."""
    return [
        _packed(f"gemm_{name}_m{m}", m, 14336, 4096, format, PackedShape.of(m))
        for name, format in (("w16", BF16), ("w8", Q8), ("w4", Q4))
        for m in (64, 4096)
    ] + [
        _int8("decode_w8a8_m1", 1, 14336, 4096, Q8, 128), _int8("decode_w4a8_m16", 16, 14336, 4096, Q4, 128),
        _int8("gemm_w8a8", 4096, 14336, 4096, GroupedIntFormat(8, 0), 0),
        _int8("gemm_w4a8", 4096, 14336, 4096, Q4, 128), _rounding("quantize_rows", 8192, 4096, 128),
    ]  # fmt: skip


def small_products() -> list[GpuCase]:
    """The same kernels, a few blocks each."""
    shape = PackedShape(16, 2, 16, 1, 2)
    return [
        _packed("gemm_w16", 20, 40, 192, BF16, shape),
        _packed("gemm_w8", 17, 32, 128, GroupedIntFormat(8, 128), shape),
        _packed("gemm_w4", 17, 40, 128, Q4, PackedShape(32, 2, 16, 2, 3)),
        _int8("decode_w8a8", 3, 40, 192, Q8, 64), _int8("decode_w4a8", 11, 16, 256, Q4, 128),
        _int8("gemm_w8a8", 17, 40, 128, GroupedIntFormat(8, 0), 0, shape),
        _int8("gemm_w4a8", 20, 32, 128, Q4, 64, shape),
        _rounding("quantize_rows", 2, 192, 64), _rounding("quantize_whole_rows", 2, 2112, 0),
    ]  # fmt: skip


def _int8(
    name: str,
    m: int,
    n: int,
    k: int,
    format: GroupedIntFormat | FP8Format,
    group: int,
    shape: PackedShape | None = None,
) -> GpuCase:
    """Activations of 8 bits; a `BytesShape` takes products of warpgroups, and x where they want it."""
    groups = isinstance(shape, BytesShape)
    layout, of_x = Fragments.of(n, k, format), ActivationScales(k, group, rows=GROUP if groups else 4)
    held: dict[str, np.ndarray] = {}

    def make(rng: np.random.Generator) -> list[Any]:
        weights, held["w"] = packed_weights(rng, layout, format)
        scales = (rng.random(of_x.count(m), np.float32) + 1) / 128
        x = numbers(rng, (m, k), F8E4M3) if layout.fp8 else rng.integers(-127, 128, (m, k)).astype(np.int8)
        held["x"] = x.astype(np.float32)
        x = row_tiles(layout, of_x).arranged(x) if groups else x
        return [*weights, x, scales, np.full((m, n), np.nan, np.float32), m]

    def meant(a: Sequence[Any]) -> list[np.ndarray]:
        scales = a[3].reshape(of_x.groups, -1)[:, :m].T
        return [products_of(held["x"] * np.repeat(scales, k // of_x.groups, axis=1), held["w"])]

    moved = layout.nbytes + m * (k + 4 * n) + 4 * of_x.count(m)
    if name.startswith("decode"):
        kernel, blocks = decode_int8_kernel(layout, of_x, name, rows=8 if m <= 8 else 16), layout.tiles
    elif isinstance(shape, BytesShape):
        kernel, blocks = wgmma_bytes_kernel(layout, of_x, name, shape), shape.blocks(m, layout)
    else:
        shape = shape or PackedShape.of(m)
        kernel, blocks = gemm_int8_kernel(layout, of_x, name, shape), shape.blocks(m, layout)
    return GpuCase(name, kernel, blocks, make, meant, (4,), moved, 2 * m * n * k, 1e-4)


def real_fp8() -> list[GpuCase]:
    """Weights in f8e4m3 with activations in f8e4m3, from sm_89 on."""
    format = FP8Format(F8E4M3)
    return [
        _int8("decode_fp8_m1", 1, 14336, 4096, format, 0), _int8("gemm_fp8", 4096, 14336, 4096, format, 0),
        _rounding("quantize_rows_fp8", 8192, 4096, 128, F8E4M3),
    ]  # fmt: skip


def small_fp8() -> list[GpuCase]:
    """The same kernels, a few blocks each."""
    format = FP8Format(F8E4M3, 1, 64)
    return [
        _int8("decode_fp8", 3, 40, 192, format, 0),
        _int8("gemm_fp8", 17, 40, 128, format, 128, PackedShape(16, 2, 16, 1, 2)),
        _rounding("quantize_rows_fp8", 2, 192, 64, F8E4M3),
    ]


def _rounding(name: str, rows: int, k: int, group: int, to: PlainFormat = I8, tiles: bool = False) -> GpuCase:
    """Rows rounded to 8 bits; with `tiles` into the places of products of warpgroups with weights of 4 bits."""
    of_x = ActivationScales(k, group, rows=GROUP if tiles else 4)
    places = RowTiles(k, to, crossed=True) if tiles else None
    stored = places.rows(rows) if places else rows

    def make(rng: np.random.Generator) -> list[Any]:
        x = numbers(rng, (rows, k))
        codes = np.zeros(places.count(rows) if places else (rows, k), to.dtype)
        return [x, codes, np.zeros(of_x.count(rows), np.float32), rows]

    def meant(a: Sequence[Any]) -> list[np.ndarray]:
        grouped = a[0].astype(np.float32).reshape(rows, of_x.groups, -1)
        largest = np.abs(grouped).max(axis=-1, keepdims=True)
        scaled = (grouped * (np.float32(127 if to == I8 else 448) / largest)).reshape(rows, k)
        codes = (np.rint(scaled) if to == I8 else scaled).astype(to.dtype)
        return [places.arranged(codes).reshape(-1) if places else codes]

    kernel, tolerance = quantize_rows_kernel(of_x, name, BF16, to, places), 1 / 254 if to == I8 else 1 / 16
    return GpuCase(name, kernel, stored, make, meant, (1,), rows * (3 * k + 4 * of_x.groups), 0, tolerance)


def _packed(name: str, m: int, n: int, k: int, format: Any, shape: PackedShape, *, tiled: bool = False) -> GpuCase:
    """Activations in bf16; `tiled`: where bulk copies of a product of warpgroups bring them from."""
    layout = Fragments.of(n, k, format)
    held: dict[str, np.ndarray] = {}  # the weights as numbers, which the arguments hold packed

    def make(rng: np.random.Generator) -> list[Any]:
        weights, held["w"] = packed_weights(rng, layout, format)
        if isinstance(shape, WgmmaShape):
            held["w"] = held["w"].astype(BF16.dtype)  # it rounds weights under their scales
        held["x"] = numbers(rng, (m, k))
        x = RowTiles(k, BF16).arranged(held["x"]) if tiled else held["x"]
        return [*weights, x, np.full((m, n), -1).astype(BF16.dtype), m]

    if isinstance(shape, WgmmaShape):
        kernel = gemm_wgmma_kernel(layout, name, shape, BF16, tiled=tiled)
    else:
        kernel = gemm_packed_kernel(layout, name, shape, BF16)
    last = 3 if layout.group else 2
    return GpuCase(
        name, kernel, shape.blocks(m, layout), make, lambda a: [products_of(held["x"], held["w"])], (last,),
        layout.nbytes + 2 * m * (k + n), 2 * m * n * k, 2.0**-8,
    )  # fmt: skip


def _ordering(name: str, m: int, k: int) -> GpuCase:
    """Rows in bf16 put where bulk copies bring them from."""
    tiles = RowTiles(k, BF16)

    def make(rng: np.random.Generator) -> list[Any]:
        return [numbers(rng, (m, k)), np.zeros(tiles.count(m), BF16.dtype), m]

    def meant(a: Sequence[Any]) -> list[np.ndarray]:
        return [tiles.arranged(a[0]).reshape(-1)]

    return GpuCase(name, arrange_rows_kernel(tiles, name), tiles.rows(m), make, meant, (1,), 4 * m * k, 0, 0.0)


def real_wgmma() -> list[GpuCase]:
    """For sm_90a: beside torch's at one size, and the rows of a batch and of a prompt in every format."""
    return [
        _packed("wgmma", 4096, 4096, 4096, BF16, WgmmaShape.of(4096)),
        _packed("wgmma_tiled", 4096, 4096, 4096, BF16, WgmmaShape.of(4096), tiled=True),
        _ordering("arrange_rows", 4096, 4096),
    ] + [
        _packed(f"wgmma_{name}_m{m}", m, 14336, 4096, format, WgmmaShape.of(m))
        for name, format in (("w16", BF16), ("w8", Q8), ("w4", Q4))
        for m in (64, 512, 4096)
    ] + [
        _int8(f"wgmma_{name}_m{m}", m, 14336, 4096, format, group, BytesShape.of(m))
        for name, format, group in (
            ("w8a8", Q8, 128), ("w8a8_rows", GroupedIntFormat(8, 0), 0), ("w4a8", Q4, 128),
            ("fp8", FP8Format(F8E4M3, 128, 128), 128),
        )
        for m in (64, 512, 4096)
    ] + [_rounding("quantize_rows_tiles", 8192, 4096, 128, tiles=True)]  # fmt: skip


def small_wgmma() -> list[GpuCase]:
    """The same kernel, a few blocks each."""
    return [
        _packed("wgmma_w16", 20, 72, 320, BF16, WgmmaShape.with_rows(16, 1, 4)),
        _packed("wgmma_w8", 9, 64, 128, GroupedIntFormat(8, 128), WgmmaShape.with_rows(16, 1, 3)),
        _packed("wgmma_w4", 20, 72, 256, Q4, WgmmaShape.with_rows(8, 2, 4)),
        _packed("wgmma_tiled", 20, 72, 128, BF16, WgmmaShape.with_rows(16, 1, 3), tiled=True),
        _ordering("arrange_rows", 3, 200),
        _int8("wgmma_w8a8", 9, 64, 192, GroupedIntFormat(8, 64), 0, BytesShape.with_rows(16, 1, 3)),
        _int8("wgmma_w4a8", 20, 72, 256, Q4, 128, BytesShape.with_rows(32, 1, 2)),
        _int8("wgmma_fp8", 17, 48, 256, FP8Format(F8E4M3), 128, BytesShape.with_rows(16, 1, 2)),
        _rounding("quantize_rows_tiles", 2, 192, 64, tiles=True),
    ]
