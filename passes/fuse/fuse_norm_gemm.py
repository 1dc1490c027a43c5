"""fuse-norm-gemm: an RMS norm, and the cast behind it, go into the GEMM that reads them.

    %n = norm.rms %x, %g               %y = tensor.fused %x, %g, %w {kind = "gemm"} ({
    %c = tensor.cast %n {to = bf16}      %n = norm.rms, %c = tensor.cast, %y = gemm.matmul
    %y = gemm.matmul %c, %w    -->       tensor.yield %y })

Applies to a norm over the last axis of [m, k] when norm and cast have this one reader, in one block. Not to grouped
GEMMs, whose rows are gathered: a token's norm would be computed once per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import CastOp
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily
from passes.fuse.outline import outline
from passes.pass_base import FunctionPass, PassContext, register_pass


class FoldNormIntoGemm(RewritePattern[Op]):
    """matmul(cast(norm(x, gain)), w) --> fused "gemm" of the three"""

    def match_and_rewrite(self, op: Op, rewriter: PatternRewriter) -> bool:
        if not isinstance(op, (MatmulOp, GroupedGemmOp)) or _is_in_fused(op):
            return False
        maker = op.operands[0].defining_op()
        cast = maker if isinstance(maker, CastOp) else None
        norm = cast.x.defining_op() if cast is not None else maker
        if not isinstance(norm, RmsNormOp):
            return False
        if isinstance(op, GroupedGemmOp):
            return rewriter.no_match(op, "rows are gathered: the norm would be computed for every expert of a token")
        if norm.y.type.rank != 2:
            return rewriter.no_match(op, f"the norm is over rows of {norm.y.type}, not of a matrix")
        for before in (norm, cast):
            if before is not None and len(before.results[0].uses) > 1:
                return rewriter.no_match(op, f"{before.name} has {len(before.results[0].uses)} readers")
        if norm.parent is not op.parent:
            return rewriter.no_match(op, "norm and product are in different blocks")
        body = [norm, cast, op] if cast is not None else [norm, op]
        outline(rewriter, "gemm", body, op.results, anchor=op)
        return True


def _is_in_fused(op: Op) -> bool:
    return op.parent_op is not None and op.parent_op.name == "tensor.fused"


@register_pass
@dataclass(frozen=True)
class FuseNormGemmPass(FunctionPass):
    """RMS norms into the prologues of the GEMMs that read them."""

    name: ClassVar[str] = "fuse-norm-gemm"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FoldNormIntoGemm()], ctx.rewriter())
