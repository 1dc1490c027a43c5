"""What an op does besides computing its results, told by traits, regions included."""

from __future__ import annotations

from enum import IntEnum

from ir.core import Op
from ir.traits import HasRecursiveEffects, Pure, ReadsKVCache, Terminator, WritesKVCache, has_trait


class Effect(IntEnum):
    """Ordered: an op with several effects has the greatest."""

    NONE = 0
    READS_KV_CACHE = 1  # may be removed when unused; must not move over a write of the cache
    WRITES_KV_CACHE = 2
    UNKNOWN = 3  # says nothing: never touched


def effect_of(op: Op) -> Effect:
    """The effect of `op`. A terminator has none of its own."""
    if has_trait(op, WritesKVCache):
        return Effect.WRITES_KV_CACHE
    if has_trait(op, ReadsKVCache):
        return Effect.READS_KV_CACHE
    if has_trait(op, Pure) or has_trait(op, Terminator):
        return Effect.NONE
    if not has_trait(op, HasRecursiveEffects):
        return Effect.UNKNOWN
    inner = (effect_of(o) for region in op.regions for block in region.blocks for o in block.ops)
    return max(inner, default=Effect.NONE)
