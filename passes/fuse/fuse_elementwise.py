"""fuse-elementwise: chains of elementwise ops, and the row-wise op in front of them, become one loop.

    %n = norm.rms %x, %g                    %n, %c = tensor.fused %x, %g {kind = "elementwise"} ({
    %c = tensor.cast %n {to = bf16}   -->     %n = norm.rms, %c = tensor.cast
    (both have readers)                       tensor.yield %n, %c })

A group starts at an elementwise op, a swiglu or a head (norm.rms, tensor.embed, moe.combine) and takes in readers of
its values, elementwise ones over rows of the same number, as long as the group can stand at one place: where its
first op stood, when everything else it reads is there by then, or where its last op stood, when nobody reads a result
before. Values with readers outside become results. Weights (constant expressions) are left alone: they are computed
when the artifact is built. Runs after the GEMM fusions, which take what they can first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Block, Op, Value
from ir.ops.tensor import SwigluOp
from ir.rewriter import PatternRewriter
from ir.traits import Elementwise, has_trait
from ir.types import TensorType
from passes.analysis.constants import is_constant_expression
from passes.fuse.forms import ELEMENTWISE_HEADS
from passes.fuse.outline import outline
from passes.pass_base import FunctionPass, PassContext, register_pass


def _is_pointwise(op: Op) -> bool:
    return has_trait(op, Elementwise) or isinstance(op, SwigluOp)


def _rows(op: Op) -> tuple[object, ...]:
    """The dimensions that a group has in common: all but the last, which a swiglu halves."""
    type = op.results[0].type
    return type.shape[:-1] if isinstance(type, TensorType) else ()


class FuseElementwise:
    """Groups of row-wise ops of one block --> fused "elementwise" """

    def __init__(self, block: Block, rewriter: PatternRewriter) -> None:
        self.block = block
        self.rewriter = rewriter

    def apply(self) -> None:
        self.rewriter.pattern = type(self).__name__
        for op in list(self.block.ops):
            starts = _is_pointwise(op) or isinstance(op, ELEMENTWISE_HEADS)
            if op.parent is self.block and starts and not is_constant_expression(op.results[0]):
                self._fuse_from(op)

    def _fuse_from(self, head: Op) -> None:
        places = {op: i for i, op in enumerate(self.block.ops)}
        group, anchor = [head], head
        tried: set[Op] = set()
        while True:
            reader = self._next_reader(group, tried, places)
            if reader is None:
                break
            tried.add(reader)
            if _rows(reader) != _rows(head):
                self.rewriter.no_match(head, f"{reader.name} works on rows {_rows(reader)}, not {_rows(head)}")
                continue
            larger = sorted([*group, reader], key=places.__getitem__)
            place = self._place(larger, places)
            if place is None:
                self.rewriter.no_match(head, f"{reader.name} needs what is computed after a reader of the group")
                continue
            group, anchor = larger, place
        if len(group) > 1:
            members = set(group)
            results = [r for op in group for r in op.results if any(user not in members for user in r.users)]
            outline(self.rewriter, "elementwise", group, results, anchor=anchor, leading=())

    def _next_reader(self, group: list[Op], tried: set[Op], places: dict[Op, int]) -> Op | None:
        """The first op of the block, in order, that could join and was not tried yet."""
        readers = [user for op in group for r in op.results for user in r.users]
        found = [u for u in readers if u in places and u not in group and u not in tried and _is_pointwise(u)]
        return min(found, key=places.__getitem__) if found else None

    def _place(self, group: list[Op], places: dict[Op, int]) -> Op | None:
        """The member at whose place the whole group can stand; None when there is none."""
        members = set(group)
        first, last = group[0], group[-1]
        if all(self._is_known_at(v, places[first], members, places) for op in group for v in op.operands):
            return first
        readers = [user for op in group for r in op.results for user in r.users if user not in members]
        if all(self._step(user, places) > places[last] for user in readers):
            return last
        return None

    def _is_known_at(self, value: Value, step: int, members: set[Op], places: dict[Op, int]) -> bool:
        op = value.defining_op()
        return op is None or op in members or places.get(op, -1) < step

    def _step(self, op: Op, places: dict[Op, int]) -> int:
        """The place of the op of the block that is `op` or holds it."""
        at: Op | None = op
        while at is not None and at not in places:
            at = at.parent_op
        return places[at] if at is not None else len(places)


@register_pass
@dataclass(frozen=True)
class FuseElementwisePass(FunctionPass):
    """Elementwise chains, with the norm, embedding or expert sum in front of them, in one loop."""

    name: ClassVar[str] = "fuse-elementwise"

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        for region in func.regions:
            for block in region.blocks:
                FuseElementwise(block, rewriter).apply()
