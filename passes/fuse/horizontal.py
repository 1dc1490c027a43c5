"""What the horizontal fusions share: several products of one activation become one product with stacked weights."""

from __future__ import annotations

from collections.abc import Sequence

from ir.core import Op, Value
from ir.ops.quant import DequantizeOp
from ir.ops.tensor import ConcatOp
from ir.rewriter import PatternRewriter, fused_location
from passes.analysis.constants import is_constant_expression
from passes.analysis.value_types import tensor_type


def stackable_weights(weights: Sequence[Value], axis: int) -> str:
    """Why these weights cannot be stacked along `axis`; empty when they can."""
    types = [tensor_type(w) for w in weights]
    for weight in weights:
        if not is_constant_expression(weight):
            return "a weight is computed from step inputs"
        if tensor_type(weight).layout is not None:
            return "a weight has a layout already"
    if len({t.element for t in types}) > 1:
        return "the weights have the elements " + ", ".join(str(t.element) for t in types)
    stored = [_stored_element(w) for w in weights]
    if len(set(stored)) > 1:
        return "the weights are stored in the formats " + ", ".join(stored)
    if len({t.shape[:axis] + t.shape[axis + 1 :] for t in types}) > 1:
        return "the weights have the shapes " + ", ".join(str(t) for t in types)
    return ""


def _stored_element(weight: Value) -> str:
    """The low-bit format that a weight is dequantized from; "floats" for other weights."""
    op = weight.defining_op()
    return str(tensor_type(op.w).element) if isinstance(op, DequantizeOp) else "floats"


def hoist(value: Value, anchor: Op, rewriter: PatternRewriter) -> None:
    """Moves the ops of a constant expression in front of `anchor` where they stand behind it in its block."""
    op = value.defining_op()
    if op is None or op.parent is not anchor.parent or op.parent is None:
        return
    ops = op.parent.ops
    if ops.index(op) < ops.index(anchor):
        return
    for operand in op.operands:
        hoist(operand, anchor, rewriter)
    rewriter.move_before(op, anchor)


def stack(values: Sequence[Value], axis: int, anchor: Op, rewriter: PatternRewriter) -> Value:
    """The constant expressions `values` one after another along `axis`, made in front of `anchor`."""
    for value in values:
        hoist(value, anchor, rewriter)
    makers = [op for op in (v.defining_op() for v in values) if op is not None]
    concat = ConcatOp(*values, axis=axis, location=fused_location(*makers))
    return rewriter.insert_before(anchor, concat).results[0]
