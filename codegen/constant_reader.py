"""Reads any part of a constant expression of graph IR without making the rest of it.

A constant expression is a tree of `tensor.constant`, `tensor.constant_stack`, `tensor.cast`, `tensor.concat`,
`tensor.slice`, `tensor.reshape`, `tensor.layout`, `quant.rotate`, of `quant.dequantize` (`codegen.packed_reader`) and
of the ops about columns (`codegen.column_reader`). `ConstantReader(value, source).read(box)` gives the elements in a
box (a half-open range along each axis), asking the checkpoint for the rows it needs and for nothing more, so that a
tensor of any size is produced in pieces. Meaning: that of the ops' references. Refuses values that are not constant
expressions and checkpoint tensors whose shape or format is not what the IR says.
"""

from __future__ import annotations

import math

import numpy as np

import codegen.column_reader
import codegen.packed_reader  # noqa: F401 - both register their ops
from codegen.constant_expression import Box, ConstantReader, TensorSource, fixed_shape, reads
from ir.diagnostics import DiagnosticError
from ir.ops.quant import RotateOp
from ir.ops.tensor_constant import ConstantStackOp

__all__ = ["Box", "ConstantReader", "TensorSource", "fixed_shape"]


@reads("tensor.constant")
def _read_constant(node: ConstantReader, box: Box) -> np.ndarray:
    return _read_tensor(node, node.op.attributes["symbol"].name, node.shape, box)


@reads("tensor.constant_stack")
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
    return node.as_asked(part)


@reads("tensor.slice")
def _read_slice(node: ConstantReader, box: Box) -> np.ndarray:
    axis, start = node.op.attributes["axis"], node.op.attributes["start"]
    first, last = box[axis]
    return node.children[0].read((*box[:axis], (start + first, start + last), *box[axis + 1 :]))


@reads("tensor.concat")
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


@reads("tensor.reshape")
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


@reads("quant.rotate", arithmetic=True)
def _read_rotate(node: ConstantReader, box: Box) -> np.ndarray:
    """Whole rows, for a rotation mixes the columns of a row."""
    rows = node.children[0].read((*box[:-1], (0, node.shape[-1])))
    rotated = RotateOp.reference(rows, block=node.op.attributes["block"])
    return node.as_asked(rotated[..., slice(*box[-1])])
