"""canonicalize: of the many forms that mean the same keeps one, so that later patterns need to know one only.

    cast(cast(x))          one cast, when the inner one lost nothing       slice(concat(a, b))   a, or a slice of it
    cast(x) to its own     x                                               slice(slice(x))       one slice
    reshape(reshape(x))    one reshape                                     concat(concat(a), b)  concat(a, b)
    add/mul                chain value first: broadcast operand second, weights second, silu first
    cast over weights      casts stand directly above the constants: concat(cast(a), cast(b)), never cast(concat(a, b))
    dequantize             comes last: dequantize(concat(a, b)), never concat(dequantize(a), dequantize(b)), no cast

Dead pure ops go. The result is a fixed point: running it twice changes nothing. Nothing is rounded differently.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op
from ir.rewriter import apply_greedily
from passes.pass_base import FunctionPass, PassContext, register_pass
from passes.simplify.cast_patterns import FoldCastOfCast, FoldCastOfDequantize, RemoveIdentityCast, SinkCastToConstants
from passes.simplify.movement_patterns import (
    FlattenConcat,
    FoldReshapeOfReshape,
    FoldSliceOfConcat,
    FoldSliceOfSlice,
    RemoveIdentityMovement,
    SinkMovementBelowDequantize,
)
from passes.simplify.operand_order import OrderCommutativeOperands

PATTERNS = (
    RemoveIdentityCast(),
    FoldCastOfCast(),
    FoldCastOfDequantize(),
    SinkCastToConstants(),
    RemoveIdentityMovement(),
    FoldReshapeOfReshape(),
    FoldSliceOfConcat(),
    FoldSliceOfSlice(),
    FlattenConcat(),
    SinkMovementBelowDequantize(),
    OrderCommutativeOperands(),
)


@register_pass
@dataclass(frozen=True)
class CanonicalizePass(FunctionPass):
    """Normal forms of casts, movements of data, commutative operands and constant expressions; no dead pure ops."""

    name: ClassVar[str] = "canonicalize"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, PATTERNS, ctx.rewriter())
