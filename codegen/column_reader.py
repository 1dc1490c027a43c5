"""Reads `quant.outlier_columns`, `quant.select_columns` and `quant.clear_columns` of constants, by the rows asked for.

Which columns are outliers depends on all rows of a weight: they are read once, a few at a time, and the answer is kept
for as long as the op lives. Meaning: that of the ops' references, bit by bit.
"""

from __future__ import annotations

import itertools
import weakref
from typing import Any

import numpy as np

from codegen.constant_expression import Box, ConstantReader, reads
from ir.core import Op
from ir.ops.quant_columns import largest_columns

_CHUNK = 1 << 21  # numbers read at a time
_known: weakref.WeakKeyDictionary[Op, tuple[Any, np.ndarray]] = weakref.WeakKeyDictionary()


@reads("quant.outlier_columns", arithmetic=True)
def _outlier_columns(node: ConstantReader, box: Box) -> np.ndarray:
    source, columns = _known.get(node.op, (None, None))
    if columns is None or source is not node.source:
        columns = largest_columns(_squares(node.children[0]), node.op.attributes["count"])
        _known[node.op] = node.source, columns
    return node.as_asked(columns[slice(*box[0])])


def _squares(weight: ConstantReader) -> np.ndarray:
    """f64 [k]: the sum of squares of every column over all rows, added up in the order of the rows."""
    *outer, n, k = weight.shape
    squares = np.zeros(k)
    step = max(1, _CHUNK // k)
    for matrix in itertools.product(*map(range, outer)):
        for first in range(0, n, step):
            last = min(first + step, n)
            rows = weight.read((*((i, i + 1) for i in matrix), (first, last), (0, k)))
            for row in rows.reshape(-1, k).astype(np.float64) ** 2:
                squares += row
    return squares


@reads("quant.select_columns", arithmetic=True)
def _select_columns(node: ConstantReader, box: Box) -> np.ndarray:
    x, columns = node.children
    chosen = columns.read((box[-1],))
    return node.as_asked(x.read((*box[:-1], (0, x.shape[-1])))[..., chosen])


@reads("quant.clear_columns", arithmetic=True)
def _clear_columns(node: ConstantReader, box: Box) -> np.ndarray:
    x, columns = node.children
    first, last = box[-1]
    cleared = columns.read_all()
    part = x.read(box).copy()
    part[..., cleared[(cleared >= first) & (cleared < last)] - first] = 0
    return node.as_asked(part)
