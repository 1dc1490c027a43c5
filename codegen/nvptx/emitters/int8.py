"""Launches of products with int8 activations: rows rounded under scales, then the product of both kinds of integers."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.call import SizeArgument
from codegen.nvptx.emitters.stored import Output, tile_rows, weight_parts
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import ROWS
from codegen.nvptx.kernels.gemm_packed import PackedShape
from codegen.nvptx.kernels.int8 import (
    ActivationScales,
    check_int8,
    decode_int8_kernel,
    gemm_int8_kernel,
    quantize_rows_kernel,
)
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
from ir.formats import F32, I8, GroupedIntFormat, PlainFormat
from ir.ops.quant import QuantizeOp
from ir.types import Dim, TensorType


@dataclass(frozen=True)
class Rounded:
    """Rows of int8 codes, and their scales."""

    codes: Temporary
    scales: Temporary
    of: ActivationScales


def rounded(
    op: Op, quantize: QuantizeOp, x: GridArgument, element: PlainFormat, *, by_row: bool
) -> tuple[Rounded, GridLaunch]:
    """The rows `x` (of `element`) as the quantize of a product's region wants them. Refuses other formats than int8."""
    format, type = quantize.format, tensor_type(quantize.x)
    width = type.shape[-1]
    assert isinstance(width, int)
    plain = isinstance(format, GroupedIntFormat) and format.bits == 8 and not format.zero_point
    if not (plain and isinstance(format, GroupedIntFormat) and format.scale == F32 and format.channel is None):
        raise refused(op, f"activations in {format} have no kernel on GPUs", "q8_sym with scale=f32, or 16 bits")
    try:
        of = ActivationScales(width, 0 if format.group in (0, width) else format.group, by_row)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    rows = type.shape[0]
    scales = of.row if by_row else of.groups
    made = Rounded(Temporary(TensorType((rows, width), I8)), Temporary(TensorType((rows, scales), F32)), of)
    launch = GridLaunch(
        f"quantize_{width}", ("quantize", of, element), [x, made.codes, made.scales, SizeArgument(rows)], (1, 2),
        size_text(rows), lambda name: quantize_rows_kernel(of, name, element),
    )  # fmt: skip
    return made, launch


def int8_launch(
    op: Op, layout: Fragments, x: Rounded, weight: Value, output: Output, rows: Dim, context: GridContext
) -> GridLaunch:
    """The product alone."""
    try:
        check_int8(layout)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    arguments = [*weight_parts(layout, weight), x.codes, x.scales, output.y, SizeArgument(rows)]
    stem = f"{layout.n}x{layout.k}_w{layout.bits}a8{'_gate' if output.gate else ''}"
    of, made = x.of, {"out": output.element, "gate_up": output.gate}
    if context.few:
        most = tile_rows(context)
        return GridLaunch(
            f"decode_{stem}{'' if most == ROWS else '_rows16'}", ("decode_int8", layout, of, most, *made.values()),
            arguments, (4,), str(layout.tiles),
            lambda name: decode_int8_kernel(layout, of, name, rows=most, **made), True,
        )  # fmt: skip
    shape = PackedShape.of(context.options.prefill_tokens)
    return GridLaunch(
        f"gemm_{stem}", ("gemm_int8", layout, of, shape, *made.values()), arguments, (4,),
        f"ceil({size_text(rows)}, {shape.rows}) * {-(-layout.tiles // shape.tiles)}",
        lambda name: gemm_int8_kernel(layout, of, name, shape, **made), True,
    )  # fmt: skip
