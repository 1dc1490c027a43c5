"""Launches of matrix products with what was fused into them: [norm, cast] -> product -> bias, gate, residual, cast.

rows of activations in bf16    a row by row kernel, where there is a norm or a cast before
the product                    `decode` for up to 16 rows, `gemm_packed` (on sm_90a `gemm_wgmma`) for more, on the same
                               stored weights (with activations of 8 bits `codegen.nvptx.emitters.int8`);
                               `gemm` on row-major bf16 weights; `wide` for f32
what comes behind it           a row by row kernel, unless the product's kernel writes the result itself
"""

from __future__ import annotations

from codegen.kernels.call import SizeArgument, rows_of
from codegen.nvptx.emitters.int8 import Rounded, by_warpgroups, check_alike, int8_launch, rounded
from codegen.nvptx.emitters.rows import part_launch, temporary_like
from codegen.nvptx.emitters.stored import Output, fragments_of, tile_rows, weight_parts
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import ROWS, decode_kernel
from codegen.nvptx.kernels.gemm import GemmShape, check_gemm, gemm_kernel
from codegen.nvptx.kernels.gemm_packed import PackedShape, gemm_packed_kernel
from codegen.nvptx.kernels.gemm_wgmma import WgmmaShape, gemm_wgmma_kernel
from codegen.nvptx.kernels.moe_products import Experts, grouped_decode_kernel, grouped_gemm_kernel
from codegen.nvptx.kernels.row_tiles import GROUP, RowTiles
from codegen.nvptx.kernels.wide import WARPS, wide_kernel
from codegen.nvptx.launches import (
    Count,
    GridArgument,
    GridContext,
    GridLaunch,
    Temporary,
    WeightPart,
    grid_emitter,
    refused,
    refused_by,
    size_text,
    tensor_type,
)
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, PlainFormat
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.tensor import CastOp
from ir.types import Dim
from passes.fuse.forms import FormError, GemmForm, describe_gemm

FEW = GemmShape(16, 64, 16, 16, 4)  # a block's tile where a step has few rows
WIDE_ROWS = 8  # of x that a block of `wide_kernel` takes where there are many


def gemm_form(op: Op) -> GemmForm:
    """The parts of a product. Raises DiagnosticError for parts that GPUs have no kernels for."""
    try:
        form = describe_gemm(op)
    except FormError as fault:
        raise refused(op, f"no kernel for this '{op.name}' of kind \"gemm\": {fault}") from None
    if form.rotate is not None:
        raise refused(op, "rotated activations have no kernel on GPUs", "a recipe without a rotation of weights")
    return form


@grid_emitter(MatmulOp, GroupedGemmOp)
def emit_product(op: Op, context: GridContext) -> list[GridLaunch]:
    """A matrix product, dense or of experts, alone or as the heart of a fused region."""
    form = gemm_form(op)
    launches: list[GridLaunch] = []
    x = activations(op, form, launches, context)
    weight, product = op.operands[form.weight], form.product
    type = tensor_type(weight)
    gate = type.layout is not None and type.layout.interleave == 2
    value = form.epilogue[0].results[0] if gate else product.results[0]
    rest = form.epilogue[1:] if gate else form.epilogue
    element: PlainFormat = F32
    if type.element != F32 and len(rest) == 1 and isinstance(rest[0], CastOp) and rest[0].to == BF16:
        value, rest, element = rest[0].results[0], (), BF16
    output = Output(temporary_like(value) if rest else op.results[0], element, gate)
    if isinstance(product, GroupedGemmOp):
        launches.append(_of_experts(op, form, x, output, context))
    else:
        launches.append(_dense(op, product, x, weight, output, context))
    if rest:
        outer: dict[Value, GridArgument] = dict(zip(op.region.block.arguments, op.operands, strict=True))
        outer[value] = output.y
        launches.append(part_launch(rest, outer, op.results[0], context))
    return launches


def activations(op: Op, form: GemmForm, launches: list[GridLaunch], context: GridContext) -> GridArgument | Rounded:
    """Where the rows lie that the product multiplies; adds the launches that make them."""
    x = op.operands[form.x]
    if not form.prologue:
        return x
    outer: dict[Value, GridArgument] = dict(zip(op.region.block.arguments, op.operands, strict=True))
    before = form.prologue if form.quantize is None else form.prologue[:-1]
    made: GridArgument = x
    if before:
        made = temporary_like(before[-1].results[0])
        made.tiles = _tiles(op, form, context)
        launches.append(part_launch(before, outer, made, context))
    if form.quantize is None:
        return made
    grouped = isinstance(form.product, GroupedGemmOp)
    layout = None
    if by_warpgroups(context, grouped=grouped):
        layout = fragments_of(op, tensor_type(op.operands[form.weight]))
    element = F32 if before else context.element(x)
    found, launch = rounded(op, form.quantize, made, element, by_row=grouped, warpgroups=layout)
    launches.append(launch)
    return found


def _tiles(op: Op, form: GemmForm, context: GridContext) -> RowTiles | None:
    """Where the row by row kernel in front of a product puts rows in bf16, so that bulk copies bring them: dense
    products of warpgroups, rows without columns to fill up, an arena that ends with eight rows."""
    type, weight = tensor_type(form.product.x), tensor_type(op.operands[form.weight])
    width, dense = type.shape[-1], isinstance(form.product, MatmulOp) and form.quantize is None
    many = context.options.hopper and not context.few and context.most % GROUP == 0
    if not (many and dense and type.element == BF16 and weight.layout is not None and isinstance(width, int)):
        return None
    tiles = RowTiles(width, BF16)
    return tiles if tiles.padded == width else None


def _dense(
    op: Op, product: MatmulOp, x: GridArgument | Rounded, weight: Value, output: Output, context: GridContext
) -> GridLaunch:
    """Rows `x`, in bf16, f32 or int8, with a stored weight."""
    type, rows = tensor_type(weight), rows_of(product.x.type)
    n, k = type.shape[-2:]
    assert isinstance(n, int) and isinstance(k, int)
    if isinstance(x, Rounded):
        return int8_launch(op, fragments_of(op, type), x, weight, output, rows, context)
    element = tensor_type(product.x).element
    if type.element == F32 and element == F32:
        return _wide(n, k, x, weight, output.y, rows, context)
    if element != BF16:
        raise refused(op, f"a product of {element} and {type.element} has no kernel on GPUs", "bf16 activations")
    if type.layout is None:
        return _row_major(op, (n, k), x, weight, output, rows, context)
    return _packed(fragments_of(op, type), x, weight, output, rows, context)


def _packed(
    layout: Fragments, x: GridArgument, weight: Value, output: Output, rows: Dim, context: GridContext
) -> GridLaunch:
    parts = weight_parts(layout, weight)
    arguments = [*parts, x, output.y, SizeArgument(rows)]
    writes, stem = (len(parts) + 1,), f"{layout.n}x{layout.k}_w{layout.bits}{'_gate' if output.gate else ''}"
    made = {"out": output.element, "gate_up": output.gate}
    if context.few:
        most = tile_rows(context)
        key, stem = ("decode", layout, most, output.element, output.gate), stem + ("" if most == ROWS else "_rows16")
        return GridLaunch(
            f"decode_{stem}", key, arguments, writes, str(layout.tiles),
            lambda name: decode_kernel(layout, name, rows=most, **made), True,
        )  # fmt: skip
    shape = many_rows(context.most, context)
    grid = f"ceil({size_text(rows)}, {shape.rows}) * {-(-layout.tiles // shape.tiles)}"
    key = ("gemm_packed", layout, shape, output.element, output.gate)
    if isinstance(shape, WgmmaShape):
        tiled = isinstance(x, Temporary) and x.tiles is not None
        return GridLaunch(
            f"wgmma_{stem}{'_tiled' * tiled}", (*key, tiled), arguments, writes, grid,
            lambda name: gemm_wgmma_kernel(layout, name, shape, tiled=tiled, **made), True,
        )  # fmt: skip
    return GridLaunch(
        f"gemm_{stem}", key, arguments, writes, grid, lambda name: gemm_packed_kernel(layout, name, shape, **made), True
    )


def many_rows(rows: int, context: GridContext) -> PackedShape:
    """A block's tile of a product of up to `rows` rows in bf16: products of warpgroups where there are some."""
    return (WgmmaShape if context.options.hopper else PackedShape).of(rows)


def expert_shape(op: Op, context: GridContext, pairs_of_token: int, experts: int) -> PackedShape:
    """Tiles for the rows that an expert has of a full chunk of a prompt."""
    return PackedShape.of(max(1, context.most * pairs_of_token // experts))


def _of_experts(op: Op, form: GemmForm, x: GridArgument | Rounded, output: Output, context: GridContext) -> GridLaunch:
    """A grouped product: rows of one expert are a tile, whose number the dispatch has written."""
    product = form.product
    assert isinstance(product, GroupedGemmOp) and form.order is not None
    weight, order = op.operands[form.weight], op.operands[form.order]
    type = tensor_type(weight)
    if type.layout is None or not (isinstance(x, Rounded) or tensor_type(product.x).element == BF16):
        raise refused(
            op,
            f"experts of {type} have no product on GPUs",
            "activations in bf16 or 8 bits and matrices of a multiple of 8 columns",
        )
    if product.first:
        raise refused(op, "stand-ins of experts have no kernel on GPUs", "a build without stand-ins")
    if order not in context.groups:
        raise refused(op, "experts in an order that no 'moe.dispatch' of this step gives")
    group = context.groups[order]
    layout = fragments_of(op, type)
    stride = context.strides.get(weight, layout.nbytes)
    if isinstance(x, Rounded):
        check_alike(op, layout, x)
    scales = x.of if isinstance(x, Rounded) else None
    experts = Experts(layout, stride, product.gather, output.gate, output.element, scales)
    rows_of_x: list[GridArgument] = [x.codes] if isinstance(x, Rounded) else [x]
    scales_of_x: list[GridArgument] = [x.scales] if isinstance(x, Rounded) else []
    before = [*weight_parts(layout, weight), *rows_of_x, order, group.tiles, *scales_of_x]
    arguments = [*before, output.y, Count(group.most)]
    bits = f"w{layout.bits}" + (f"a8{'_fp8' * layout.fp8}" if scales else "")
    stem = f"{layout.n}x{layout.k}_{bits}{'_gate' if output.gate else ''}"
    writes = (len(before),)
    if context.few:
        most = group.rows
        return GridLaunch(
            f"experts_{stem}_rows{most}", ("experts", experts, most), arguments, writes,
            f"{group.most} * {layout.tiles}", lambda name: grouped_decode_kernel(experts, name, rows=most), True,
        )  # fmt: skip
    shape = x.shape(group.rows) if isinstance(x, Rounded) else many_rows(group.rows, context)
    assert shape.rows == group.rows
    return GridLaunch(
        f"experts_{'wgmma_' * isinstance(shape, WgmmaShape)}{stem}", ("experts", experts, shape), arguments, writes,
        f"{group.most} * {-(-layout.tiles // shape.tiles)}",
        lambda name: grouped_gemm_kernel(experts, name, shape), True,
    )  # fmt: skip


def _row_major(
    op: Op, size: tuple[int, int], x: GridArgument, weight: Value, output: Output, rows: Dim, context: GridContext
) -> GridLaunch:
    (n, k), shape = size, FEW if context.few else GemmShape()
    try:
        check_gemm(n, k, shape, False)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    grid = f"ceil({size_text(rows)}, {shape.rows}) * {-(-n // shape.columns)}"
    return GridLaunch(
        f"gemm_{n}x{k}", ("gemm", n, k, shape, output.element),
        [x, WeightPart(weight, 0, BF16), output.y, SizeArgument(rows)], (2,), grid,
        lambda name: gemm_kernel(n, k, name, shape, output.element), True,
    )  # fmt: skip


def _wide(
    n: int, k: int, x: GridArgument, weight: Value, y: GridArgument, rows: Dim, context: GridContext
) -> GridLaunch:
    taken = 1 if context.few else WIDE_ROWS
    grid = f"ceil({size_text(rows)}, {taken}) * {-(-n // WARPS)}"
    return GridLaunch(
        f"wide_{n}x{k}", ("wide", n, k, taken), [x, WeightPart(weight, 0, F32), y, SizeArgument(rows)], (2,), grid,
        lambda name: wide_kernel(n, k, name, rows=taken), True,
    )  # fmt: skip
