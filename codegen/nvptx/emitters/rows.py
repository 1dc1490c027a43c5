"""Launches of row by row kernels: elementwise ops, norms, embedding, gathering, combining, parts of other regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from codegen.kernels.call import rows_of, structure_key
from codegen.nvptx.kernels.rowwise import row_kernel
from codegen.nvptx.launches import GridArgument, GridContext, GridLaunch, Temporary, grid_emitter, refused, size_text
from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.moe import CombineOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, EmbedOp, GatherRowsOp, MulOp, SiluOp, SliceOp, SwigluOp
from ir.types import TensorType
from passes.clone import clone


@grid_emitter(AddOp, MulOp, SiluOp, ClipOp, SwigluOp, SliceOp, CastOp, RmsNormOp, EmbedOp, GatherRowsOp, CombineOp)
def emit_rows(op: Op, context: GridContext) -> list[GridLaunch]:
    """One such op, or a fused region of kind "elementwise": a block for each row."""
    return [row_launch(op, list(op.operands), list(op.results), context, costs=True)]


def row_launch(
    op: Op, inputs: Sequence[GridArgument], results: Sequence[GridArgument], context: GridContext, costs: bool = False
) -> GridLaunch:
    """The launch of an op or a region of which `inputs` are the operands, wherever they lie, and `results` likewise."""
    arguments: list[GridArgument] = [*inputs, *results]
    combine = next((inner for inner in _inner(op) if isinstance(inner, CombineOp)), None)
    writes = tuple(range(len(inputs), len(arguments)))
    if combine is not None:
        order = (
            op.operands[op.region.block.arguments.index(combine.order)] if isinstance(op, FusedOp) else combine.order
        )
        if order not in context.groups:
            raise refused(op, "experts are combined in an order that no 'moe.dispatch' of this step gives")
        arguments.append(context.groups[order].inverse)
    stem = "_".join(inner.name.split(".")[1] for inner in _inner(op))[:48]
    key = (structure_key(op), "rows")
    rows = size_text(rows_of(op.results[0].type))
    return GridLaunch(stem, key, arguments, writes, rows, lambda name: row_kernel(op, name).kernel, costs)


def _inner(op: Op) -> list[Op]:
    return list(op.body.block.ops[:-1]) if isinstance(op, FusedOp) else [op]


def part_launch(
    ops: Sequence[Op], outer: Mapping[Value, GridArgument], result: GridArgument, context: GridContext
) -> GridLaunch:
    """The launch of some ops of a region, a chain, as one kernel: `outer` is where the values lie that they read."""
    inside = {value for op in ops for value in op.results}
    free = list(dict.fromkeys(v for op in ops for v in op.operands if v not in inside))
    block = Block([v.type for v in free])
    copies: dict[Value, Value] = dict(zip(free, block.arguments, strict=True))
    b = Builder.at_end(block)
    for op in ops:
        b.insert(clone(op, copies))
    b.insert(YieldOp(copies[ops[-1].results[0]]))
    stand_ins = Block([v.type for v in free])  # no uses of the values themselves: the region belongs to no function
    region = FusedOp(*stand_ins.arguments, kind="elementwise", regions=[Region(block)], location=ops[-1].location)
    return row_launch(region, [outer[v] for v in free], [result], context)


def temporary_like(value: Value) -> Temporary:
    """Memory for a value inside of a region."""
    assert isinstance(value.type, TensorType)
    return Temporary(value.type)
