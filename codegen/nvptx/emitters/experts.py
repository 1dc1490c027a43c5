"""Launches of routing: which experts a token meets, and the order and the tiles that products of experts go by."""

from __future__ import annotations

from codegen.kernels.call import SizeArgument, rows_of
from codegen.kernels.rowwise import element_of, width_of
from codegen.nvptx.emitters.products import expert_shape, tile_rows
from codegen.nvptx.kernels.moe_route import TILE_WORDS, dispatch_kernel, route_kernel
from codegen.nvptx.launches import Count, GridContext, GridLaunch, Group, Temporary, grid_emitter, refused, size_text
from ir.formats import I32
from ir.ops.moe import DispatchOp, RouteOp
from ir.types import TensorType


@grid_emitter(RouteOp)
def emit_route(op: RouteOp, context: GridContext) -> list[GridLaunch]:
    """A block for each token."""
    experts, element = width_of(op.logits), element_of(op.logits)
    key = ("route", experts, op.top_k, op.normalize, element)
    return [
        GridLaunch(
            f"route_top{op.top_k}", key, [op.logits, op.ids, op.weights], (1, 2), size_text(rows_of(op.logits.type)),
            lambda name: route_kernel(experts, op.top_k, op.normalize, element, name), True,
        )
    ]  # fmt: skip


@grid_emitter(DispatchOp)
def emit_dispatch(op: DispatchOp, context: GridContext) -> list[GridLaunch]:
    """One block; writes the tiles of rows too, as the program's products want them."""
    if op.places:
        raise refused(
            op, "experts of one layer in several formats have no kernel on GPUs", "a recipe with one format for them"
        )
    experts, pairs = op.num_experts, rows_of(op.order.type)
    shape = expert_shape(op, context, width_of(op.ids), experts)
    rows = tile_rows(context) if context.few else shape.rows
    text = size_text(pairs)
    most = f"min({text}, ceil({text} + {experts * (rows - 1)}, {rows}))"
    inverse = Temporary(TensorType((pairs,), I32))
    tiles = Temporary(TensorType((pairs, TILE_WORDS), I32))
    context.groups[op.order] = Group(inverse, tiles, rows, most)
    arguments = [op.ids, op.order, op.offsets, inverse, tiles, SizeArgument(pairs), Count(most)]
    return [
        GridLaunch(
            f"dispatch_{experts}", ("dispatch", experts, rows), arguments, (1, 2, 3, 4), "1",
            lambda name: dispatch_kernel(experts, rows, name), True,
        )
    ]  # fmt: skip
