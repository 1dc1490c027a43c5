"""Liveness: at which step of a block a value is made and at which it is read for the last time.

An analysis: it reads the IR and changes nothing. Steps are the indices of the ops of the block; a value read inside
a nested region is read by the op of the block that holds the region. Block arguments begin at step -1 and values
nobody reads end where they begin.

Some ops give their operand under another type without moving a byte (a reshape, a new version of a cache). Those are
named by `same_memory`, and their chains are counted as one buffer, which lives from the first member to the last.
"""

from __future__ import annotations

from collections.abc import Callable

from ir.core import Block, Op, Value
from passes.schedule.arena import Lifetime

SameMemory = Callable[[Value], Value | None]


def _separate(value: Value) -> Value | None:
    return None


class Liveness:
    """First and last step of every value of `block`.

    `same_memory(value)` names the value whose bytes `value` shares, or None when it has bytes of its own.
    """

    def __init__(self, block: Block, same_memory: SameMemory = _separate) -> None:
        self.block = block
        self.steps: dict[Op, int] = {op: i for i, op in enumerate(block.ops)}
        self.values: list[Value] = [*block.arguments, *(r for op in block.ops for r in op.results)]
        self._root: dict[Value, Value] = {}
        self._first: dict[Value, int] = {}
        self._last: dict[Value, int] = {}
        for value in self.values:
            shared = same_memory(value)
            root = self._root.get(shared, shared) if shared is not None else value
            begin, end = self.first_use(value), self.last_use(value)
            self._root[value] = root
            self._first[root] = min(begin, self._first.get(root, begin))
            self._last[root] = max(end, self._last.get(root, end))

    def first_use(self, value: Value) -> int:
        """The step that makes `value`; -1 for a block argument."""
        op = value.defining_op()
        return -1 if op is None else self.steps[op]

    def last_use(self, value: Value) -> int:
        """The last step that reads `value`, not counting the values that share its memory."""
        begin = self.first_use(value)
        return max((self.step_of(user) for user, _ in value.uses), default=begin)

    def step_of(self, op: Op) -> int:
        """The step of the op of the block that is `op` or holds it. Raises ValueError for an op from elsewhere."""
        at: Op | None = op
        while at is not None and at.parent is not self.block:
            at = at.parent_op
        if at is None:
            raise ValueError(f"{op.name} ({op.location.origin}) is not inside the block")
        return self.steps[at]

    def buffer_of(self, value: Value) -> Value:
        """The value that stands for the bytes of `value`."""
        return self._root[value]

    def lifetimes(self, size: Callable[[Value], int | None]) -> list[Lifetime]:
        """One lifetime per buffer, in order of definition; `size(value)` is its bytes, None for what needs no arena."""
        found = []
        for value in self.values:
            nbytes = size(value) if self._root[value] is value else None
            if nbytes is not None:
                found.append(Lifetime(value, nbytes, self._first[value], self._last[value]))
        return found
