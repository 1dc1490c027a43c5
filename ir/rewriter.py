"""Rewriting: patterns that decide, and the one door through which they change the graph.

A pattern looks at one op, returns False (with a reason through `no_match`) or changes the IR through the
`PatternRewriter` it was given and returns True. `apply_greedily` runs patterns to a fixed point.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Generic, TypeVar

from ir.builder import Builder
from ir.core import Block, Op, Value
from ir.location import Location, fuse_origins
from ir.traits import is_pure
from ir.types import Type


@dataclass(frozen=True)
class Refusal:
    """Why a pattern left an op alone."""

    pattern: str
    op_name: str
    origin: str
    reason: str

    def __str__(self) -> str:
        return f"{self.origin or self.op_name}: {self.pattern} did not apply to {self.op_name}: {self.reason}"


@dataclass
class PatternRewriter:
    """Changes the IR. `refusals` collects why patterns did not apply; `changed` says whether anything happened."""

    refusals: list[Refusal] = field(default_factory=list)
    changed: bool = False
    touched: list[Op] = field(default_factory=list)
    pattern: str = ""

    def no_match(self, op: Op, reason: str) -> bool:
        """Records why the pattern leaves `op` alone; returns False, so that a pattern can `return` it."""
        self.refusals.append(Refusal(self.pattern, op.name, op.location.origin, reason))
        return False

    def insert_before(self, anchor: Op, op: Op) -> Op:
        """Puts a new op in front of `anchor`; it takes the anchor's origin if it has none."""
        builder = Builder.before(anchor)
        builder.origin = anchor.location.origin
        builder.insert(op)
        self._touch(op)
        return op

    def replace(self, op: Op, new: Op) -> bool:
        """Puts `new` in the place of `op`, result for result. Returns True."""
        self.insert_before(op, new)
        for old_result, new_result in zip(op.results, new.results, strict=True):
            new_result.name_hint = new_result.name_hint or old_result.name_hint
        return self.replace_with_values(op, new.results)

    def replace_with_values(self, op: Op, values: Sequence[Value]) -> bool:
        """Lets the users of `op` read `values` instead, and erases `op`. Returns True."""
        for old, new in zip(op.results, values, strict=True):
            self.replace_uses(old, new)
        self.erase(op)
        return True

    def replace_uses(self, old: Value, new: Value) -> None:
        """Every op that reads `old` reads `new` from now on."""
        for user, index in list(old.uses):
            user._set_operand(index, new)
            self._touch(user)
        self.changed = True

    def set_operand(self, op: Op, index: int, value: Value) -> None:
        op._set_operand(index, value)
        self._touch(op)

    def set_attribute(self, op: Op, name: str, value: object) -> None:
        op.attributes[name] = value
        self._touch(op)

    def set_type(self, value: Value, type: Type) -> None:
        """Changes the type of a value; the ops around it must agree, which the verifier checks."""
        value.type = type
        self.changed = True

    def move_before(self, op: Op, anchor: Op) -> None:
        """Moves `op` in front of `anchor`, in the same or another block."""
        assert op.parent is not None and anchor.parent is not None
        op.parent._remove(op)
        anchor.parent._insert(anchor.parent.ops.index(anchor), op)
        self._touch(op)

    def move_to_end(self, op: Op, block: Block) -> None:
        assert op.parent is not None
        op.parent._remove(op)
        block._insert(len(block.ops), op)
        self._touch(op)

    def erase(self, op: Op) -> None:
        """Removes an op nobody reads any more; ops that fed it are visited again."""
        for r in op.results:
            if r.uses:
                raise ValueError(f"{op.name} ({op.location.origin}) is erased while {r.uses[0][0].name} reads it")
        feeders = [v.defining_op() for v in op.operands]
        for inner in list(op.walk()):
            inner._drop_operands()
        if op.parent is not None:
            op.parent._remove(op)
        self.changed = True
        self.touched.extend(f for f in feeders if f is not None)

    def _touch(self, op: Op) -> None:
        self.changed = True
        self.touched.append(op)


OpT = TypeVar("OpT", bound=Op)


class RewritePattern(Generic[OpT]):
    """Base of patterns. `op_type` limits what is offered to `match_and_rewrite`."""

    op_type: ClassVar[type[Op]] = Op

    def match_and_rewrite(self, op: OpT, rewriter: PatternRewriter) -> bool:
        raise TypeError(f"{type(self).__name__} does not say what it rewrites")


def apply_greedily(
    root: Op, patterns: Iterable[RewritePattern[Any]], rewriter: PatternRewriter | None = None, max_rounds: int = 64
) -> PatternRewriter:
    """Offers every op inside `root` to every pattern, and what changed again, until nothing changes.

    Pure ops whose results nobody reads are removed on the way. Raises RuntimeError when `max_rounds` sweeps do not
    reach a fixed point (two patterns undo each other).
    """
    rewriter = rewriter or PatternRewriter()
    patterns = list(patterns)
    for _ in range(max_rounds):
        before = rewriter.changed
        rewriter.changed = False
        rewriter.refusals.clear()
        for op in list(root.walk()):
            if op is root or op.parent is None:
                continue
            if op.results and is_pure(op) and not any(r.uses for r in op.results):
                rewriter.erase(op)
                continue
            for pattern in patterns:
                if not isinstance(op, pattern.op_type):
                    continue
                rewriter.pattern = type(pattern).__name__
                if pattern.match_and_rewrite(op, rewriter):
                    if op.parent is None:
                        break
        changed, rewriter.changed = rewriter.changed, rewriter.changed or before
        rewriter.touched.clear()
        if not changed:
            return rewriter
    raise RuntimeError(f"{root.name}: no fixed point after {max_rounds} rounds of rewriting")


def fused_location(*ops: Op) -> Location:
    """The location of an op that stands for several: their origins fused, the first one's source span."""
    return replace(ops[0].location, origin=fuse_origins(*(op.location.origin for op in ops)))
