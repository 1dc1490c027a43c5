"""dce: removes ops whose results nobody reads, and what only they needed.

Decided by traits: an op may go when it has no effect, or only reads a KV cache. Appending to a cache is kept whether
or not somebody reads the new version, for it outlives the step. One walk from the end to the beginning.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Block, Op
from ir.rewriter import PatternRewriter
from ir.traits import Terminator, has_trait
from passes.analysis.effects import Effect, effect_of
from passes.pass_base import FunctionPass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class DeadCodePass(FunctionPass):
    """Removes ops without effect that nobody reads."""

    name: ClassVar[str] = "dce"

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        for region in func.regions:
            for block in region.blocks:
                remove_dead_ops(block, rewriter)


def remove_dead_ops(block: Block, rewriter: PatternRewriter) -> None:
    """Removes the dead ops of `block` and of the regions in it; users come before what feeds them."""
    for op in reversed(list(block.ops)):
        if has_trait(op, Terminator):
            continue
        if not any(r.uses for r in op.results) and effect_of(op) <= Effect.READS_KV_CACHE:
            rewriter.erase(op)
            continue
        for region in op.regions:
            for inner in region.blocks:
                remove_dead_ops(inner, rewriter)
