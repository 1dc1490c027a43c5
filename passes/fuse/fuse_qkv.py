"""fuse-qkv: the projections to queries, keys and values become one GEMM.

    %q = gemm.matmul %x, %wq            %w = tensor.concat %wq, %wk, %wv {axis = 0}       (constant expression)
    %k = gemm.matmul %x, %wk    -->     %y = gemm.matmul %x, %w
    %v = gemm.matmul %x, %wv            %q, %k, %v = tensor.slice %y {axis = 1, ...}

Found from the ops that store and read the cache: keys and values are traced back from `kv.append`, queries from the
readers of its result, through whatever works on one row at a time. Biases of all three are concatenated too, and one
clip serves all three when they are clipped alike. Applies when the three read one activation and their weights are
constants of one element.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op, Value
from ir.ops.attention import RopeOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, ReshapeOp, SliceOp
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily, fused_location
from ir.traits import ReadsKVCache, has_trait
from passes.analysis.constants import is_constant_expression
from passes.analysis.value_types import tensor_type
from passes.fuse.horizontal import stack, stackable_weights
from passes.fuse.outline import only_reader
from passes.pass_base import FunctionPass, PassContext, register_pass

_ROW_OPS = (RopeOp, RmsNormOp, ClipOp, ReshapeOp, AddOp, CastOp, SliceOp)  # what may stand between projection and cache


def projection_of(value: Value) -> MatmulOp | None:
    """The product that `value` is made from, row by row."""
    op = value.defining_op()
    while isinstance(op, _ROW_OPS):
        op = op.operands[0].defining_op()
    return op if isinstance(op, MatmulOp) else None


class FuseQKV(RewritePattern[KVAppendOp]):
    """Three products of one activation that end in one cache --> one product and three slices"""

    op_type: ClassVar[type[Op]] = KVAppendOp

    def match_and_rewrite(self, op: KVAppendOp, rewriter: PatternRewriter) -> bool:
        width = op.new_cache.type.head_dim
        readers = [u.operands[0] for u in op.new_cache.users if has_trait(u, ReadsKVCache)]
        queries = [v for v in dict.fromkeys(readers) if tensor_type(v).shape[-1] == width]  # others are probabilities
        if len(queries) != 1:
            return rewriter.no_match(op, f"{len(queries) or 'no'} queries read the new cache")
        sources = [queries[0], op.k, op.v]
        products = [p for p in (projection_of(v) for v in sources) if p is not None]
        if len(products) < 3:
            return rewriter.no_match(op, "queries, keys and values are not all made by gemm.matmul")
        if len(set(products)) < 3:
            return False  # they come from one product already
        if any(p.x is not products[0].x for p in products):
            return rewriter.no_match(op, "the projections read different activations")
        if any(p.parent is not op.parent for p in products):
            return rewriter.no_match(op, "the projections are in different blocks")
        reason = stackable_weights([p.w for p in products], axis=0)
        if reason:
            return rewriter.no_match(op, reason)
        _fuse_products(products, rewriter)
        return True


def _fuse_products(products: list[MatmulOp], rewriter: PatternRewriter) -> None:
    """Replaces `products` (and the bias and clip behind each, where all have them alike) by one."""
    block = products[0].parent
    assert block is not None
    anchor = min(products, key=block.ops.index)
    weight = stack([p.w for p in products], 0, anchor, rewriter)
    ends: list[Op] = list(products)  # the last op of each stream that the joint product takes over
    made: Op = MatmulOp(products[0].x, weight, location=fused_location(*products))
    rewriter.insert_before(anchor, made)
    while True:
        readers = [r for r in (only_reader(op.results[0], block) for op in ends) if r is not None]
        if len(readers) < len(ends):
            break
        if all(_is_bias(r, op) for r, op in zip(readers, ends, strict=True)):
            bias = stack([r.operands[1] for r in readers], 0, anchor, rewriter)
            made = AddOp(made.results[0], bias, location=fused_location(*readers))
        elif all(isinstance(r, ClipOp) and r.attributes == readers[0].attributes for r in readers):
            made = ClipOp(made.results[0], location=fused_location(*readers), **readers[0].attributes)
        else:
            break
        rewriter.insert_before(anchor, made)
        ends = readers
    start = 0
    for op in ends:
        size = tensor_type(op.results[0]).shape[1]
        assert isinstance(size, int)  # rows of a weight
        part = SliceOp(made.results[0], axis=1, start=start, size=size, location=op.location)
        rewriter.insert_before(anchor, part)
        part.results[0].name_hint = op.results[0].name_hint
        rewriter.replace_uses(op.results[0], part.results[0])
        start += size
    for op in ends:
        _erase_stream(op, rewriter)


def _erase_stream(end: Op, rewriter: PatternRewriter) -> None:
    """Erases a product and what is behind it, given the last of these ops."""
    op: Op | None = end
    while op is not None:
        before = None if isinstance(op, MatmulOp) else op.operands[0].defining_op()
        rewriter.erase(op)
        op = before


def _is_bias(op: Op, product: Op) -> bool:
    return isinstance(op, AddOp) and op.a is product.results[0] and op.b.type.rank == 1 and is_constant_expression(op.b)


@register_pass
@dataclass(frozen=True)
class FuseQKVPass(FunctionPass):
    """Queries, keys and values by one GEMM."""

    name: ClassVar[str] = "fuse-qkv"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FuseQKV()], ctx.rewriter())
