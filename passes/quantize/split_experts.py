"""Experts of one layer in several formats: those of one format become a stack, and products, of their own.

    %order, %offsets = moe.dispatch %ids      %order, %offsets = moe.dispatch %ids {places = [0, 2, 1, 3]}
    %y = experts(%x, %order, %offsets)   -->  %a = experts 0, 2 (%x, %order, %offsets) {first = 0, of = 4}
    %z = moe.combine %y, %w, %order           %b = experts 1, 3 (%x, %order, %offsets) {first = 2, of = 4}
                                              %all = moe.join_rows %a, %b, %offsets {first = 2}
                                              %z = moe.combine %all, %w, %order

Takes a step in front of its quantization, and what a recipe says of every expert; experts of which it says the same
stay together, in the order of their numbers. `quantize` then gives formats to each product by itself. What is between a
layer's dispatch and the sum of its experts' answers is copied op by op; a layer with anything else there is left as it
is, with a remark, and its experts share a format.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from itertools import accumulate
from typing import Any

from ir.core import Op, Value
from ir.ops.moe import CombineOp, DispatchOp, GroupedGemmOp, JoinRowsOp
from ir.ops.quant import AssembleOp, DequantizeOp
from ir.ops.tensor import CastOp, ConcatOp, SliceOp
from ir.ops.tensor_constant import ConstantStackOp
from ir.rewriter import PatternRewriter
from passes.analysis.constants import is_constant_expression
from passes.analysis.value_types import tensor_type
from passes.clone import clone
from passes.quantize.expert_ranges import ranges_of

Numbers = tuple[int, ...]
Said = Callable[[GroupedGemmOp, int], Hashable]  # of a product and the number of an expert


def split_experts(func: Op, said: Said, rewriter: PatternRewriter) -> dict[Op, Numbers]:
    """Splits every layer of which `said` differs among experts. Gives, by new product, the numbers of its experts."""
    found: dict[Op, Numbers] = {}
    for dispatch in list(func.walk()):
        if isinstance(dispatch, DispatchOp) and not dispatch.places:
            found.update(_split(dispatch, said, rewriter))
    return found


def _split(dispatch: DispatchOp, said: Said, rewriter: PatternRewriter) -> dict[Op, Numbers]:
    products = [op for op in dispatch.offsets.users if isinstance(op, GroupedGemmOp) and not op.stand_ins]
    if not products or not all(is_constant_expression(op.w) for op in products):
        return {}
    experts = tensor_type(products[0].w).shape[0]
    assert isinstance(experts, int)
    classes: dict[Hashable, list[int]] = {}
    for expert in range(experts):
        classes.setdefault(tuple(said(op, expert) for op in products), []).append(expert)
    if len(classes) == 1:
        return {}
    layer = between(dispatch)
    if isinstance(layer, str):
        rewriter.no_match(dispatch, layer)
        return {}
    end, ops = layer
    members = [tuple(numbers) for numbers in classes.values()]
    starts = [0, *accumulate(map(len, members))]
    place_of = {expert: place for place, expert in enumerate(e for numbers in members for e in numbers)}
    places = tuple(place_of.get(group, group) for group in range(dispatch.num_experts))  # stand-ins stay where they are
    sorted_by = DispatchOp(dispatch.ids, num_experts=dispatch.num_experts, places=places, location=dispatch.location)
    rewriter.replace(dispatch, sorted_by)
    found: dict[Op, Numbers] = {}
    joined: Value | None = None
    answer = end.operands[0]
    anchor = answer.defining_op()  # in front of it: stand-ins behind it are joined behind it
    assert anchor is not None
    for first, numbers in zip(starts, members, strict=False):
        copies: dict[Value, Value] = {}
        for op in ops:
            if isinstance(op, GroupedGemmOp):
                copies[op.w] = _some(op.w, numbers, anchor, rewriter)
            copy = rewriter.insert_before(anchor, clone(op, copies))
            if isinstance(copy, GroupedGemmOp):
                rewriter.set_attribute(copy, "of", experts)
                rewriter.set_attribute(copy, "first", first)
                found[copy] = numbers
        rows = copies[answer]
        if joined is None:
            joined = rows
        else:
            join = JoinRowsOp(joined, rows, sorted_by.offsets, first=first, location=anchor.location)
            joined = rewriter.insert_before(anchor, join).results[0]
    assert joined is not None
    rewriter.set_operand(end, 0, joined)
    for op in reversed(ops):
        rewriter.erase(op)
    return found


def between(dispatch: DispatchOp) -> tuple[CombineOp | JoinRowsOp, list[Op]] | str:
    """What takes the experts' answers, and the ops that make them from the dispatch, in order; or why the layer has
    another form. Answers are added up, or joined with those of stand-ins, which are not among the ops."""
    assert dispatch.parent is not None
    readers = [op for op in dispatch.offsets.users if not isinstance(op, JoinRowsOp)]
    if not all(isinstance(op, GroupedGemmOp) for op in readers):
        return "the groups have other readers than products"
    mine = [op for op in readers if isinstance(op, GroupedGemmOp) and not op.stand_ins]
    made = dict.fromkeys(value for op in mine for value in op.results)
    found: list[Op] = []
    for op in dispatch.parent.ops:
        if isinstance(op, (CombineOp, JoinRowsOp)) and op.operands[0] in made:
            return op, found
        if isinstance(op, CombineOp) and op.order is dispatch.order:
            return "the experts' answers are not what is added up"
        if any(value in made for value in (*op.results, *op.operands)):
            found.append(op)
            made.update(dict.fromkeys(op.results))
    return "the experts' answers are not added up"


def _some(value: Value, numbers: Numbers, before: Op, rewriter: PatternRewriter) -> Value:
    """The constant stack `value` with the experts of these numbers alone, made in front of `before`."""
    op = value.defining_op()
    assert op is not None
    if isinstance(op, ConstantStackOp):
        fewer = tensor_type(value).with_shape(len(numbers), *tensor_type(value).shape[1:])
        known = op.members or tuple(range(op.count))
        made: Op = ConstantStackOp(
            symbol=op.symbol, count=len(numbers), members=tuple(known[i] for i in numbers), result_types=[fewer],
            location=op.location,
        )  # fmt: skip
        return rewriter.insert_before(before, made).results[0]
    along = tensor_type(value).shape[0]
    stacks = all(tensor_type(v).shape[:1] == (along,) for v in op.operands)
    moved = isinstance(op, (ConcatOp, SliceOp)) and op.axis > 0
    if op.operands and stacks and (moved or isinstance(op, (CastOp, DequantizeOp, AssembleOp))):
        parts = [_some(v, numbers, before, rewriter) for v in op.operands]
        same: Any = type(op)
        return rewriter.insert_before(before, same(*parts, location=op.location, **op.attributes)).results[0]
    cuts = [
        rewriter.insert_before(before, SliceOp(value, axis=0, start=a, size=b - a + 1, location=op.location)).results[0]
        for a, b in ranges_of(numbers)
    ]
    if len(cuts) == 1:
        return cuts[0]
    return rewriter.insert_before(before, ConcatOp(*cuts, axis=0, location=op.location)).results[0]
