"""fuse-norm-gemm: what is done to the activations of a GEMM, row by row, goes into the GEMM that reads them.

    %n = norm.rms %x, %g               %y = tensor.fused %x, %g, %w {kind = "gemm"} ({
    %c = tensor.cast %n {to = bf16}      %n = norm.rms, %c = tensor.cast, %y = gemm.matmul
    %y = gemm.matmul %c, %w    -->       tensor.yield %y })

    %q = quant.quantize %x             %y = tensor.fused %x, %w, %order, %offsets {kind = "gemm"} ({
    %y = moe.grouped_gemm %q, %w, ..     %q = quant.quantize, %y = moe.grouped_gemm
                               -->       tensor.yield %y })

A prologue is [norm.rms] [quant.rotate] [tensor.cast | quant.quantize], and not a cast alone, which belongs to the op
that makes the value. A quantize or rotate with several readers is done once in each of them, so that low-bit
activations never leave a kernel. A norm goes in when this product alone reads it; the norm of a grouped GEMM stays
outside: its rows are gathered, each would be computed once per expert of a token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.quant import QuantizeOp, RotateOp
from ir.ops.tensor import CastOp
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily
from passes.analysis.value_types import tensor_type
from passes.fuse.outline import outline
from passes.pass_base import FunctionPass, PassContext, register_pass

ProloguePart = CastOp | QuantizeOp | RotateOp | RmsNormOp


class FoldPrologueIntoGemm(RewritePattern[Op]):
    """product([cast | quantize]([rotate](norm(x, gain))), w) --> fused "gemm" of all of them"""

    def match_and_rewrite(self, op: Op, rewriter: PatternRewriter) -> bool:
        if not isinstance(op, (MatmulOp, GroupedGemmOp)) or _is_in_fused(op):
            return False
        narrow, rotate, norm = _prologue(op)
        reason = self._norm_stays_out(op, [maker for maker in (norm, rotate, narrow) if maker is not None])
        if norm is not None and reason:
            rewriter.no_match(op, reason)
            norm = None
        if norm is None and rotate is None and not isinstance(narrow, QuantizeOp):
            return False
        body: list[Op] = [op]
        for maker in (narrow, rotate, norm):
            if maker is None:
                continue
            if maker.parent is not op.parent:
                return rewriter.no_match(op, f"{maker.name} and product are in different blocks")
            if len(maker.results[0].uses) > 1:
                maker = _copy_for(body[0], maker, rewriter)
            body.insert(0, maker)
        outline(rewriter, "gemm", body, op.results, anchor=op)
        return True

    def _norm_stays_out(self, op: Op, prologue: list[Op]) -> str:
        """Why the norm that begins a prologue cannot move into the product; empty when it can."""
        if isinstance(op, GroupedGemmOp):
            return "rows are gathered: the norm would be computed for every expert of a token"
        for before in prologue:
            if tensor_type(before.results[0]).rank != 2:
                return f"the norm is over rows of {before.results[0].type}, not of a matrix"
            if len(before.results[0].uses) > 1:
                return f"{before.name} has {len(before.results[0].uses)} readers"
            if before.parent is not op.parent:
                return f"{before.name} and product are in different blocks"
        return ""


def _prologue(op: Op) -> tuple[CastOp | QuantizeOp | None, RotateOp | None, RmsNormOp | None]:
    """(cast or quantize, rotate, norm) in front of a product."""
    maker = op.operands[0].defining_op()
    narrow = maker if isinstance(maker, (CastOp, QuantizeOp)) else None
    maker = narrow.operands[0].defining_op() if narrow is not None else maker
    rotate = maker if isinstance(maker, RotateOp) else None
    maker = rotate.operands[0].defining_op() if rotate is not None else maker
    return narrow, rotate, maker if isinstance(maker, RmsNormOp) else None


def _copy_for(reader: Op, maker: ProloguePart, rewriter: PatternRewriter) -> ProloguePart:
    """A copy of `maker` that `reader` alone reads, in front of it."""
    copy = type(maker)(*maker.operands, location=maker.location, **maker.attributes)
    rewriter.insert_before(reader, copy)
    rewriter.set_operand(reader, 0, copy.results[0])
    return copy


def _is_in_fused(op: Op) -> bool:
    return op.parent_op is not None and op.parent_op.name == "tensor.fused"


@register_pass
@dataclass(frozen=True)
class FuseNormGemmPass(FunctionPass):
    """Norms, rotations, casts and quantization of activations into the prologues of the GEMMs that read them."""

    name: ClassVar[str] = "fuse-norm-gemm"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FoldPrologueIntoGemm()], ctx.rewriter())
