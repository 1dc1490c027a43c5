"""Traits: facts about ops that passes ask for. No pass keeps a list of op names.

An op lists trait classes in `traits`. `HasRecursiveEffects` makes an op as pure as the ops of its regions.
"""

from __future__ import annotations

from ir.core import Op


class Trait:
    """Base of all traits."""


class Pure(Trait):
    """Reads nothing but its operands and attributes, writes nothing: may be removed when unused, merged when equal."""


class Commutative(Trait):
    """The first two operands may change places."""


class Elementwise(Trait):
    """Result element i depends on the operands' elements at i only (after broadcasting)."""


class ConstantLike(Trait):
    """Stands for bytes known when the artifact is built. A pure op of constants only is a constant expression."""


class ReadsKVCache(Trait):
    """Reads a KV cache operand."""


class WritesKVCache(Trait):
    """Yields a new version of a KV cache operand; never removed, never moved over another access of that cache."""


class ReadsMemory(Trait):
    """Reads a buffer (tile and plan level)."""


class WritesMemory(Trait):
    """Writes a buffer (tile and plan level)."""


class Synchronizes(Trait):
    """Orders the memory accesses of several threads; never removed or moved."""


class Terminator(Trait):
    """Ends its block."""


class NoTerminator(Trait):
    """The blocks of its regions end with any op."""


class HasRecursiveEffects(Trait):
    """Has the effects of the ops in its regions and no others."""


class IsolatedFromAbove(Trait):
    """The regions use no value defined outside of them."""


def has_trait(op: Op, trait: type[Trait]) -> bool:
    """Whether the class of `op` lists `trait`."""
    return trait in getattr(type(op), "traits", ())


def is_pure(op: Op) -> bool:
    """Whether removing `op` when its results are unused changes nothing."""
    if has_trait(op, Pure):
        return True
    if not has_trait(op, HasRecursiveEffects):
        return False
    return all(
        is_pure(inner) or has_trait(inner, Terminator)
        for region in op.regions
        for block in region.blocks
        for inner in block.ops
    )
