"""einsum.*: every spec and op of the cascades, masked rows, folds whose last block is short."""

from __future__ import annotations

import numpy as np

from ir.builder import Builder
from ir.core import Block, Region
from ir.ops.einsum import BLOCK, MapOp, ReduceOp
from ir.ops.fused import YieldOp
from ir.types import SymbolicDim
from tests.samples.base import CTX, I1, Fault, fault, normal, sample, t

_MASK = np.array([True, False, True, True, False])
_ROW = t(CTX)
_INF = np.full(5, -np.inf, np.float32)


def _running(op: str):
    def regions() -> tuple[Region, ...]:
        block = Block((t(), t(SymbolicDim(BLOCK))))
        b = Builder.at_end(block)
        best = b(ReduceOp(block.arguments[1], op=op, spec="c->"))
        b(YieldOp(b(MapOp(block.arguments[0], best, op="add" if op == "sum" else "max"))))
        return (Region(block),)

    return regions


SAMPLES = (
    sample("einsum.contract", "scores", normal(5, 4), normal(4), types=(t(CTX, 4), t(4)), spec="cd,d->c"),
    sample("einsum.contract", "weighted_sum", normal(5), normal(5, 4), types=(t(CTX), t(CTX, 4)), spec="c,cd->d"),
    sample("einsum.contract", "product", normal(2, 3), normal(3, 4), spec="ij,jk->ik"),
    sample("einsum.contract", "outer", normal(2), normal(3), spec="i,j->ij"),
    sample("einsum.reduce", "max", normal(5), types=(t(CTX),), op="max", spec="c->"),
    sample("einsum.reduce", "max_of_nothing_visible", _INF, op="max", spec="c->"),
    sample("einsum.reduce", "sum_one_rank", normal(3, 4), op="sum", spec="cd->d"),
    *(
        sample("einsum.map", op, normal(5), np.abs(normal(5, seed="b")) + 0.1, types=(t(CTX), t(CTX)), op=op)
        for op in ("add", "sub", "mul", "div", "max")
    ),
    sample("einsum.map", "scalar", normal(5), normal(), types=(t(CTX), t()), op="sub"),
    sample("einsum.map", "scalar_first", normal(), normal(2, 3), op="mul"),
    sample("einsum.map", "exp", normal(5), op="exp"),
    sample("einsum.map", "exp_of_minus_inf", _INF, op="exp"),
    sample("einsum.map", "mask", normal(5), _MASK, types=(t(CTX), t(CTX, element=I1)), op="mask"),
    sample(
        "einsum.fold", "sum_short_last_block", normal(10), types=(t(CTX),),
        rank="ctx", block=4, carry=("sum",), regions=_running("sum"),
    ),
    sample(
        "einsum.fold", "max_one_block", normal(3), types=(t(CTX),),
        rank="ctx", block=64, carry=("max",), regions=_running("max"),
    ),
    sample(
        "einsum.fold", "max_of_nothing_visible", _INF, types=(t(CTX),),
        rank="ctx", block=2, carry=("max",), regions=_running("max"),
    ),
)  # fmt: skip


def _fold(message: str, rank: str = "ctx", block: int = 4, carry: tuple = ("sum",), x=_ROW) -> Fault:
    return fault("einsum.fold", message, x, rank=rank, block=block, carry=carry, regions=_running("sum"))


FAULTS = (
    fault("einsum.contract", "a spec like 'cd,d->c' for 2 operands, got 'cd->c'", t(3, 4), t(4), spec="cd->c"),
    fault("einsum.contract", "every rank of the result on the left", t(3), t(3), spec="c,c->d"),
    fault("einsum.contract", "rank d of the operands to match, got 4 and 5", t(3, 4), t(5), spec="cd,d->c"),
    fault("einsum.contract", "expected a of rank 2 for ranks 'cd'", t(3), t(5), spec="cd,d->c"),
    fault("einsum.contract", "expected b of f32", t(3), t(3, element=I1), spec="c,c->c"),
    fault("einsum.reduce", "op max or sum, got 'min'", t(3), op="min", spec="c->"),
    fault("einsum.reduce", "in the order of x", t(3, 4, 5), op="sum", spec="abc->ca"),
    fault("einsum.map", "expected op among add, sub", t(3), op="tanh"),
    fault("einsum.map", "expected 2 operands of sub, got 1", t(3), op="sub"),
    fault("einsum.map", "operands of one shape or of rank 0", t(3), t(4), op="add"),
    fault("einsum.map", "expected operand 1 of mask of i1", t(3), t(3), op="mask"),
    _fold("expected max or sum for each of 1 yielded values", carry=("min",)),
    _fold("expected max or sum for each of 1 yielded values", carry=("sum", "sum")),
    _fold("block >= 1, got 0", block=0),
    _fold("an operand whose first dimension is rows, got none", rank="rows"),
    _fold("expected block arguments (tensor<f32>, tensor<block x 2 x f32>), got", x=t(CTX, 2)),
)
