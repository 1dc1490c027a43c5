"""Moving ops into a `tensor.fused` region.

    %n = norm.rms %x, %g             %y = tensor.fused %x, %g, %w {kind = "gemm"} ({
    %y = gemm.matmul %n, %w   -->      ^(%x1, %g1, %w1):
                                         %n = norm.rms %x1, %g1
                                         %y1 = gemm.matmul %n, %w1
                                         tensor.yield %y1 })

The ops are moved, not copied, and a fused op among them is dissolved into the new one. Callers decide that the ops
may stand together; nothing is checked here but that every op is in the block of the anchor.
"""

from __future__ import annotations

from collections.abc import Sequence

from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.ops.fused import FusedOp, YieldOp
from ir.rewriter import PatternRewriter, fused_location


def outline(
    rewriter: PatternRewriter,
    kind: str,
    ops: Sequence[Op],
    results: Sequence[Value],
    *,
    anchor: Op,
    leading: Sequence[Value] | None = None,
) -> FusedOp:
    """A `tensor.fused` of `kind` that holds `ops` in this order and yields `results`, where `anchor` (one of them) was.

    Operands follow the uses in the body, one for each use, so that an operand's place tells its role. With `leading`
    (maybe empty) those values come first, in that order, and a value is passed once however often it is used; the
    first place counts when `leading` names one twice.
    """
    assert anchor.parent is not None and all(op.parent is anchor.parent for op in ops)
    inside = set(ops)
    after = anchor.parent.ops.index(anchor) + 1
    following = next(op for op in anchor.parent.ops[after:] if op not in inside)  # a terminator at the latest
    location = fused_location(*ops)
    flat, alias = _flatten(ops)
    made = {r for op in flat for r in op.results}
    uses: list[tuple[Op, int, int]] = []  # op, operand index, number of the input it reads
    inputs: list[Value] = list(leading or ())
    numbers: dict[Value, int] = {}
    for number, value in enumerate(inputs):
        numbers.setdefault(value, number)
    for op in flat:
        for index, value in enumerate(op.operands):
            source = alias.get(value, value)
            if source in made:
                if source is not value:
                    rewriter.set_operand(op, index, source)
                continue
            if leading is None or source not in numbers:
                numbers[source] = len(inputs)
                inputs.append(source)
            uses.append((op, index, numbers[source]))
    block = Block([v.type for v in inputs], [v.name_hint for v in inputs])
    for op in flat:
        rewriter.move_to_end(op, block)
    for op, index, number in uses:
        rewriter.set_operand(op, index, block.arguments[number])
    yielded = [alias.get(r, r) for r in results]
    Builder.at_end(block).insert(YieldOp(*yielded, location=location))
    fused = FusedOp(*inputs, kind=kind, regions=[Region(block)], location=location)
    rewriter.insert_before(following, fused)
    for old, new in zip(results, fused.results, strict=True):
        new.name_hint = old.name_hint
        for user, index in list(old.uses):
            if user.parent is not block:
                rewriter.set_operand(user, index, new)
    for op in ops:
        if isinstance(op, FusedOp):
            rewriter.erase(op)
    return fused


def _flatten(ops: Sequence[Op]) -> tuple[list[Op], dict[Value, Value]]:
    """The ops, fused ones replaced by what they hold, and what stands for the arguments and results of those."""
    flat: list[Op] = []
    alias: dict[Value, Value] = {}
    for op in ops:
        if not isinstance(op, FusedOp):
            flat.append(op)
            continue
        block = op.region.block
        for argument, value in zip(block.arguments, op.operands, strict=True):
            alias[argument] = alias.get(value, value)
        flat.extend(block.ops[:-1])
        for r, value in zip(op.results, block.ops[-1].operands, strict=True):
            alias[r] = alias.get(value, value)
    return flat, alias


def only_reader(value: Value, block: Block | None) -> Op | None:
    """The op of `block` that is the only one to read `value`, and reads it once; None when there is no such op."""
    if len(value.uses) != 1:
        return None
    user = value.uses[0][0]
    return user if user.parent is block else None
