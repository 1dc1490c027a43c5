"""cse: of two ops that compute the same from the same, the later one goes.

    %a = tensor.cast %w {to = bf16}         %a = tensor.cast %w {to = bf16}
    %b = tensor.cast %w {to = bf16}   -->   use(%a), use(%a)
    use(%a), use(%b)

Decided by traits: ops without effects, and ops that read a KV cache as long as no cache is written between the two.
Ops with regions are equal when their regions are, op by op. An op inside a region may be replaced by one outside of
it, unless the region is isolated. Operands of commutative ops count as a set.
"""

from __future__ import annotations

import struct
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from ir.core import Block, Op, Value
from ir.rewriter import PatternRewriter
from ir.traits import Commutative, IsolatedFromAbove, Terminator, has_trait
from passes.analysis.effects import Effect, effect_of
from passes.pass_base import FunctionPass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class CSEPass(FunctionPass):
    """Removes ops that compute again what is there already."""

    name: ClassVar[str] = "cse"

    def run(self, func: Op, ctx: PassContext) -> None:
        _Merger(ctx.rewriter()).function(func)


class _Merger:
    """`writes` counts the cache writes so far: reads are equal only between two of them."""

    def __init__(self, rewriter: PatternRewriter) -> None:
        self.rewriter = rewriter
        self.writes = 0

    def function(self, func: Op) -> None:
        for region in func.regions:
            for block in region.blocks:
                self.block(block, {})

    def block(self, block: Block, known: dict[Hashable, Op]) -> None:
        for op in list(block.ops):
            effect = effect_of(op)
            if effect > Effect.READS_KV_CACHE:
                self.writes += 1
            for region in op.regions:
                # A region may run any number of times, and what it computes is not there outside of it.
                outer = {} if has_trait(op, IsolatedFromAbove) else known
                for inner in region.blocks:
                    self.block(inner, dict(outer))
            if effect > Effect.READS_KV_CACHE or not op.results or has_trait(op, Terminator):
                continue
            key = (op_key(op, {}), self.writes if effect == Effect.READS_KV_CACHE else -1)
            first = known.setdefault(key, op)
            if first is not op:
                self.rewriter.replace_with_values(op, first.results)


def op_key(op: Op, numbers: dict[Value, int]) -> Hashable:
    """Equal for ops that compute the same. `numbers` names the values defined inside the region at hand."""
    operands: list[Hashable] = [numbers.get(v, v) for v in op._operands]
    if has_trait(op, Commutative) and len(operands) >= 2:
        operands[:2] = sorted(operands[:2], key=lambda v: (isinstance(v, int), v if isinstance(v, int) else id(v)))
    attributes = tuple((name, _exact(value)) for name, value in op.attributes.items())
    types = tuple(r.type for r in op.results)
    regions: tuple[Hashable, ...] = ()
    if op.regions:
        inner = dict(numbers)
        regions = tuple(tuple(_block_key(block, inner) for block in region.blocks) for region in op.regions)
    return type(op), tuple(operands), attributes, types, regions


def _block_key(block: Block, numbers: dict[Value, int]) -> Hashable:
    for argument in block.arguments:
        numbers[argument] = len(numbers)
    keys = []
    for op in block.ops:
        keys.append(op_key(op, numbers))
        for r in op.results:
            numbers[r] = len(numbers)
    return tuple(a.type for a in block.arguments), tuple(keys)


def _exact(value: Any) -> Hashable:
    """An attribute as a key: 0.0 and -0.0 differ, 1 and 1.0 and True differ."""
    if isinstance(value, float):
        return "float", struct.pack("d", value)
    if isinstance(value, tuple):
        return tuple(_exact(v) for v in value)
    return type(value), value
