"""Which emitter takes a fused region: by its kind."""

from __future__ import annotations

import codegen.nvptx.emitters.experts  # noqa: F401 - registers emitters
from codegen.nvptx.emitters.attention import emit_attention, emit_rope_append
from codegen.nvptx.emitters.products import emit_product
from codegen.nvptx.emitters.rows import emit_rows
from codegen.nvptx.launches import GridContext, GridLaunch, grid_emitter
from ir.core import Op
from ir.ops.fused import FusedOp

KINDS = {"gemm": emit_product, "elementwise": emit_rows, "rope_append": emit_rope_append, "attention": emit_attention}


@grid_emitter(FusedOp)
def emit_fused(op: Op, context: GridContext) -> list[GridLaunch]:
    """Hands the region to the emitter of its kind."""
    assert isinstance(op, FusedOp)
    return KINDS[op.kind](op, context)
