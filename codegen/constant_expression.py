"""A constant expression of graph IR as a tree of readers, one for each op, and the ways to read an op by its name.

`ConstantReader(value, source)` is the root of such a tree; `read(box)` gives the elements in a box (a half-open range
along each axis). Which ops there are is up to `reads`: `codegen.constant_reader` has the movements of elements,
`codegen.column_reader` and `codegen.packed_reader` the rest. Refuses values that are no constant expressions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import PackedArray, PlainFormat
from ir.ops.tensor_constant import ConstantStackOp
from ir.types import TensorType

Box = tuple[tuple[int, int], ...]


class TensorSource(Protocol):
    """Where weights come from: a checkpoint. Read by several threads at once."""

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) along axis 0 of the tensor; the whole tensor for a scalar."""
        ...


class LowBitRows(Protocol):
    """The rows of a low-bit operand."""

    def read_packed(self, matrix: tuple[int, ...], rows: tuple[int, int]) -> PackedArray:
        """Rows of the matrix `matrix` of a stack."""
        ...

    def symbols(self) -> list[str]:
        """The checkpoint tensors behind it."""
        ...


ReadNode = Callable[["ConstantReader", Box], np.ndarray]


@dataclass(frozen=True)
class NodeKind:
    """How an op is read. `arithmetic`: casts do not pass through. `low_bit` opens its operand, where that is packed."""

    read: ReadNode
    arithmetic: bool = False
    low_bit: Callable[[Value, TensorSource], LowBitRows] | None = None


NODES: dict[str, NodeKind] = {}


def reads(
    op_name: str, *, arithmetic: bool = False, low_bit: Callable[[Value, TensorSource], LowBitRows] | None = None
) -> Callable[[ReadNode], ReadNode]:
    """Decorator: the function reads ops of this name. A second one for the same name is an error."""

    def register(function: ReadNode) -> ReadNode:
        if op_name in NODES:
            raise ValueError(f"{op_name} is read by {NODES[op_name].read.__module__} already")
        NODES[op_name] = NodeKind(function, arithmetic, low_bit)
        return function

    return register


class ConstantReader:
    """One node of the expression. `shape` is its own; `dtype` what its readers get.

    Casts are not nodes: they commute with every movement of elements, so each is carried down to the constants below
    it (`casts`, innermost first) and applied to the rows as they come. A weight that is widened to f32, joined and
    narrowed again is thereby copied without arithmetic.
    """

    def __init__(self, value: Value, source: TensorSource, casts: tuple[np.dtype, ...] = ()) -> None:
        op = value.defining_op()
        while op is not None and op.name in ("tensor.cast", "tensor.layout"):
            if op.name == "tensor.cast":
                casts = (static_type(value)[1], *casts)
            value = op.operands[0]
            op = value.defining_op()
        if op is None or op.name not in NODES:
            what = op.name if op is not None else "a function argument"
            raise DiagnosticError(
                f"the weight depends on {what}, which cannot be evaluated when the artifact is built",
                where=op.location.origin if op is not None else "",
                expected="an expression of " + ", ".join(sorted([*NODES, "tensor.cast", "tensor.layout"])),
            )
        self.op: Op = op
        self.kind = NODES[op.name]
        self.shape, self.stored_dtype = static_type(value)
        self.casts = _without_round_trips(self.stored_dtype, casts)
        self.dtype = self.casts[-1] if self.casts else self.stored_dtype
        self.source = source
        self.packed = self.kind.low_bit(op.operands[0], source) if self.kind.low_bit else None
        below = () if self.kind.arithmetic else casts
        plain = () if self.packed else op.operands
        self.children = [ConstantReader(operand, source, below) for operand in plain]

    def read(self, box: Box) -> np.ndarray:
        """The elements in `box`; may be a view of what the source gave. Shape: the extents of the box."""
        return self.kind.read(self, box)

    def read_all(self) -> np.ndarray:
        return self.read(tuple((0, d) for d in self.shape))

    def as_asked(self, part: np.ndarray) -> np.ndarray:
        """Elements in the dtype that the node's readers get."""
        for dtype in self.casts:
            part = part.astype(dtype)
        return part

    def symbols(self) -> list[str]:
        """The checkpoint tensors behind this expression, in reading order."""
        if self.packed is not None:
            return self.packed.symbols()
        if self.op.name == "tensor.constant":
            return [self.op.attributes["symbol"].name]
        if isinstance(self.op, ConstantStackOp):
            return list(self.op.symbols())
        return [name for child in self.children for name in child.symbols()]


def static_type(value: Value) -> tuple[tuple[int, ...], np.dtype]:
    """(shape, numpy dtype) of a constant; a DiagnosticError names what is not known when it is built."""
    shape = fixed_shape(value)
    assert isinstance(value.type, TensorType)
    if not isinstance(value.type.element, PlainFormat):
        raise DiagnosticError(f"a low-bit weight of type {value.type} is read as if it were plain")
    return shape, value.type.element.dtype


def fixed_shape(value: Value) -> tuple[int, ...]:
    """The sizes of a constant; a DiagnosticError names one that is not known when it is built."""
    found = value.type
    op = value.defining_op()
    if not isinstance(found, TensorType) or not all(isinstance(d, int) for d in found.shape):
        where = op.location.origin if op is not None else ""
        raise DiagnosticError(f"a weight of type {found} has no fixed size", where=where, expected="sizes in numbers")
    return tuple(int(d) for d in found.shape if isinstance(d, int))


def _without_round_trips(stored: np.dtype, casts: tuple[np.dtype, ...]) -> tuple[np.dtype, ...]:
    """`casts` less those that change no bit: to the dtype at hand, and to f32 and straight back."""
    chain = [stored]
    for dtype in casts:
        if dtype == chain[-1]:
            continue
        if len(chain) >= 2 and chain[-1] == np.float32 and dtype == chain[-2] and dtype.itemsize == 2:
            chain.pop()
        else:
            chain.append(dtype)
    return tuple(chain[1:])
