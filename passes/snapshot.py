"""Whether a pass changed anything, without asking the pass and without printing.

A snapshot lists what the IR is made of, in order. Ops and values compare by identity, so comparing two snapshots is
one walk over two lists; a pass that rebuilds equal IR counts as having changed it.
"""

from __future__ import annotations

from typing import Any

from ir.core import Op


def snapshot(root: Op) -> list[tuple[Any, ...]]:
    """The ops of `root` with operands, attributes and types. Equal snapshots mean untouched IR."""
    found: list[tuple[Any, ...]] = []
    for op in root.walk():
        found.append(
            (
                op,
                tuple(op._operands),
                tuple(op.attributes.items()),
                tuple([r.type for r in op.results]),
                tuple([a.type for region in op.regions for block in region.blocks for a in block.arguments]),
                op.parent,
            )
        )
    return found
