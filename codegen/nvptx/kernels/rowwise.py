"""Kernels that work row by row on a GPU: the regions of `codegen.kernels.rowwise`, a block for each row.

Takes an elementwise op or a fused region of kind "elementwise" (adds, products, SiLU, SwiGLU, clips, slices, casts, RMS
norms, embedding and gathering of rows, adding up the answers of experts). A thread takes up to 8 neighbouring columns
at a time, 16 bytes of bf16; a norm adds up its row over the block first. Where the row of a pair lies in grouped order
is known from dispatching (`moe_route`), and comes as one more argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

from codegen.kernels.math import LOG2_E
from codegen.kernels.rowwise import RowEvaluator, element_of, width_of
from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.row_tiles import RowTiles
from codegen.tile_builder import Buffer, Expr
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, I32
from ir.ops.fused import FusedOp
from ir.ops.moe import CombineOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import SiluOp, SliceOp, SwigluOp
from ir.types import TensorType

LANES = 8
MAX_THREADS = 256


@dataclass(frozen=True)
class RowKernel:
    """A kernel launched with a block for each row. Its arguments are `inputs`, then a buffer for each result, then, for
    moe.combine (`combines`), the inverse i32 [pairs] of its order, then, where results lie as tiles, the rows."""

    kernel: GridKernel
    inputs: tuple[Value, ...]
    combines: bool = False


class GridRowEvaluator(RowEvaluator):
    """Values of a region at (row, columns) as one thread of a block computes them."""

    def __init__(self, k: GridBuilder, buffers: dict[Value, Buffer], lanes: int) -> None:
        super().__init__(k, buffers)
        self.grid = k
        self.lanes = lanes
        self.work: Buffer | None = None

    def value(self, value: Value, column: Expr, lanes: int, mask: Expr | None) -> Expr:
        op = None if value in self.buffers else value.defining_op()
        if not isinstance(op, SiluOp | SwigluOp):
            return super().value(value, column, lanes, mask)
        x = self.value(op.operands[0], column, lanes, mask).cast(F32)
        y = x / (self.grid.exp2(x * -LOG2_E) + 1.0)
        if isinstance(op, SwigluOp):
            y = y * self.value(op.operands[0], column + width_of(value), lanes, mask).cast(F32)
        return y.cast(element_of(value))

    def columns(self, width: int) -> tuple[Expr, int, int]:
        """(first column of this thread, end, step) of its share of a row."""
        return self.grid.thread_id() * self.lanes, width, self.grid.threads * self.lanes

    def prepare_row(self, row: Expr, norms: list[RmsNormOp]) -> None:
        """Moves on to another row: every thread of the block has the scales of its norms."""
        self.row = row
        for norm in norms:
            width, k = width_of(norm.x), self.grid
            with k.loop(*self.columns(width), [k.f32(0.0)]) as loop:
                x = self.value(norm.x, loop.i, self.lanes, None).cast(F32)
                squares = x * x
                loop.carry(loop.carried[0] + (squares.reduce("add") if self.lanes > 1 else squares))
            self.work = self.work or k.shared(k.threads // WARP, F32)
            total = k.block_sum(loop.results[0], self.work)
            self.scales[norm.y] = 1.0 / k.sqrt(total * (1.0 / width) + norm.eps)


def row_kernel(op: Op, name: str, tiles: Sequence[RowTiles | None] = ()) -> RowKernel:
    """The kernel of an op or a fused region. `tiles`: for each result where its rows lie, None where one behind the
    other. Raises DiagnosticError for what has none."""
    body, inputs, results = _region(op)
    for inner in body:
        _refuse(inner)
    norms = [inner for inner in body if isinstance(inner, RmsNormOp)]
    widths = [width_of(v) for v in (*inputs, *results) if len(_shape(v)) > 1]
    lanes = gcd(LANES, *widths, *(inner.start for inner in body if isinstance(inner, SliceOp)))
    most = max(map(width_of, results))
    threads = min(MAX_THREADS, -(-most // (lanes * WARP)) * WARP)
    k = GridBuilder(name, threads)
    buffers = {v: k.buffer(v.name_hint or "x", element_of(v)) for v in inputs}
    outputs = [k.buffer("out", element_of(v)) for v in results]
    evaluator = GridRowEvaluator(k, buffers, lanes)
    combines = any(isinstance(inner, CombineOp) for inner in body)
    if combines:
        evaluator.inverse = k.buffer("inverse", I32)
    m = k.size("rows") if any(tiles) else k.index_value(0)
    evaluator.prepare_row(k.block_id(), norms)
    for width in dict.fromkeys(map(width_of, results)):
        with k.loop(*evaluator.columns(width)) as loop:
            for value, out, places in zip(results, outputs, tiles or [None] * len(results), strict=True):
                if width_of(value) != width:
                    continue
                numbers = evaluator.value(value, loop.i, lanes, None)
                if places is None:
                    out.store(evaluator.row * width + loop.i, numbers)
                else:
                    places.store(k, out, evaluator.row, loop.i, numbers, m)
    return RowKernel(k.grid_kernel(), tuple(inputs), combines)


def _shape(value: Value) -> tuple[object, ...]:
    assert isinstance(value.type, TensorType)
    return value.type.shape


def _region(op: Op) -> tuple[list[Op], list[Value], list[Value]]:
    """(ops, inputs and results as the ops see them)."""
    if isinstance(op, FusedOp):
        block = op.body.block
        end = block.terminator
        assert end is not None
        return list(block.ops[:-1]), list(block.arguments), list(end.operands)
    return [op], list(op.operands), list(op.results)


def _refuse(op: Op) -> None:
    types = [v.type for v in op.operands if isinstance(v.type, TensorType)]
    message = ""
    if isinstance(op, SliceOp) and (op.axis != 1 or types[0].rank != 2):
        message = f"'tensor.slice' of {types[0]} along axis {op.axis} has no kernel; only columns of a matrix are cut"
    elif isinstance(op, RmsNormOp | SwigluOp) and types[0].rank != 2:
        message = f"'{op.name}' of {types[0]} has no kernel of its own; only rows of a matrix are taken"
    if message:
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
