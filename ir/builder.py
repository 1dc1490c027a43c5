"""Builder: the way to make new IR.

b = Builder.at_end(block)
h = b(RmsNormOp(x, gain, eps=1e-6))      # inserts the op, returns its result (a tuple when there are several)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ir.core import Block, Op, OpResult


@dataclass
class InsertionPoint:
    """Before op number `index` of `block`."""

    block: Block
    index: int

    @classmethod
    def at_end(cls, block: Block) -> InsertionPoint:
        return cls(block, len(block.ops))

    @classmethod
    def before(cls, op: Op) -> InsertionPoint:
        assert op.parent is not None, f"{op.name} is in no block"
        return cls(op.parent, op.parent.ops.index(op))


class Builder:
    """Inserts ops one after another at its insertion point."""

    def __init__(self, point: InsertionPoint, origin: str = "") -> None:
        self.point = point
        self.origin = origin

    @classmethod
    def at_end(cls, block: Block) -> Builder:
        return cls(InsertionPoint.at_end(block))

    @classmethod
    def before(cls, op: Op) -> Builder:
        return cls(InsertionPoint.before(op))

    def insert(self, op: Op) -> Op:
        """Inserts `op`; an op without an origin takes the builder's."""
        if not op.location.origin and self.origin:
            op.location = replace(op.location, origin=self.origin)
        self.point.block._insert(self.point.index, op)
        self.point.index += 1
        return op

    def __call__(self, op: Op, name: str = "") -> Any:
        """Inserts `op` and returns its result (a tuple of several, None of none). `name` hints its text name."""
        self.insert(op)
        if name:
            for r in op.results:
                r.name_hint = name
        if len(op.results) == 1:
            return op.results[0]
        results: tuple[OpResult, ...] = op.results
        return results or None

    @contextmanager
    def scope(self, origin: str) -> Iterator[None]:
        """Ops inserted inside get `origin` appended to the builder's origin: `layers.0` + `mlp` -> `layers.0.mlp`."""
        saved = self.origin
        self.origin = f"{saved}.{origin}" if saved else origin
        try:
            yield
        finally:
            self.origin = saved
