"""Patterns of canonicalize about `tensor.cast`."""

from __future__ import annotations

from typing import ClassVar

from ir.core import Op
from ir.formats import F32
from ir.ops.quant import DequantizeOp
from ir.ops.tensor import CastOp, ConcatOp, ReshapeOp, SliceOp
from ir.rewriter import PatternRewriter, RewritePattern
from passes.analysis.constants import is_constant_expression
from passes.analysis.exactness import is_exact


class RemoveIdentityCast(RewritePattern[CastOp]):
    """cast(x) to the element of x --> x"""

    op_type: ClassVar[type[Op]] = CastOp

    def match_and_rewrite(self, op: CastOp, rewriter: PatternRewriter) -> bool:
        if op.x.type.element != op.to:
            return False
        return rewriter.replace_with_values(op, [op.x])


class FoldCastOfCast(RewritePattern[CastOp]):
    """cast(cast(x) to b) to c --> cast(x) to c, when b holds every number of the format of x.

    Rounding once equals rounding an exact copy once. A chain that narrows and widens again is left alone: it rounds.
    """

    op_type: ClassVar[type[Op]] = CastOp

    def match_and_rewrite(self, op: CastOp, rewriter: PatternRewriter) -> bool:
        inner = op.x.defining_op()
        if not isinstance(inner, CastOp):
            return False
        source = inner.x.type.element
        if not is_exact(source, inner.to):
            return rewriter.no_match(op, f"the inner cast from {source} to {inner.to} rounds")
        return rewriter.replace(op, CastOp(inner.x, to=op.to))


class FoldCastOfDequantize(RewritePattern[CastOp]):
    """cast(dequantize(w)) --> dequantize(w) to that element: the numbers are f32, and rounded once either way"""

    op_type: ClassVar[type[Op]] = CastOp

    def match_and_rewrite(self, op: CastOp, rewriter: PatternRewriter) -> bool:
        inner = op.x.defining_op()
        if not isinstance(inner, DequantizeOp):
            return False
        if inner.to != F32:
            return rewriter.no_match(op, f"the dequantize to {inner.to} rounds")
        return rewriter.replace(op, DequantizeOp(inner.w, to=op.to))


class SinkCastToConstants(RewritePattern[CastOp]):
    """cast(concat(a, b)) --> concat(cast(a), cast(b)), and the same for slice and reshape, for constant expressions.

    With the casts at the bottom a weight is read once and narrowed at once, and equal casts of one weight are seen.
    """

    op_type: ClassVar[type[Op]] = CastOp

    def match_and_rewrite(self, op: CastOp, rewriter: PatternRewriter) -> bool:
        inner = op.x.defining_op()
        if not isinstance(inner, (ConcatOp, SliceOp, ReshapeOp)) or not is_constant_expression(op.x):
            return False
        casts = [rewriter.insert_before(op, CastOp(v, to=op.to, location=inner.location)) for v in inner.operands]
        moved = type(inner)(*(c.results[0] for c in casts), location=inner.location, **inner.attributes)
        return rewriter.replace(op, moved)
