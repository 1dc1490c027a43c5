"""Launches of products with activations of 8 bits: rows rounded under scales, then the product with weights alike.

Int8 meets integers, f8e4m3 (from sm_89 on) meets weights in f8e4m3. On sm_90a products of many rows are products of
warpgroups, and rows are rounded into the places where these want them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from codegen.kernels.call import SizeArgument
from codegen.nvptx.emitters.stored import Output, tile_rows, weight_parts
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import ROWS
from codegen.nvptx.kernels.gemm_packed import PackedShape
from codegen.nvptx.kernels.gemm_wgmma_bytes import BytesShape, row_tiles, wgmma_bytes_kernel
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    check_int8,
    decode_int8_kernel,
    element_of_x,
    gemm_int8_kernel,
)
from codegen.nvptx.kernels.quantize_rows import quantize_rows_kernel
from codegen.nvptx.kernels.row_tiles import GROUP, RowTiles
from codegen.nvptx.launches import (
    GridArgument,
    GridContext,
    GridLaunch,
    Temporary,
    refused,
    refused_by,
    size_text,
    tensor_type,
)
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import F8E4M3, F32, I8, FP8Format, GroupedIntFormat, NumberFormat, PlainFormat
from ir.ops.quant import QuantizeOp
from ir.types import Dim, TensorType


@dataclass(frozen=True)
class Rounded:
    """Rows of int8 codes, and their scales. `tiles`: where they lie for products of warpgroups."""

    codes: Temporary
    scales: Temporary
    of: ActivationScales
    tiles: RowTiles | None = None

    def shape(self, rows: int) -> PackedShape:
        """A block's tile of a product of up to `rows` rows."""
        return (PackedShape if self.tiles is None else BytesShape).of(rows)


def by_warpgroups(context: GridContext, *, grouped: bool) -> bool:
    """Whether products of bytes of this program are those of warpgroups. Dense ones take rows by eights, so that the
    arena must have room for the last of them."""
    return context.options.hopper and not context.few and (grouped or context.most % GROUP == 0)


def rounded(
    op: Op, quantize: QuantizeOp, x: GridArgument, element: PlainFormat, *, by_row: bool, warpgroups: Fragments | None
) -> tuple[Rounded, GridLaunch]:
    """The rows `x` (of `element`) as the quantize of a product's region wants them, or products of `warpgroups` with
    weights that lie so. Refuses other formats than int8 and f8e4m3 under f32 scales of rows or of columns of a row."""
    type = tensor_type(quantize.x)
    width, found = type.shape[-1], _columns_of_scale(quantize.format)
    assert isinstance(width, int)
    if found is None:
        message = f"activations in {quantize.format} have no kernel on GPUs"
        raise refused(op, message, "q8_sym or f8e4m3 with scale=f32 and groups of columns, or 16 bits")
    group, to = found
    try:
        of = ActivationScales(width, 0 if group == width else group, by_row)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    tiles = None
    if warpgroups is not None:
        of = of if by_row else replace(of, rows=GROUP)
        tiles = replace(row_tiles(warpgroups, of), element=to)
    rows, columns = type.shape[0], width if tiles is None else tiles.padded
    scales = of.row if by_row else of.groups
    made = Rounded(Temporary(TensorType((rows, columns), to)), Temporary(TensorType((rows, scales), F32)), of, tiles)
    text = size_text(rows)
    grid = text if tiles is None or by_row else f"ceil({text}, {GROUP}) * {GROUP}"
    stem = f"quantize_{width}{'_tiles' * (tiles is not None)}"
    launch = GridLaunch(
        stem, ("quantize", of, element, to, tiles), [x, made.codes, made.scales, SizeArgument(rows)], (1, 2), grid,
        lambda name: quantize_rows_kernel(of, name, element, to, tiles),
    )  # fmt: skip
    return made, launch


def _columns_of_scale(format: NumberFormat) -> tuple[int, PlainFormat] | None:
    """The columns that share a scale (0: all) and what activations are rounded to; None for other formats."""
    if isinstance(format, GroupedIntFormat):
        plain = format.bits == 8 and not format.zero_point and format.channel is None
        return (format.group, I8) if plain and format.scale == F32 else None
    if isinstance(format, FP8Format) and format.element == F8E4M3 and format.block_rows == 1 and format.scale == F32:
        return format.block_cols, F8E4M3
    return None


def check_alike(op: Op, layout: Fragments, x: Rounded) -> None:
    """Raises DiagnosticError where rounded rows and weights are not of one kind."""
    try:
        check_int8(layout)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    if element_of_x(layout) != x.codes.type.element:
        kinds = f"activations in {x.codes.type.element} and weights in {'f8e4m3' if layout.fp8 else 'integers'}"
        raise refused(op, f"{kinds} have no product on GPUs", "both integers, or both f8e4m3")


def int8_launch(
    op: Op, layout: Fragments, x: Rounded, weight: Value, output: Output, rows: Dim, context: GridContext
) -> GridLaunch:
    """The product alone."""
    check_alike(op, layout, x)
    arguments = [*weight_parts(layout, weight), x.codes, x.scales, output.y, SizeArgument(rows)]
    stem = f"{layout.n}x{layout.k}_w{layout.bits}a8{'_fp8' * layout.fp8}{'_gate' if output.gate else ''}"
    of, made = x.of, {"out": output.element, "gate_up": output.gate}
    if context.few:
        most = tile_rows(context)
        return GridLaunch(
            f"decode_{stem}{'' if most == ROWS else '_rows16'}", ("decode_int8", layout, of, most, *made.values()),
            arguments, (4,), str(layout.tiles),
            lambda name: decode_int8_kernel(layout, of, name, rows=most, **made), True,
        )  # fmt: skip
    shape = x.shape(context.most)
    grid = f"ceil({size_text(rows)}, {shape.rows}) * {-(-layout.tiles // shape.tiles)}"
    key = ("gemm_int8", layout, of, shape, *made.values())
    if isinstance(shape, BytesShape):
        return GridLaunch(
            f"wgmma_{stem}", key, arguments, (4,), grid,
            lambda name: wgmma_bytes_kernel(layout, of, name, shape, **made), True,
        )  # fmt: skip
    return GridLaunch(
        f"gemm_{stem}", key, arguments, (4,), grid, lambda name: gemm_int8_kernel(layout, of, name, shape, **made), True
    )
