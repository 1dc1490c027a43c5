"""Reads any part of a constant expression of graph IR without making the rest of it.

A constant expression is a tree of `tensor.constant`, `tensor.constant_stack`, `tensor.cast`, `tensor.concat`,
`tensor.slice`, `tensor.reshape`, `tensor.layout`, `quant.rotate`, `quant.dequantize` and of the ops about columns
(`codegen.column_reader`). `ConstantReader(value, source).read(box)` gives the elements in a box (a half-open range
along each axis), asking the checkpoint for the rows it needs and for nothing more, so that a tensor of any size is
produced in pieces. Meaning: that of the ops' references. Refuses values that are not constant
expressions and checkpoint tensors whose shape or format is not what the IR says.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Protocol

import numpy as np

from codegen.column_reader import COLUMN_READERS
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import PlainFormat
from ir.ops.quant import RotateOp
from ir.ops.tensor import ConstantStackOp
from ir.types import TensorType

Box = tuple[tuple[int, int], ...]


class TensorSource(Protocol):
    """Where weights come from: a checkpoint. Read by several threads at once."""

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) along axis 0 of the tensor; the whole tensor for a scalar."""
        ...


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
        if op is None or op.name not in _READERS:
            what = op.name if op is not None else "a function argument"
            raise DiagnosticError(
                f"the weight depends on {what}, which cannot be evaluated when the artifact is built",
                where=op.location.origin if op is not None else "",
                expected="an expression of " + ", ".join([*_READERS, "tensor.cast", "tensor.layout"]),
            )
        self.op: Op = op
        self.shape, self.stored_dtype = static_type(value)
        self.casts = _without_round_trips(self.stored_dtype, casts)
        self.dtype = self.casts[-1] if self.casts else self.stored_dtype
        self.source = source
        if op.name == "quant.dequantize":
            from codegen.packed_reader import PackedReader  # which reads plain parts through this module

            self.children, self.packed = [], PackedReader(op.operands[0], source)
        else:
            below = () if op.name in _ARITHMETIC else casts
            self.children = [ConstantReader(operand, source, below) for operand in op.operands]

    def read(self, box: Box) -> np.ndarray:
        """The elements in `box`; may be a view of what the source gave. Shape: the extents of the box."""
        return _READERS[self.op.name](self, box)

    def read_all(self) -> np.ndarray:
        return self.read(tuple((0, d) for d in self.shape))

    def symbols(self) -> list[str]:
        """The checkpoint tensors behind this expression, in reading order."""
        if self.op.name == "quant.dequantize":
            return self.packed.symbols()
        if self.op.name == "tensor.constant":
            return [self.op.attributes["symbol"].name]
        if self.op.name == "tensor.constant_stack":
            assert isinstance(self.op, ConstantStackOp)
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


def _read_constant(node: ConstantReader, box: Box) -> np.ndarray:
    return _read_tensor(node, node.op.attributes["symbol"].name, node.shape, box)


def _read_stack(node: ConstantReader, box: Box) -> np.ndarray:
    assert isinstance(node.op, ConstantStackOp)
    first, last = box[0]
    parts = (_read_tensor(node, name, node.shape[1:], box[1:]) for name in node.op.symbols()[first:last])
    if last - first == 1:
        return next(parts)[np.newaxis]
    out = np.empty([b - a for a, b in box], node.dtype)
    for index, part in enumerate(parts):
        out[index] = part
    return out


def _read_tensor(node: ConstantReader, symbol: str, shape: tuple[int, ...], box: Box) -> np.ndarray:
    first, last = box[0] if box else (0, 1)
    rows = node.source.read_rows(symbol, first, last)
    expected = (last - first, *shape[1:]) if shape else ()
    if rows.shape != expected or rows.dtype != node.stored_dtype:
        raise DiagnosticError(
            f"rows {first}..{last} of the tensor came as {rows.dtype} {list(rows.shape)}",
            where=symbol,
            expected=f"{node.stored_dtype} {list(expected)}",
        )
    part = rows[(slice(None), *(slice(a, b) for a, b in box[1:]))] if box else rows
    for dtype in node.casts:
        part = part.astype(dtype)
    return part


def _read_slice(node: ConstantReader, box: Box) -> np.ndarray:
    axis, start = node.op.attributes["axis"], node.op.attributes["start"]
    first, last = box[axis]
    return node.children[0].read((*box[:axis], (start + first, start + last), *box[axis + 1 :]))


def _read_concat(node: ConstantReader, box: Box) -> np.ndarray:
    axis = node.op.attributes["axis"]
    first, last = box[axis]
    pieces = []
    offset = 0
    for child in node.children:
        size = child.shape[axis]
        low, high = max(first - offset, 0), min(last - offset, size)
        if low < high:
            pieces.append(child.read((*box[:axis], (low, high), *box[axis + 1 :])))
        offset += size
    if not pieces:
        return np.empty([b - a for a, b in box], node.dtype)
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=axis)


def _read_reshape(node: ConstantReader, box: Box) -> np.ndarray:
    """Reads the run of elements that encloses the box: leading axes of extent one, then a range, then whole axes."""
    child = node.children[0]
    extents = [b - a for a, b in box]
    if 0 in extents:
        return np.empty(extents, node.dtype)
    lead = next((i for i, extent in enumerate(extents) if extent != 1), max(len(box) - 1, 0))
    inner = math.prod(node.shape[lead + 1 :])  # elements per step of axis `lead`
    outer = 0
    for (first, _), size in zip(box[:lead], node.shape, strict=False):
        outer = outer * size + first
    low, high = box[lead] if box else (0, 1)
    start = outer * math.prod(node.shape[lead:]) + low * inner
    stop = start + (high - low) * inner
    flat = _read_run(child, start, stop)
    ranged = flat.reshape(*extents[:lead], high - low, *node.shape[lead + 1 :]) if box else flat.reshape(())
    cut = (*(slice(None) for _ in range(lead + 1)), *(slice(a, b) for a, b in box[lead + 1 :]))
    return ranged[cut] if box else ranged


def _read_run(child: ConstantReader, start: int, stop: int) -> np.ndarray:
    """Elements [start, stop) of the child in row-major order, by whole rows of its innermost axes."""
    if not child.shape:
        return child.read(()).reshape(1)
    # The deepest axis along which the run stays inside of one index of all axes before it.
    axis, step = 0, math.prod(child.shape[1:])
    prefix: list[tuple[int, int]] = []
    rest = start
    while axis + 1 < len(child.shape) and start // step == (stop - 1) // step:
        prefix.append((rest // step, rest // step + 1))
        rest %= step
        axis += 1
        start, stop = rest, rest + (stop - start)
        step //= child.shape[axis]
    low, high = start // step, -(-stop // step)
    box = (*prefix, (low, high), *((0, d) for d in child.shape[axis + 1 :]))
    return child.read(box).reshape(-1)[start - low * step : stop - low * step]


def _read_rotate(node: ConstantReader, box: Box) -> np.ndarray:
    """Whole rows, for a rotation mixes the columns of a row."""
    rows = node.children[0].read((*box[:-1], (0, node.shape[-1])))
    return _narrowed(node, RotateOp.reference(rows, block=node.op.attributes["block"]), box[-1])


def _read_dequantize(node: ConstantReader, box: Box) -> np.ndarray:
    """The matrices of a stack one by one."""
    *outer, rows, _ = box
    parts = []
    for matrix in itertools.product(*(range(first, last) for first, last in outer)):
        packed = node.packed.read_packed(matrix, rows)
        parts.append(packed.format.unpack(packed).astype(node.stored_dtype))
    whole = np.stack(parts) if outer else parts[0]
    return _narrowed(node, whole.reshape(*(b - a for a, b in box[:-1]), -1), box[-1])


def _narrowed(node: ConstantReader, rows: np.ndarray, columns: tuple[int, int]) -> np.ndarray:
    """The columns asked for, in the dtype that the node's readers get."""
    part = rows[..., columns[0] : columns[1]]
    for dtype in node.casts:
        part = part.astype(dtype)
    return part


_ARITHMETIC = ("quant.rotate", "quant.dequantize", *COLUMN_READERS)  # casts do not pass through these
_READERS: dict[str, Callable[[ConstantReader, Box], np.ndarray]] = {
    "tensor.constant": _read_constant,
    "tensor.constant_stack": _read_stack,
    "tensor.concat": _read_concat,
    "tensor.slice": _read_slice,
    "tensor.reshape": _read_reshape,
    "quant.rotate": _read_rotate,
    "quant.dequantize": _read_dequantize,
    **COLUMN_READERS,
}
