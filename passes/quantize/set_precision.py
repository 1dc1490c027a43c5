"""set-precision: the number formats of weights, activations and KV cache.

    %y = gemm.matmul %x, %w          -->   %y = gemm.matmul (tensor.cast %x {to = bf16}), (tensor.cast %w {to = bf16})
    %c = kv.state : kv<2 x 16 x f32> -->   %c = kv.state : kv<2 x 16 x bf16>

`weights` is the format of what GEMMs multiply by and of the embedding table, `activations` the format that an
activation is rounded to right before a GEMM (products are added up in f32), `kv` the format of the cache. The residual
stream, norms and their gains, biases, softmax and routing stay f32: the product that feeds `moe.route` keeps f32
weights and activations, because a changed choice of experts costs more than its few bytes. Casts that undo each other
are left to canonicalize. Runs before ops are fused; products inside of regions are refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ir.core import Op, Value
from ir.formats import F32, PLAIN_FORMATS, PlainFormat
from ir.op_def import Op as DeclaredOp
from ir.ops.fused import FusedOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVStateOp
from ir.ops.moe import GroupedGemmOp, RouteOp
from ir.ops.tensor import AddOp, CastOp, EmbedOp
from ir.rewriter import PatternRewriter
from ir.types import KVCacheType
from passes.analysis.exactness import is_exact
from passes.analysis.value_types import tensor_type
from passes.pass_base import FunctionPass, PassContext, register_pass

FloatName = Literal["f32", "bf16", "f16"]


def feeds_router(op: Op) -> bool:
    """Whether the result of `op` reaches `moe.route`, at most a bias in between."""
    readers = op.results[0].users
    return any(isinstance(r, RouteOp) or (isinstance(r, AddOp) and feeds_router(r)) for r in readers)


@register_pass
@dataclass(frozen=True)
class SetPrecisionPass(FunctionPass):
    """Formats of weights, activations in front of GEMMs, and KV cache."""

    name: ClassVar[str] = "set-precision"
    weights: FloatName = "bf16"
    activations: FloatName = "bf16"
    kv: FloatName = "bf16"

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        rewriter.pattern = self.name
        casts: dict[tuple[Value, PlainFormat], Value] = {}
        for op in list(func.walk()):
            if isinstance(op, (MatmulOp, GroupedGemmOp)):
                self._set_product(op, casts, rewriter)
            elif isinstance(op, EmbedOp):
                set_embedding(op, PLAIN_FORMATS[self.weights], rewriter)
            elif isinstance(op, KVStateOp) and isinstance(op.cache.type, KVCacheType):
                old = op.cache.type
                set_cache(op.cache, KVCacheType(old.num_kv_heads, old.head_dim, PLAIN_FORMATS[self.kv]), rewriter)

    def _set_product(
        self, op: MatmulOp | GroupedGemmOp, casts: dict[tuple[Value, PlainFormat], Value], rewriter: PatternRewriter
    ) -> None:
        if isinstance(op.parent_op, FusedOp):
            rewriter.no_match(op, "it is inside of a fused region: set the precision before fusing")
            return
        routes = feeds_router(op)
        weights = F32 if routes else PLAIN_FORMATS[self.weights]
        activations = F32 if routes else PLAIN_FORMATS[self.activations]
        for index, to in ((0, activations), (1, weights)):
            value = op.operands[index]
            if tensor_type(value).element == to:
                continue
            key = (value, to)
            if key not in casts or casts[key].owner.parent is not op.parent:  # an earlier one is in front of this op
                casts[key] = rewriter.insert_before(op, CastOp(value, to=to)).results[0]
            rewriter.set_operand(op, index, casts[key])


def set_embedding(op: EmbedOp, to: PlainFormat, rewriter: PatternRewriter) -> None:
    """embed(table) --> cast(embed(cast(table) to `to`)): readers see the element that they saw before.

    A reader that widens the rows reads a table that holds them exactly without going through their old element.
    """
    old = op.table.type.element
    if old == to or isinstance(op.parent_op, FusedOp):
        return
    table = rewriter.insert_before(op, CastOp(op.table, to=to))
    rows = rewriter.insert_before(op, EmbedOp(op.ids, table.results[0], location=op.location))
    if is_exact(old, to):
        for reader in [u for u in op.y.users if isinstance(u, CastOp)]:
            rewriter.set_operand(reader, 0, rows.results[0])
    rewriter.replace(op, CastOp(rows.results[0], to=old))


def set_cache(cache: Value, type: KVCacheType, rewriter: PatternRewriter) -> None:
    """Gives `cache` and every later version of it the type."""
    worklist = [cache]
    while worklist:
        value = worklist.pop()
        if value.type == type:
            continue
        rewriter.set_type(value, type)
        for user, index in value.uses:
            if isinstance(user, FusedOp):
                worklist.append(user.region.block.arguments[index])
            elif user.name == "tensor.yield" and isinstance(user.parent_op, FusedOp):
                worklist.append(user.parent_op.results[index])
            elif isinstance(user, DeclaredOp):
                worklist.extend(r for r in user.results if isinstance(r.type, KVCacheType))
