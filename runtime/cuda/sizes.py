"""Sizes of a step as small expressions: `ceil(tokens, 128) * 32`, `tokens * 8 + 15`, `min(tokens * 2, 64)`.

Takes a text of whole numbers, names of `SIZES`, `+`, `*`, `ceil(a, b)` (a / b, rounded up), `min(a, b)`,
`max(a, b)`; gives a frozen `SizeExpr`. The text may come from a file that nobody is trusted to have written right: it
is short, and anything else in it is refused with one RuntimeDiagnostic.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.errors import RuntimeDiagnostic

SIZES = ("tokens", "rows", "ctx", "slots", "pieces")
MOST_TEXT = 200
LARGEST = 1 << 50
_CALLS = ("ceil", "min", "max")


@dataclass(frozen=True)
class SizeExpr:
    """One expression. Texts are checked when it is made; raises RuntimeDiagnostic for what is none."""

    text: str

    def __post_init__(self) -> None:
        if len(self.text) > MOST_TEXT:
            raise _refused(self.text[:40] + "...", f"at most {MOST_TEXT} characters")
        _check(self._tree(), self.text)

    def evaluate(self, sizes: Mapping[str, int]) -> int:
        """The number where the names stand for `sizes`. Raises RuntimeDiagnostic for a name that has none, and for
        numbers above 2^50."""
        return _evaluate(self._tree(), sizes, self.text)

    def names(self) -> tuple[str, ...]:
        """The sizes that it depends on, in the order of `SIZES`."""
        found = {node.id for node in ast.walk(self._tree()) if isinstance(node, ast.Name)}
        return tuple(name for name in SIZES if name in found)

    def _tree(self) -> ast.expr:
        try:
            return ast.parse(self.text, mode="eval").body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise _refused(self.text, "an expression") from None

    def __str__(self) -> str:
        return self.text


def _refused(text: str, expected: str) -> RuntimeDiagnostic:
    return RuntimeDiagnostic(
        f"{text!r} is no size of a step",
        expected=f"{expected} of whole numbers, {', '.join(SIZES)}, +, *, ceil(a, b), min(a, b) and max(a, b)",
    )


def _check(node: ast.expr, text: str) -> None:
    if isinstance(node, ast.Constant) and type(node.value) is int and 0 <= node.value <= LARGEST:
        return
    if isinstance(node, ast.Name) and node.id in SIZES:
        return
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add | ast.Mult):
        _check(node.left, text)
        _check(node.right, text)
        return
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        if len(node.args) == 2 and not node.keywords:
            for argument in node.args:
                _check(argument, text)
            return
    raise _refused(text, "an expression")


def _evaluate(node: ast.expr, sizes: Mapping[str, int], text: str) -> int:
    if isinstance(node, ast.Constant):
        assert isinstance(node.value, int)
        return node.value
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise RuntimeDiagnostic(f"{text!r} needs the size {node.id!r}, which is not known here")
        return int(sizes[node.id])
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left, sizes, text), _evaluate(node.right, sizes, text)
        value = left + right if isinstance(node.op, ast.Add) else left * right
    else:
        assert isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        left, right = (_evaluate(argument, sizes, text) for argument in node.args)
        if node.func.id == "ceil":
            if right <= 0:
                raise RuntimeDiagnostic(f"{text!r} divides by {right}")
            value = -(-left // right)
        else:
            value = min(left, right) if node.func.id == "min" else max(left, right)
    if value > LARGEST:
        raise RuntimeDiagnostic(f"{text!r} is {value}", expected=f"at most {LARGEST}")
    return value
