"""Patterns of canonicalize about `tensor.slice`, `tensor.concat` and `tensor.reshape`: no element changes."""

from __future__ import annotations

from typing import ClassVar

from ir.core import Op, Value
from ir.op_def import InferenceError
from ir.ops.quant import DequantizeOp
from ir.ops.tensor import ConcatOp, ReshapeOp, SliceOp
from ir.rewriter import PatternRewriter, RewritePattern
from passes.analysis.value_types import tensor_type


class RemoveIdentityMovement(RewritePattern[Op]):
    """A slice of everything, a reshape to the same shape, a concat of one --> the operand"""

    def match_and_rewrite(self, op: Op, rewriter: PatternRewriter) -> bool:
        if not isinstance(op, (SliceOp, ReshapeOp, ConcatOp)) or len(op.operands) != 1:
            return False
        if op.operands[0].type != op.results[0].type:
            return False
        return rewriter.replace_with_values(op, op.operands)


class FoldReshapeOfReshape(RewritePattern[ReshapeOp]):
    """reshape(reshape(x)) --> reshape(x)"""

    op_type: ClassVar[type[Op]] = ReshapeOp

    def match_and_rewrite(self, op: ReshapeOp, rewriter: PatternRewriter) -> bool:
        inner = op.x.defining_op()
        if not isinstance(inner, ReshapeOp):
            return False
        return rewriter.replace(op, ReshapeOp(inner.x, shape=op.shape))


class FoldSliceOfSlice(RewritePattern[SliceOp]):
    """slice(slice(x){start=a}){start=b} --> slice(x){start=a+b}, along one axis"""

    op_type: ClassVar[type[Op]] = SliceOp

    def match_and_rewrite(self, op: SliceOp, rewriter: PatternRewriter) -> bool:
        inner = op.x.defining_op()
        if not isinstance(inner, SliceOp) or inner.axis != op.axis:
            return False
        return rewriter.replace(op, SliceOp(inner.x, axis=op.axis, start=inner.start + op.start, size=op.size))


class FoldSliceOfConcat(RewritePattern[SliceOp]):
    """slice(concat(a, b, c)) --> a slice of the one operand that holds it, or a concat of the operands it is made of"""

    op_type: ClassVar[type[Op]] = SliceOp

    def match_and_rewrite(self, op: SliceOp, rewriter: PatternRewriter) -> bool:
        concat = op.x.defining_op()
        if not isinstance(concat, ConcatOp) or concat.axis != op.axis:
            return False
        end = op.start + op.size
        met: list[tuple[Value, int, int]] = []  # operands that the slice touches, where each begins and ends
        at = 0
        for value in concat.operands:
            size = tensor_type(value).shape[op.axis]
            if at < end and at + size > op.start:
                met.append((value, at, at + size))
            at += size
        if len(met) == 1:
            value, begin, _ = met[0]
            return rewriter.replace(op, SliceOp(value, axis=op.axis, start=op.start - begin, size=op.size))
        if (met[0][1], met[-1][2]) != (op.start, end):
            return rewriter.no_match(op, f"elements {op.start} .. {end - 1} cut through an operand of the concat")
        return rewriter.replace(op, ConcatOp(*(value for value, _, _ in met), axis=op.axis))


class FlattenConcat(RewritePattern[ConcatOp]):
    """concat(concat(a, b), c) --> concat(a, b, c), along one axis"""

    op_type: ClassVar[type[Op]] = ConcatOp

    def match_and_rewrite(self, op: ConcatOp, rewriter: PatternRewriter) -> bool:
        values: list[Value] = []
        for value in op.operands:
            inner = value.defining_op()
            nested = isinstance(inner, ConcatOp) and inner.axis == op.axis
            values.extend(inner.operands if nested and inner is not None else [value])
        if len(values) == len(op.operands):
            return False
        return rewriter.replace(op, ConcatOp(*values, axis=op.axis))


class SinkMovementBelowDequantize(RewritePattern[Op]):
    """concat(dequantize(a), dequantize(b)) --> dequantize(concat(a, b)), and the same for slice and reshape

    Of one low-bit format, and only where whole rows (and what shares a scale) are moved: a weight stays one tensor as
    the checkpoint stores it.
    """

    def match_and_rewrite(self, op: Op, rewriter: PatternRewriter) -> bool:
        if not isinstance(op, (ConcatOp, SliceOp, ReshapeOp)):
            return False
        makers = [v.defining_op() for v in op.operands]
        sources = [m for m in makers if isinstance(m, DequantizeOp)]
        if not sources or len(sources) < len(makers) or len({m.to for m in sources}) > 1:
            return False
        weights = [m.w for m in sources]
        try:
            (moved,) = type(op).inferred_types([w.type for w in weights], op.attributes)
        except InferenceError as error:
            return rewriter.no_match(op, str(error))
        inner = type(op)(*weights, result_types=[moved], location=op.location, **op.attributes)
        rewriter.insert_before(op, inner)
        return rewriter.replace(op, DequantizeOp(inner.results[0], to=sources[0].to, location=sources[0].location))
