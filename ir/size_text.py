"""Sizes of a step as text: `ceil(tokens, 128) * 32`. What grids of launches on GPUs are said in.

Takes whole numbers, names, `+`, `*`, `ceil(a, b)` (a / b, rounded up), `min(a, b)` and `max(a, b)`. The runtime reads
the same texts by itself (`runtime.cuda.sizes`).
"""

from __future__ import annotations

import ast
from collections.abc import Mapping

GRID_SIZES = ("tokens", "rows", "ctx", "slots", "pieces")
_FUNCTIONS = {"ceil": lambda a, b: -(-a // b), "min": min, "max": max}


def check_size(text: str) -> str:
    """What is wrong with a text, "" when it is a size."""
    try:
        evaluate_size(text, dict.fromkeys(GRID_SIZES, 1))
    except ValueError as fault:
        return str(fault)
    return ""


def evaluate_size(text: str, sizes: Mapping[str, int]) -> int:
    """The number where names stand for `sizes`. Raises ValueError for a text that is no size."""
    try:
        tree = ast.parse(text, mode="eval").body
    except SyntaxError:
        raise ValueError(f"{text!r} is no size") from None
    return _evaluate(tree, sizes, text)


def _evaluate(node: ast.expr, sizes: Mapping[str, int], text: str) -> int:
    match node:
        case ast.Constant(value=int(number)) if number is not True and number is not False and number >= 0:
            return number
        case ast.Name(id=name) if name in sizes:
            return int(sizes[name])
        case ast.BinOp(left=left, op=ast.Add() | ast.Mult(), right=right):
            a, b = _evaluate(left, sizes, text), _evaluate(right, sizes, text)
            return a + b if isinstance(node.op, ast.Add) else a * b
        case ast.Call(func=ast.Name(id=name), args=[first, second], keywords=[]) if name in _FUNCTIONS:
            a, b = _evaluate(first, sizes, text), _evaluate(second, sizes, text)
            if name == "ceil" and b <= 0:
                raise ValueError(f"{text!r} divides by {b}")
            return int(_FUNCTIONS[name](a, b))
    found = ", ".join(sizes)
    raise ValueError(f"{text!r} is no size; expected whole numbers, {found}, +, *, ceil, min and max")
