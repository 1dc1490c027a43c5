"""Structural equality of IR, with the first difference named.

Two ops are equal when they have the same name, attributes, result types and regions, and read corresponding values.
Names of values never matter; locations matter only on request.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ir.core import Block, Op, Value


@dataclass(frozen=True)
class Difference:
    """Where two pieces of IR differ first, in program order. `path` leads there: `@step / op 12 gemm.matmul`."""

    path: str
    message: str
    left: Any
    right: Any

    def __str__(self) -> str:
        return f"{self.path}: {self.message}: {_shown(self.left)} and {_shown(self.right)}"


def structural_equal(left: Op, right: Op, *, locations: bool = False) -> Difference | None:
    """None when equal, else the first differing pair. Values defined outside of both must be the very same ones."""
    pairs: dict[Value, Value] = {}
    worklist: list[tuple[Op, Op, str]] = [(left, right, _step(left, None))]
    while worklist:
        a, b, path = worklist.pop()
        found = _compare_ops(a, b, path, pairs, locations)
        if found is not None:
            return found
        pairs.update(zip(a.results, b.results, strict=True))
        inner: list[tuple[Op, Op, str]] = []
        for index, (one, two) in enumerate(zip(a.regions, b.regions, strict=True)):
            if len(one.blocks) != len(two.blocks):
                return Difference(path, f"blocks of region {index}", len(one.blocks), len(two.blocks))
            for first, second in zip(one.blocks, two.blocks, strict=True):
                types = [tuple(a.type for a in block.arguments) for block in (first, second)]
                if types[0] != types[1]:
                    return _first_difference(inner, pairs, locations) or Difference(path, "block arguments", *types)
                pairs.update(zip(first.arguments, second.arguments, strict=True))
                counts = (len(first.ops), len(second.ops))
                inner += _paired(first, second, path, min(counts))
                if counts[0] != counts[1]:
                    # the ops before the point where one block ends may differ already, which is what to report
                    return _first_difference(inner, pairs, locations) or Difference(path, "number of ops", *counts)
        worklist.extend(reversed(inner))
    return None


def _first_difference(
    pairs_of_ops: list[tuple[Op, Op, str]], pairs: dict[Value, Value], locations: bool
) -> Difference | None:
    for a, b, path in pairs_of_ops:
        found = _compare_ops(a, b, path, pairs, locations)
        if found is not None:
            return found
        pairs.update(zip(a.results, b.results, strict=True))
    return None


def _paired(first: Block, second: Block, path: str, count: int) -> list[tuple[Op, Op, str]]:
    ops = zip(first.ops[:count], second.ops[:count], strict=True)
    return [(a, b, f"{path} / {_step(a, i)}") for i, (a, b) in enumerate(ops)]


def _compare_ops(a: Op, b: Op, path: str, pairs: dict[Value, Value], locations: bool) -> Difference | None:
    """Everything but what is inside the regions."""
    if a.name != b.name:
        return Difference(path, "ops", a.name, b.name)
    if list(a.attributes) != list(b.attributes):
        return Difference(path, "names of attributes", list(a.attributes), list(b.attributes))
    for name, value in a.attributes.items():
        if not same_attribute(value, b.attributes[name]):
            return Difference(path, f"attribute '{name}'", value, b.attributes[name])
    if len(a._operands) != len(b._operands):
        return Difference(path, "number of operands", len(a._operands), len(b._operands))
    for index, (x, y) in enumerate(zip(a._operands, b._operands, strict=True)):
        if pairs.get(x, x) is not y:
            return Difference(path, f"operand {index}", x, y)
    types = [tuple(r.type for r in op.results) for op in (a, b)]
    if types[0] != types[1]:
        return Difference(path, "result types", types[0], types[1])
    if len(a.regions) != len(b.regions):
        return Difference(path, "number of regions", len(a.regions), len(b.regions))
    if locations and a.location.origin != b.location.origin:
        return Difference(path, "origins", a.location.origin, b.location.origin)
    return None


def same_attribute(left: Any, right: Any) -> bool:
    """Equality that tells 1 from 1.0 and from true, 0.0 from -0.0, and finds nan equal to nan."""
    if type(left) is not type(right):
        return False
    if type(left) is float:
        return repr(left) == repr(right)
    if type(left) is tuple:
        return len(left) == len(right) and all(map(same_attribute, left, right))
    return left == right


def _step(op: Op, index: int | None) -> str:
    name = op.attributes.get("sym_name")
    if isinstance(name, str):
        return f"@{name}"
    return op.name if index is None else f"op {index} {op.name}"


def _shown(value: Any) -> str:
    if isinstance(value, Value):
        owner = value.owner
        index = getattr(value, "index", 0)
        kind = f"result {index} of {owner.name}" if isinstance(owner, Op) else f"block argument {index}"
        return f"{kind} ({value.type})"
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(str, value)) + ")"
    return str(value)
