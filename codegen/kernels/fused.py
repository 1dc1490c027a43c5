"""Which kernel family takes a fused region: by its kind."""

from __future__ import annotations

import codegen.kernels.columns  # noqa: F401 - registers emitters
from codegen.kernels.attention import emit_attention
from codegen.kernels.call import EmitContext, KernelSpec, emitter
from codegen.kernels.gemm import emit_gemm
from codegen.kernels.rope import emit_rope_append
from codegen.kernels.rowwise import emit_rowwise
from ir.core import Op
from ir.ops.fused import FusedOp

KINDS = {"gemm": emit_gemm, "elementwise": emit_rowwise, "rope_append": emit_rope_append, "attention": emit_attention}


@emitter(FusedOp)
def emit_fused(op: Op, context: EmitContext) -> KernelSpec:
    """Hands the region to the family of its kind."""
    assert isinstance(op, FusedOp)
    return KINDS[op.kind](op, context)
