"""Regions of attn.attention: softmax attention of one query row as a cascade of einsums, in three, two and one pass.

    three passes (textbook)       two passes (the division waits)   one pass (online softmax)
    s = mask(scale * (k . q))     s = mask(scale * (k . q))         s = mask(scale * (k . q))
    m = max s                     m = max s                         per block of ctx, m, l, o carried along:
    e = exp(s - m)                e = exp(s - m)                      m' = max(m, max s);  e = exp(s - m')
    l = sum e                     l = sum e                           f = exp(m - m')
    p = e / l                     u = e . v                           l' = l f + sum e;    o' = o f + e . v
    y = p . v                     y = u / l                         y = o / l

Sources: FuseMax (arXiv:2406.10491) for the counting of passes, arXiv:1805.02867 for the online softmax.
"""

from __future__ import annotations

from ir.builder import Builder
from ir.core import Block, Region, Value
from ir.formats import F32
from ir.ops.attention import row_argument_types
from ir.ops.einsum import ContractOp, FoldOp, MapOp, ReduceOp
from ir.ops.fused import YieldOp
from ir.types import TensorType

ROW_NAMES = ("q", "k", "v", "mask", "scale")


def _row_block(head_dim: int) -> tuple[Builder, tuple[Value, ...]]:
    block = Block(row_argument_types(head_dim), ROW_NAMES)
    return Builder.at_end(block), block.arguments


def _masked_scores(b: Builder, q: Value, k: Value, mask: Value, scale: Value) -> Value:
    dots = b(ContractOp(k, q, spec="cd,d->c"), "s")
    scaled = b(MapOp(dots, scale, op="mul"), "s")
    return b(MapOp(scaled, mask, op="mask"), "s")


def _exponentials(b: Builder, s: Value, m: Value) -> Value:
    return b(MapOp(b(MapOp(s, m, op="sub"), "d"), op="exp"), "e")


def _finish(b: Builder, y: Value) -> Region:
    b(YieldOp(y))
    return Region(b.point.block)


def build_softmax_cascade(head_dim: int) -> Region:
    """The textbook cascade: three passes over ctx (maximum, sum, weighted sum)."""
    b, (q, k, v, mask, scale) = _row_block(head_dim)
    s = _masked_scores(b, q, k, mask, scale)
    m = b(ReduceOp(s, op="max", spec="c->"), "m")
    e = _exponentials(b, s, m)
    total = b(ReduceOp(e, op="sum", spec="c->"), "l")
    p = b(MapOp(e, total, op="div"), "p")
    return _finish(b, b(ContractOp(p, v, spec="c,cd->d"), "y"))


def build_deferred_division(head_dim: int) -> Region:
    """The division after the weighted sum: two passes over ctx (maximum; sum and weighted sum together)."""
    b, (q, k, v, mask, scale) = _row_block(head_dim)
    s = _masked_scores(b, q, k, mask, scale)
    m = b(ReduceOp(s, op="max", spec="c->"), "m")
    e = _exponentials(b, s, m)
    total = b(ReduceOp(e, op="sum", spec="c->"), "l")
    u = b(ContractOp(e, v, spec="c,cd->d"), "u")
    return _finish(b, b(MapOp(u, total, op="div"), "y"))


def build_online_softmax(head_dim: int, block: int = 64) -> Region:
    """Running maximum, sum and weighted sum over blocks of ctx: one pass."""
    b, (q, k, v, mask, scale) = _row_block(head_dim)
    s = _masked_scores(b, q, k, mask, scale)
    body = _online_step(head_dim, (s, v))
    fold = FoldOp(s, v, regions=[body], rank="ctx", block=block, carry=("max", "sum", "sum"))
    _, total, u = b(fold)
    return _finish(b, b(MapOp(u, total, op="div"), "y"))


def _online_step(head_dim: int, operands: tuple[Value, Value]) -> Region:
    """(m [], l [], o [d], s [block], v [block, d]) -> the next m, l, o."""
    scalar, row = TensorType((), F32), TensorType((head_dim,), F32)
    blocks = [FoldOp.block_type(x.type, "ctx") for x in operands]
    body = Block((scalar, scalar, row, *blocks), ("m", "l", "o", "s", "v"))
    b = Builder.at_end(body)
    m, total, o, s, v = body.arguments
    new_m = b(MapOp(m, b(ReduceOp(s, op="max", spec="c->")), op="max"), "m")
    e = _exponentials(b, s, new_m)
    f = b(MapOp(b(MapOp(m, new_m, op="sub")), op="exp"), "f")  # what the old sums shrink by
    new_total = b(MapOp(b(MapOp(total, f, op="mul")), b(ReduceOp(e, op="sum", spec="c->")), op="add"), "l")
    new_o = b(MapOp(b(MapOp(o, f, op="mul")), b(ContractOp(e, v, spec="c,cd->d")), op="add"), "o")
    b(YieldOp(new_m, new_total, new_o))
    return Region(body)
