"""add-stand-ins: experts get copies, which `quantize` stores in fewer bits, for those that are missing when they run.

    %order, %offsets = moe.dispatch %ids      %used = moe.stand_ins %ids
    %y = experts(%x, %order, %offsets)   -->  %order, %offsets = moe.dispatch %used        (twice as many groups)
    %z = moe.combine %y, %w, %order           %y = experts(%x, %order, %offsets)
                                              %s = experts(%x, %order, %offsets) {first = E}
                                              %all = moe.join_rows %y, %s, %offsets
                                              %z = moe.combine %all, %w, %order

Takes a step before its fusions, so that they see experts and stand-ins alike. What is between a layer's dispatch and
its combine is copied op by op; layers with anything else there are left as they are, with a remark. The graph means
what it meant: nobody uses a stand-in but a runtime that is asked to (HOBBIT, arXiv:2411.01433).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op, Value
from ir.ops.moe import DispatchOp, GroupedGemmOp, JoinRowsOp, StandInsOp
from ir.rewriter import PatternRewriter
from passes.clone import clone
from passes.pass_base import FunctionPass, PassContext, register_pass
from passes.quantize.split_experts import between


@register_pass
@dataclass(frozen=True)
class AddStandInsPass(FunctionPass):
    """A second copy of every expert, for `quantize` to store in the formats of another recipe."""

    name: ClassVar[str] = "add-stand-ins"

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        rewriter.pattern = self.name
        for op in list(func.walk()):
            if isinstance(op, DispatchOp):
                _add(op, rewriter)


def _add(dispatch: DispatchOp, rewriter: PatternRewriter) -> None:
    experts = dispatch.num_experts
    layer = between(dispatch) if len(dispatch.ids.users) == 1 else "the choice of experts has other readers"
    if isinstance(layer, str):
        rewriter.no_match(dispatch, layer)
        return
    combine, ops = layer
    where = dispatch.location
    used = rewriter.insert_before(dispatch, StandInsOp(dispatch.ids, num_experts=experts, location=where))
    twice = DispatchOp(used.results[0], num_experts=2 * experts, location=where)
    rewriter.replace(dispatch, twice)
    copies: dict[Value, Value] = {}
    for op in ops:
        copy = rewriter.insert_before(combine, clone(op, copies))
        if isinstance(copy, GroupedGemmOp):
            rewriter.set_attribute(copy, "first", experts)
    y = combine.operands[0]
    joined = JoinRowsOp(y, copies[y], twice.offsets, first=experts, location=combine.location)
    rewriter.insert_before(combine, joined)
    rewriter.set_operand(combine, 0, joined.joined)
