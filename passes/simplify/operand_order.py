"""Pattern of canonicalize about commutative ops: which of two operands comes first."""

from __future__ import annotations

from ir.core import Op, Value
from ir.ops.tensor import SiluOp
from ir.rewriter import PatternRewriter, RewritePattern
from ir.traits import Commutative, has_trait
from ir.types import TensorType
from passes.analysis.constants import is_constant_expression


def _order(value: Value) -> tuple[int, bool, bool]:
    """Smaller comes first: more dimensions (a broadcast bias is second), then computed before weights, then silu."""
    rank = value.type.rank if isinstance(value.type, TensorType) else 0
    return -rank, is_constant_expression(value), not isinstance(value.defining_op(), SiluOp)


class OrderCommutativeOperands(RewritePattern[Op]):
    """add(bias, x) --> add(x, bias);  mul(up, silu(gate)) --> mul(silu(gate), up)"""

    def match_and_rewrite(self, op: Op, rewriter: PatternRewriter) -> bool:
        if not has_trait(op, Commutative) or len(op.operands) < 2:
            return False
        first, second = op.operands[:2]
        if _order(second) >= _order(first):
            return False
        rewriter.set_operand(op, 0, second)
        rewriter.set_operand(op, 1, first)
        return True
