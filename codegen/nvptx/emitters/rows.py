"""Launches of row by row kernels: elementwise ops, norms, embedding, gathering, combining, parts of other regions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from codegen.kernels.call import SizeArgument, rows_of, structure_key
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
    if isinstance(op, FusedOp):
        block = op.body.block
        end = block.terminator
        assert end is not None
        outer: dict[Value, GridArgument] = dict(zip(block.arguments, op.operands, strict=True))
        part = RowPart.of(block.ops[:-1], outer, list(zip(end.operands, op.results, strict=True)))
    else:
        part = RowPart.of([op], {v: v for v in op.operands}, [(op.results[0], op.results[0])])
    return [row_launch(part, context, costs=True)]


@dataclass(frozen=True)
class RowPart:
    """Ops of a row by row kernel: where the values lie that they read, and the ones that they give."""

    ops: tuple[Op, ...]
    inputs: tuple[tuple[Value, GridArgument], ...]
    results: tuple[tuple[Value, GridArgument], ...]

    @classmethod
    def of(
        cls, ops: Sequence[Op], outer: Mapping[Value, GridArgument], results: Sequence[tuple[Value, GridArgument]]
    ) -> RowPart:
        """The part of these ops; `outer` has at least what they read."""
        inside = {value for op in ops for value in op.results}
        free = dict.fromkeys(v for op in ops for v in op.operands if v not in inside)
        return cls(tuple(ops), tuple((v, outer[v]) for v in free), tuple(results))

    @property
    def rows(self) -> str:
        """How many there are, as a size."""
        return size_text(rows_of(self.results[0][0].type))

    def region(self) -> FusedOp:
        """A copy of the ops as a region that belongs to no function."""
        types = [v.type for v, _ in self.inputs]
        block, stand_ins = Block(types), Block(types)
        copies: dict[Value, Value] = dict(zip((v for v, _ in self.inputs), block.arguments, strict=True))
        b = Builder.at_end(block)
        for op in self.ops:
            b.insert(clone(op, copies))
        b.insert(YieldOp(*(copies[v] for v, _ in self.results)))
        where = self.ops[-1].location
        return FusedOp(*stand_ins.arguments, kind="elementwise", regions=[Region(block)], location=where)


def row_launch(part: RowPart, context: GridContext, costs: bool = False) -> GridLaunch:
    """The launch of a part as one kernel."""
    arguments: list[GridArgument] = [where for _, where in (*part.inputs, *part.results)]
    writes = tuple(range(len(part.inputs), len(arguments)))
    for combine in (op for op in part.ops if isinstance(op, CombineOp)):
        order = dict(part.inputs).get(combine.order)
        if not isinstance(order, Value) or order not in context.groups:
            raise refused(combine, "experts are combined in an order that no 'moe.dispatch' of this step gives")
        arguments.append(context.groups[order].inverse)
    tiles = tuple(where.tiles if isinstance(where, Temporary) else None for _, where in part.results)
    if any(tiles):
        arguments.append(SizeArgument(rows_of(part.results[0][0].type)))
    region = part.region()
    stem = "_".join(op.name.split(".")[1] for op in part.ops)[:48]
    return GridLaunch(
        stem, (structure_key(region), "rows", tiles), arguments, writes, part.rows,
        lambda name: row_kernel(region, name, tiles).kernel, costs, part,
    )  # fmt: skip


def merged(first: GridLaunch, second: GridLaunch, context: GridContext) -> GridLaunch | None:
    """One launch for two that follow each other, where the second goes on with rows of the first: a sum and the norm
    behind it. What the first gives is stored too. None where they are not such."""
    a, b = first.rows_part, second.rows_part
    if a is None or b is None or a.rows != b.rows:
        return None
    made = {where: value for value, where in a.results if isinstance(where, Value)}
    shared = {v: made[where] for v, where in b.inputs if isinstance(where, Value) and where in made}
    by_row = not any(isinstance(op, EmbedOp | GatherRowsOp | CombineOp) for op in b.ops)
    if not shared or not by_row or any(v.type != w.type for v, w in shared.items()):
        return None
    copies: dict[Value, Value] = dict(shared)
    ops = [*a.ops, *(clone(op, copies) for op in b.ops)]
    outer = {v: where for v, where in (*a.inputs, *b.inputs) if v not in shared}
    results = [*a.results, *((copies[v], where) for v, where in b.results)]
    return row_launch(RowPart.of(ops, outer, results), context, first.costs or second.costs)


def part_launch(
    ops: Sequence[Op], outer: Mapping[Value, GridArgument], result: GridArgument, context: GridContext
) -> GridLaunch:
    """The launch of some ops of a region, a chain, as one kernel: `outer` is where the values lie that they read."""
    return row_launch(RowPart.of(ops, outer, [(ops[-1].results[0], result)]), context)


def temporary_like(value: Value) -> Temporary:
    """Memory for a value inside of a region."""
    assert isinstance(value.type, TensorType)
    return Temporary(value.type)
