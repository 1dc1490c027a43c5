"""Reads rows of a low-bit constant expression: what a checkpoint stores in parts, or floats rounded on the way.

A low-bit constant is a tree of `quant.quantize` of floats, `quant.assemble` of parts, and `tensor.concat`,
`tensor.slice`, `tensor.reshape` and `tensor.layout` along rows. A format with a learned table sees its whole matrix at
once, all others a few rows at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from codegen.constant_expression import Box, ConstantReader, TensorSource, fixed_shape, reads
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import PackedArray, PlainFormat, concatenate_packed
from ir.location import Location
from ir.ops.low_bit import has_table, scale_parts
from ir.types import TensorType
from passes.quantize.rounding import RoundedRows, round_rows

Rows = tuple[int, int]  # half-open


class PackedReader:
    """Rows of a low-bit constant [n, k], or of one matrix of a stack [E, n, k]."""

    def __init__(self, value: Value, source: TensorSource) -> None:
        op = value.defining_op()
        while op is not None and op.name == "tensor.layout":
            value = op.operands[0]
            op = value.defining_op()
        if op is None or op.name not in _READERS:
            what = op.name if op is not None else "a function argument"
            raise DiagnosticError(
                f"the low-bit weight depends on {what}, which cannot be evaluated when the artifact is built",
                where=op.location.origin if op is not None else "",
                expected="an expression of " + ", ".join([*_READERS, "tensor.layout"]),
            )
        assert isinstance(value.type, TensorType)
        self.op: Op = op
        self.format: Any = value.type.element
        self.shape = fixed_shape(value)
        low_bit = [isinstance(v.type, TensorType) and not isinstance(v.type.element, PlainFormat) for v in op.operands]
        self.packed = [PackedReader(v, source) for v, low in zip(op.operands, low_bit, strict=True) if low]
        self.plain = [ConstantReader(v, source) for v, low in zip(op.operands, low_bit, strict=True) if not low]

    @property
    def learns(self) -> bool:
        """Whether a table is learned from the whole matrix."""
        return (self.op.name == "quant.quantize" and has_table(self.format)) or any(c.learns for c in self.packed)

    def read_packed(self, matrix: tuple[int, ...], rows: Rows) -> PackedArray:
        """`read` with packed codes."""
        return _packed(self.read(matrix, rows))

    def symbols(self) -> list[str]:
        """The checkpoint tensors behind this constant, in reading order."""
        return [name for child in (*self.packed, *self.plain) for name in child.symbols()]

    def read(self, matrix: tuple[int, ...], rows: Rows) -> PackedArray | RoundedRows:
        """Rows of the matrix `matrix` (its index in a stack, or nothing). DiagnosticError for numbers without codes."""
        return _READERS[self.op.name](self, matrix, rows)


def _box(matrix: tuple[int, ...], *ranges: Rows) -> tuple[Rows, ...]:
    return (*((i, i + 1) for i in matrix), *ranges)


def _packed(found: PackedArray | RoundedRows) -> PackedArray:
    return found.packed() if isinstance(found, RoundedRows) else found


def _quantize(node: PackedReader, matrix: tuple[int, ...], rows: Rows) -> PackedArray | RoundedRows:
    k, block = node.shape[-1], _block_rows(node)
    first, last = rows[0] // block * block, min(-(-rows[1] // block) * block, node.shape[-2])
    values = node.plain[0].read(_box(matrix, (first, last), (0, k))).reshape(last - first, k)
    try:
        packed = round_rows(node.format, values, node.op.attributes["rounding"])
        return packed if block == 1 else scales_by_row(_packed(packed)).rows(rows[0] - first, rows[1] - first)
    except DiagnosticError as error:
        where = next(iter(node.plain[0].symbols()), node.op.location.origin)
        raise DiagnosticError.of(*(replace(d, location=Location(file=where)) for d in error.diagnostics)) from None


def _assemble(node: PackedReader, matrix: tuple[int, ...], rows: Rows) -> PackedArray:
    count = rows[1] - rows[0]
    codes, *parts = node.plain
    read = codes.read(_box(matrix, rows, (0, codes.shape[-1]))).reshape(count, -1)
    names = list(scale_parts(node.format, node.shape))
    given = {name: _part(node, part, name, matrix, rows) for name, part in zip(names, parts, strict=True)}
    return PackedArray.assemble(_row_format(node.format), (count, node.shape[-1]), read, **given)


def _block_rows(node: PackedReader) -> int:
    """Rows that share a scale. Blocks of them are read as one scale for each row."""
    return node.format.block_rows


def _row_format(format: Any) -> Any:
    """The format with a scale for each row of a block."""
    return replace(format, block_rows=1) if format.block_rows > 1 else format


def scales_by_row(whole: PackedArray) -> PackedArray:
    """A matrix whose blocks of rows share scales, with those scales for each row: the same numbers."""
    block, n = whole.format.block_rows, whole.codes.shape[0]
    if block == 1:
        return whole
    return replace(whole, format=_row_format(whole.format), scales=np.repeat(whole.scales, block, axis=0)[:n])


def _part(node: PackedReader, part: ConstantReader, name: str, matrix: tuple[int, ...], rows: Rows) -> np.ndarray:
    """Scales and what goes with them, for a range of rows."""
    inner = part.shape[len(matrix) :]
    if name == "table":
        return part.read(_box(matrix, *((0, d) for d in inner))).reshape(inner)
    block = _block_rows(node)
    first, last = rows[0] // block, -(-rows[1] // block)
    found = part.read(_box(matrix, (first, last), *((0, d) for d in inner[1:]))).reshape(last - first, *inner[1:])
    if block == 1:
        return found
    return np.repeat(found, block, axis=0)[rows[0] - first * block : rows[1] - first * block]


def _concat(node: PackedReader, matrix: tuple[int, ...], rows: Rows) -> PackedArray | RoundedRows:
    axis = node.op.attributes["axis"]
    if axis != len(node.shape) - 2:
        raise DiagnosticError(f"low-bit weights cannot be joined along axis {axis}", where=node.op.location.origin)
    pieces, offset = [], 0
    for child in node.packed:
        size = child.shape[-2]
        low, high = max(rows[0] - offset, 0), min(rows[1] - offset, size)
        if low < high:
            pieces.append(child.read(matrix, (low, high)))
        offset += size
    return pieces[0] if len(pieces) == 1 else concatenate_packed([_packed(p) for p in pieces])


def _slice(node: PackedReader, matrix: tuple[int, ...], rows: Rows) -> PackedArray | RoundedRows:
    start = node.op.attributes["start"]
    if node.op.attributes["axis"] == len(node.shape) - 2:
        return node.packed[0].read(matrix, (rows[0] + start, rows[1] + start))
    if len(node.shape) == 3 and node.op.attributes["axis"] == 0:
        return node.packed[0].read((matrix[0] + start,), rows)
    raise DiagnosticError("low-bit weights are cut along rows only", where=node.op.location.origin)


_READERS: dict[str, Callable[[PackedReader, tuple[int, ...], Rows], PackedArray | RoundedRows]] = {
    "quant.quantize": _quantize,
    "quant.assemble": _assemble,
    "tensor.concat": _concat,
    "tensor.slice": _slice,
}


@reads("quant.dequantize", arithmetic=True, low_bit=PackedReader)
def _read_dequantize(node: ConstantReader, box: Box) -> np.ndarray:
    """The matrices of a stack one by one."""
    *outer, rows, columns = box
    assert node.packed is not None
    parts = []
    for matrix in itertools.product(*(range(first, last) for first, last in outer)):
        packed = node.packed.read_packed(matrix, rows)
        parts.append(packed.format.unpack(packed).astype(node.stored_dtype))
    whole = np.stack(parts) if outer else parts[0]
    rows_asked = whole.reshape(*(b - a for a, b in box[:-1]), -1)
    return node.as_asked(rows_asked[..., slice(*columns)])
