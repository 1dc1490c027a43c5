"""Kernels of the columns that stay floats beside low-bit weights: some columns of a matrix, and a matrix without them.

The columns are known when the artifact is built, but as data: the kernel reads their numbers.
"""

from __future__ import annotations

from codegen.kernels.call import EmitContext, KernelSpec, SizeArgument, emitter, rows_of, structure_key
from codegen.kernels.rowwise import element_of, for_columns, width_of
from codegen.tile_builder import Expr, KernelBuilder
from ir.formats import I32
from ir.ops.builtin import FuncOp
from ir.ops.quant_columns import ClearColumnsOp, SelectColumnsOp


@emitter(SelectColumnsOp, ClearColumnsOp)
def emit_columns(op: SelectColumnsOp | ClearColumnsOp, context: EmitContext) -> KernelSpec:
    """One of the two on a matrix of activations."""
    clears = isinstance(op, ClearColumnsOp)
    stem = "clear_columns" if clears else "select_columns"
    arguments = [op.x, op.columns, op.y, SizeArgument(rows_of(op.y.type))]

    def build(name: str) -> FuncOp:
        k = KernelBuilder(name)
        x, columns = k.buffer("x", element_of(op.x)), k.buffer("columns", I32)
        out = k.buffer("out", element_of(op.y))
        rows = k.size("rows")
        width, count = width_of(op.x), op.columns.type.shape[0]
        first, last = k.thread_share(rows)
        with k.loop(first, last) as row:
            source = row.i * width
            if clears:

                def copy(column: Expr, lanes: int, mask: Expr | None) -> None:
                    out.store(source + column, x.load(source + column, lanes, mask), mask)

                for_columns(k, 0, width, copy)
            with k.loop(0, count) as item:
                at = source + columns.load(item.i).to_index()
                if clears:
                    out.store(at, k.f32(0.0).cast(element_of(op.y)))
                else:
                    out.store(row.i * count + item.i, x.load(at))
        return k.finish()

    return KernelSpec(stem, (structure_key(op), "columns"), arguments, (2,), build)
