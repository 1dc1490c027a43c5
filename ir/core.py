"""The graph of the IR: values, ops, blocks, regions, modules, and their use-def links.

`Value` and `Op` compare by identity; `Type` and attributes compare by structure. Nothing outside `ir.builder` and
`ir.rewriter` changes a graph that has been built: the underscored methods here are theirs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from ir.location import NOWHERE, Location
from ir.types import Type


class Value:
    """An SSA value: an op's result or a block's argument. `uses` lists (op, operand index) in order of creation."""

    __slots__ = ("name_hint", "type", "uses")

    def __init__(self, type: Type, name_hint: str = "") -> None:
        self.type = type
        self.name_hint = name_hint
        self.uses: list[tuple[Op, int]] = []

    @property
    def owner(self) -> Op | Block:
        raise TypeError("a bare Value has no owner")

    @property
    def users(self) -> tuple[Op, ...]:
        """The distinct ops that read this value, in order of first use."""
        return tuple(dict.fromkeys(op for op, _ in self.uses))

    def has_one_use(self) -> bool:
        return len(self.uses) == 1

    def defining_op(self) -> Op | None:
        """The op that makes this value; None for a block argument."""
        owner = self.owner
        return owner if isinstance(owner, Op) else None


class OpResult(Value):
    """Result `index` of `op`."""

    __slots__ = ("index", "op")

    def __init__(self, op: Op, index: int, type: Type) -> None:
        self.type = type
        self.name_hint = ""
        self.uses = []
        self.op = op
        self.index = index

    @property
    def owner(self) -> Op:
        return self.op


class BlockArgument(Value):
    """Argument `index` of `block`."""

    __slots__ = ("block", "index")

    def __init__(self, block: Block, index: int, type: Type, name_hint: str = "") -> None:
        super().__init__(type, name_hint)
        self.block = block
        self.index = index

    @property
    def owner(self) -> Block:
        return self.block


class Op:
    """Base of every op. Subclasses declare fields (see `ir.op_def`); this class holds the links.

    `operands`, `results`, `attributes` (declared order) and `regions` are read-only to everybody but builder and
    rewriter. `location` keeps the origin in the model.
    """

    name: ClassVar[str] = ""

    def __init__(
        self,
        operands: Sequence[Value] = (),
        result_types: Sequence[Type] = (),
        attributes: dict[str, Any] | None = None,
        regions: Sequence[Region] = (),
        location: Location | None = None,
    ) -> None:
        self._operands: list[Value] = []
        self.attributes: dict[str, Any] = dict(attributes) if attributes else {}
        self.results: tuple[OpResult, ...] = tuple([OpResult(self, i, t) for i, t in enumerate(result_types)])
        self.regions: tuple[Region, ...] = tuple(regions)
        self.location = location or NOWHERE
        self.parent: Block | None = None
        for region in self.regions:
            region.parent = self
        for value in operands:
            self._append_operand(value)

    @property
    def operands(self) -> tuple[Value, ...]:
        return tuple(self._operands)

    @property
    def result(self) -> OpResult:
        """The only result."""
        if len(self.results) != 1:
            raise ValueError(f"{self.name} has {len(self.results)} results, not one")
        return self.results[0]

    @property
    def region(self) -> Region:
        """The only region."""
        if len(self.regions) != 1:
            raise ValueError(f"{self.name} has {len(self.regions)} regions, not one")
        return self.regions[0]

    @property
    def parent_op(self) -> Op | None:
        """The op whose region holds this op."""
        return self.parent.parent_op if self.parent else None

    def walk(self) -> Iterator[Op]:
        """This op and every op nested in it, parents first. The ops met may be erased while walking."""
        worklist: list[Op] = [self]
        while worklist:
            op = worklist.pop()
            yield op
            for region in reversed(op.regions):
                for block in reversed(region.blocks):
                    worklist.extend(reversed(block.ops))

    def _append_operand(self, value: Value) -> None:
        value.uses.append((self, len(self._operands)))
        self._operands.append(value)

    def _set_operand(self, index: int, value: Value) -> None:
        old = self._operands[index]
        old.uses.remove((self, index))
        self._operands[index] = value
        value.uses.append((self, index))

    def _drop_operands(self) -> None:
        for index, value in enumerate(self._operands):
            value.uses.remove((self, index))
        self._operands = []

    def __repr__(self) -> str:
        return f"<{self.name} {self.location.origin}>"


class Block:
    """Ops in order, with typed arguments."""

    def __init__(self, argument_types: Sequence[Type] = (), names: Sequence[str] = ()) -> None:
        hints = list(names) + [""] * (len(argument_types) - len(names))
        self.arguments: tuple[BlockArgument, ...] = tuple(
            BlockArgument(self, i, t, h) for i, (t, h) in enumerate(zip(argument_types, hints, strict=True))
        )
        self.ops: list[Op] = []
        self.parent: Region | None = None

    @property
    def parent_op(self) -> Op | None:
        return self.parent.parent if self.parent else None

    @property
    def terminator(self) -> Op | None:
        """The last op."""
        return self.ops[-1] if self.ops else None

    def _insert(self, index: int, op: Op) -> None:
        if op.parent is not None:
            raise ValueError(f"{op.name} is in a block already")
        op.parent = self
        self.ops.insert(index, op)

    def _remove(self, op: Op) -> None:
        self.ops.remove(op)
        op.parent = None

    def _append_argument(self, type: Type, name_hint: str = "") -> BlockArgument:
        argument = BlockArgument(self, len(self.arguments), type, name_hint)
        self.arguments = (*self.arguments, argument)
        return argument


class Region:
    """Blocks belonging to an op. Structured control flow only: every region here has exactly one block."""

    def __init__(self, *blocks: Block) -> None:
        self.blocks: tuple[Block, ...] = blocks
        self.parent: Op | None = None
        for block in blocks:
            block.parent = self

    @property
    def block(self) -> Block:
        """The only block."""
        if len(self.blocks) != 1:
            raise ValueError(f"the region has {len(self.blocks)} blocks, not one")
        return self.blocks[0]
