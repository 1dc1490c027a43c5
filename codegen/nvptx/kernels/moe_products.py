"""Products of experts on GPUs: y[j] = x[row of j] w[expert of j] for rows j in grouped order.

Both kernels go by the tiles of `moe_route.dispatch_kernel`: a block has rows of one expert, and nothing to do where a
tile has none. The experts' matrices lie in the order of `codegen.nvptx.fragments`, `stride` bytes apart, each with its
scales behind its codes or elsewhere at the same distance. Only chosen experts are read.

`grouped_decode_kernel` is for tiles of up to 8 or 16 rows, `grouped_gemm_kernel` for those of `shape.rows`. Rows of x
are bf16, or int8 (with weights in f8e4m3: f8e4m3) under scales that lie by row; for a `BytesShape` (products of
warpgroups on bytes) as `codegen.nvptx.kernels.gemm_wgmma_bytes.row_tiles` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import ROWS, WARPS, DecodePart, DecodeProduct, blocks_at_once
from codegen.nvptx.kernels.gemm_packed import PackedGemm, PackedShape, PackedTile
from codegen.nvptx.kernels.gemm_wgmma import GroupGemm, WgmmaShape
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, GroupBytes
from codegen.nvptx.kernels.int8 import ActivationScales, DecodeInt8, GemmInt8, check_int8, element_of_x
from codegen.nvptx.kernels.moe_route import TILE_WORDS
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I32, PlainFormat

AnyProduct = TypeVar("AnyProduct", DecodeProduct, PackedGemm)


@dataclass(frozen=True)
class Experts:
    """Matrices [n, k] of experts, `stride` bytes from one to the next.

    `gather` > 0: x has a row for each token, and row j of y is made of row order[j] // gather; 0: x is grouped already.
    `gate_up`: y [pairs, n / 2] is silu(gate) * up. `x_scales`, by row: x has 8 bits.
    """

    layout: Fragments
    stride: int
    gather: int = 0
    gate_up: bool = False
    out: PlainFormat = F32
    x_scales: ActivationScales | None = None

    def check(self) -> None:
        """Raises DiagnosticError unless every matrix begins where 16 bytes can be read, and integers meet integers."""
        if self.x_scales is not None:
            assert self.x_scales.by_row
            check_int8(self.layout)
        if self.stride % 16:
            raise DiagnosticError(f"experts {self.stride} bytes apart on GPUs", expected="a multiple of 16")


def grouped_decode_kernel(
    of: Experts, name: str, *, rows: int = ROWS, warps: int = WARPS, ahead: int = 0
) -> GridKernel:
    """A kernel (codes i32, [scales,] x, order i32 [pairs], tiles i32 [max tiles, 4], [x_scales f32,] y `of.out`,
    max tiles), launched with max tiles * `of.layout.tiles` blocks. Tiles have up to `rows` rows, 8 or 16."""
    k = GridBuilder(name, warps * WARP)
    launch = _Launch.of(k, of)
    block = k.block_id()
    expert, first, count = launch.entry(block // of.layout.tiles)
    with k.when(count.compare("gt", 0)):
        part = DecodePart(block % of.layout.tiles, count, first, lambda row: launch.source(first + row))
        kind = DecodeProduct if launch.x_scales is None else DecodeInt8
        product = kind(k, of.layout, launch.weights(expert), (launch.x, launch.y), part, rows, of.gate_up)
        launch.scaled(product).build(ahead)
    return k.grid_kernel(blocks_at_once=blocks_at_once(rows))


def grouped_gemm_kernel(of: Experts, name: str, shape: PackedShape) -> GridKernel:
    """A kernel with the arguments of `grouped_decode_kernel`, launched with `grouped_blocks` blocks. Tiles have up to
    `shape.rows` rows; a `WgmmaShape`, with activations of 8 bits a `BytesShape`, takes products of warpgroups, on
    sm_90a."""
    k = GridBuilder(name, shape.threads)
    launch = _Launch.of(k, of)
    block = k.block_id()
    expert, first, count = launch.entry(block % launch.most)
    with k.when(count.compare("gt", 0)):
        tile = PackedTile(first, first + count, block // launch.most * shape.tiles, launch.source)
        product = _kind_of(of, shape)(
            k, shape, of.layout, launch.weights(expert), (launch.x, launch.y), tile, of.gate_up
        )
        launch.scaled(product).build()
    return k.grid_kernel()


def _kind_of(of: Experts, shape: PackedShape) -> type[PackedGemm]:
    """Who writes a block of the product."""
    if of.x_scales is not None:
        return GroupBytes if isinstance(shape, BytesShape) else GemmInt8
    return GroupGemm if isinstance(shape, WgmmaShape) else PackedGemm


def grouped_blocks(of: Experts, shape: PackedShape, most: int) -> int:
    """Blocks of a launch of `grouped_gemm_kernel` for so many tiles of rows."""
    return most * -(-of.layout.tiles // shape.tiles)


@dataclass(frozen=True)
class _Launch:
    """The arguments of both kernels."""

    experts: Experts
    codes: Buffer
    scales: Buffer | None
    x: Buffer
    order: Buffer
    tiles: Buffer
    x_scales: Buffer | None
    y: Buffer
    most: Expr

    @classmethod
    def of(cls, k: GridBuilder, of: Experts) -> _Launch:
        of.check()
        codes = k.buffer("codes", I32)
        scales = k.buffer("scales", of.layout.scale_element) if of.layout.group else None
        x = k.buffer("x", BF16 if of.x_scales is None else element_of_x(of.layout))
        order, tiles = k.buffer("order", I32), k.buffer("tiles", I32)
        x_scales = k.buffer("xs", F32) if of.x_scales is not None else None
        return cls(of, codes, scales, x, order, tiles, x_scales, k.buffer("y", of.out), k.size("tiles"))

    def scaled(self, product: AnyProduct) -> AnyProduct:
        """The product with the scales of x, where x has some."""
        if isinstance(product, DecodeInt8 | GemmInt8 | GroupBytes):
            assert self.experts.x_scales is not None and self.x_scales is not None
            product.with_scales(self.experts.x_scales, self.x_scales)
        return product

    def entry(self, number: Expr) -> tuple[Expr, Expr, Expr]:
        """(expert, first row in grouped order, rows) of a tile."""
        words = self.tiles.load(number * TILE_WORDS, TILE_WORDS)
        expert, first, count = (words.extract(i).to_index() for i in range(3))
        return expert, first, count

    def weights(self, expert: Expr) -> tuple[Buffer, Buffer | None]:
        """The matrix of an expert."""
        each = self.experts.layout.scale_element.dtype.itemsize
        codes = self.codes.at(expert * (self.experts.stride // 4))
        return codes, None if self.scales is None else self.scales.at(expert * (self.experts.stride // each))

    def source(self, row: Expr) -> Expr:
        """The row of x that a row in grouped order is made of."""
        return self.order.load(row).to_index() // self.experts.gather if self.experts.gather else row
