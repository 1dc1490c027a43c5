"""How often a cascade of einsums must traverse a rank, read off the cascade itself (FuseMax, arXiv:2406.10491).

A traversal meets the points of the rank one after another. Steps that need of a point only what the same traversal
gives for that point share it. A step that needs the *end* of a traversal (a maximum over the rank, a sum) must wait
for it and then traverse again. For softmax attention of one row over the cache:

    m = max s            pass 1, complete after it          e = exp(s - m)      pass 2: needs m complete
    l = sum e            pass 2, complete after it          p = e / l           pass 3: needs l complete
    y = p . v            pass 3                                                 -> three passes

Dividing y instead of e leaves two; an `einsum.fold` that carries maximum and sums along leaves one.
"""

from __future__ import annotations

from dataclasses import dataclass

from ir.core import Block, Op, Value
from ir.traits import Terminator, has_trait
from ir.types import SymbolicDim, TensorType


@dataclass(frozen=True)
class CascadePasses:
    """`count` passes over the rank; `pass_of[op]` is the traversal that an op takes part in, in block order."""

    count: int
    pass_of: dict[Op, int]


def has_rank(value: Value, rank: str) -> bool:
    """Whether `value` has a point for every point of the rank."""
    type = value.type
    return isinstance(type, TensorType) and any(isinstance(d, SymbolicDim) and d.name == rank for d in type.shape)


def count_passes(block: Block, rank: str = "ctx") -> CascadePasses:
    """The passes over the symbolic dimension `rank` that the ops of `block` need, each taken as early as it can be."""
    # Of a value with the rank: the traversal that first meets its points. Of others: the one it is complete after.
    known: dict[Value, int] = {a: 1 if has_rank(a, rank) else 0 for a in block.arguments}
    pass_of: dict[Op, int] = {}
    for op in block.ops:
        if has_trait(op, Terminator):
            continue
        ranked = [known[v] for v in op.operands if has_rank(v, rank)]
        complete = [known[v] for v in op.operands if not has_rank(v, rank)]
        if ranked or any(has_rank(r, rank) for r in op.results):
            at = max([1, *ranked, *(c + 1 for c in complete)])
            pass_of[op] = at
        else:
            at = max(complete, default=0)
        for r in op.results:
            known[r] = at
    return CascadePasses(max(pass_of.values(), default=0), pass_of)
