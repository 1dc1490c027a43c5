"""fuse-attention: scores, softmax and the weighted sum of values become one op that reads the cache once.

    %s = attn.scores %q, %c, %pos, %slots {scale = 0.25}         %o = attn.attention %q, %c, %pos, %slots
    %p = attn.softmax %s                                   -->         {scale = 0.25} ({ cascade })
    %o = attn.combine %p, %c, %slots

The region starts as the textbook cascade and loses passes over `ctx` one rewrite at a time, down to `passes`
(1: online softmax over blocks of `block` positions). The passes are counted from the cascade, before and after, and
reported. Applies when scores and probabilities have this one reader, both reads are of one version of the cache with
the same slots, and no cache is written between them. Scores are no longer rounded to f32 between the three ops.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ir.core import Op
from ir.ops.attention import AttentionOp, CombineOp, ScoresOp, SoftmaxOp
from ir.ops.cascades import build_softmax_cascade
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily, fused_location
from passes.analysis.cascade_passes import count_passes
from passes.analysis.effects import Effect, effect_of
from passes.fuse.cascade_patterns import DeferDivision, FoldOnlineSoftmax
from passes.pass_base import FunctionPass, PassContext, register_pass


class FuseAttention(RewritePattern[CombineOp]):
    """combine(softmax(scores(...))) --> attention with the three-pass cascade"""

    op_type: ClassVar[type[Op]] = CombineOp

    def match_and_rewrite(self, op: CombineOp, rewriter: PatternRewriter) -> bool:
        softmax = op.p.defining_op()
        if not isinstance(softmax, SoftmaxOp):
            return rewriter.no_match(op, "the probabilities are not made by attn.softmax")
        scores = softmax.s.defining_op()
        if not isinstance(scores, ScoresOp):
            return rewriter.no_match(op, "the softmax is not over attn.scores")
        if not softmax.p.has_one_use():
            return rewriter.no_match(op, "the probabilities have other readers")
        if not scores.s.has_one_use():
            return rewriter.no_match(op, "the scores have other readers")
        if scores.cache is not op.cache or scores.slots is not op.slots:
            return rewriter.no_match(op, "keys and values are read from different caches or slots")
        if scores.parent is not op.parent or softmax.parent is not op.parent:
            return rewriter.no_match(op, "the three ops are in different blocks")
        assert op.parent is not None
        between = op.parent.ops[op.parent.ops.index(scores) : op.parent.ops.index(op)]
        if any(effect_of(o) > Effect.READS_KV_CACHE for o in between):
            return rewriter.no_match(op, "a cache is written between the reads of keys and values")
        attention = AttentionOp(
            scores.q,
            scores.cache,
            scores.positions,
            scores.slots,
            scale=scores.scale,
            window=scores.window,
            regions=[build_softmax_cascade(op.cache.type.head_dim)],
            location=fused_location(scores, softmax, op),
        )
        rewriter.replace(op, attention)
        rewriter.erase(softmax)
        rewriter.erase(scores)
        return True


@register_pass
@dataclass(frozen=True)
class FuseAttentionPass(FunctionPass):
    """One attention op per layer, its cascade brought to `passes` passes over the cache."""

    name: ClassVar[str] = "fuse-attention"
    passes: Literal[1, 2, 3] = 1
    block: int = 64  # positions per step of the online softmax

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"expected block >= 1, got {self.block}")

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FuseAttention()], ctx.rewriter())
        for op in func.walk():
            if isinstance(op, AttentionOp):
                self.reduce_passes(op, ctx)

    def reduce_passes(self, op: AttentionOp, ctx: PassContext) -> None:
        """Rewrites the cascade of `op` until it has as few passes as wanted, and tells the counts."""
        counts = [count_passes(op.region.block).count]
        for pattern in (DeferDivision(), FoldOnlineSoftmax(block=self.block)):
            if counts[-1] <= self.passes:
                break
            rewriter = apply_greedily(op, [pattern], ctx.rewriter())
            if rewriter.changed:
                counts.append(count_passes(op.region.block).count)
        told = ", then ".join(str(c) for c in counts)
        ctx.remark(op, f"the cascade needs {told} {'pass' if counts[-1] == 1 else 'passes'} over ctx")
