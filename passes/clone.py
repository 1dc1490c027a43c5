"""Copies of IR. Used to keep what a pass was given, and to build regions out of ops that stay where they are."""

from __future__ import annotations

from ir.core import Block, Op, Region, Value


def clone(op: Op, values: dict[Value, Value] | None = None) -> Op:
    """A copy of `op` and everything inside it, in no block.

    `values` maps values defined outside to what the copy reads instead (others are read as they are); it receives
    every value that is copied.
    """
    values = {} if values is None else values
    regions = [_clone_region(region, values) for region in op.regions]
    new = type(op).__new__(type(op))
    Op.__init__(
        new,
        [values.get(v, v) for v in op._operands],
        [r.type for r in op.results],
        op.attributes,
        regions,
        op.location,
    )
    for old_result, new_result in zip(op.results, new.results, strict=True):
        new_result.name_hint = old_result.name_hint
        values[old_result] = new_result
    return new


def _clone_region(region: Region, values: dict[Value, Value]) -> Region:
    blocks = []
    for block in region.blocks:
        arguments = block.arguments
        new = Block([a.type for a in arguments], [a.name_hint for a in arguments])
        values.update(zip(arguments, new.arguments, strict=True))
        blocks.append(new)
    for block, new in zip(region.blocks, blocks, strict=True):
        for op in block.ops:
            new._insert(len(new.ops), clone(op, values))
    return Region(*blocks)
