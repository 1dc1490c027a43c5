"""Constant expressions: trees of pure ops over constants, computed once when the artifact is built."""

from __future__ import annotations

from ir.core import Op, Value
from ir.traits import ConstantLike, has_trait, is_pure


def is_constant_expression(value: Value) -> bool:
    """Whether `value` depends on weights only: a cast of a concat of constants does."""
    worklist, seen = [value], {value}
    while worklist:
        op = worklist.pop().defining_op()
        if op is None or not (has_trait(op, ConstantLike) or (op._operands and is_pure(op))):
            return False
        for operand in op._operands:
            if operand not in seen:
                seen.add(operand)
                worklist.append(operand)
    return True


def constant_leaves(value: Value) -> list[Op]:
    """The constants that a constant expression is made of, in order of first use."""
    found: dict[Op, None] = {}
    worklist, seen = [value], {value}
    while worklist:
        op = worklist.pop().defining_op()
        if op is None:
            continue
        if has_trait(op, ConstantLike):
            found[op] = None
        for operand in reversed(op._operands):
            if operand not in seen:
                seen.add(operand)
                worklist.append(operand)
    return list(found)
