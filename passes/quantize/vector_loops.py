"""Product quantization, compiled: the bytes of `ir.formats.product`, vectors shared among threads.

    packed = round_vectors(format, values, "mse", table)

The format's own code with its search for the nearest entries compiled: the same operations on 32-bit floats in the
same order.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ir.formats import PackedArray
from ir.formats.product import ProductFormat
from passes.quantize.jit import jit, run_in_threads

LANES = 64


def round_vectors(format: ProductFormat, values: np.ndarray, rounding: str, table: np.ndarray | None) -> PackedArray:
    """`values` [n, k] of floats in `format`; without a table one is learned. Raises what `format.pack` raises."""
    compiled = _Compiled(format.dim, format.bits, format.scale)
    return replace(compiled.pack(values, rounding, table), format=format)


@dataclass(frozen=True)
class _Compiled(ProductFormat):
    """The format with another way to the nearest entries."""

    def nearest_entries(
        self, vectors: np.ndarray, doubled: np.ndarray, constant: np.ndarray, nearest: np.ndarray
    ) -> None:
        parts = np.ascontiguousarray(vectors)

        def work(first: int, last: int) -> None:
            _nearest(parts, doubled, constant, first, last, nearest)

        run_in_threads(work, len(parts), LANES)


@jit
def _nearest(
    vectors: np.ndarray, doubled: np.ndarray, constant: np.ndarray, first: int, last: int, nearest: np.ndarray
) -> None:
    """nearest[i] = the entry of least constant + vector . doubled, of vectors first .. last-1; the first of equals.

    LANES vectors at a time, turned: neighbouring lanes are neighbouring numbers of a register.
    """
    dim = vectors.shape[1]
    x = np.zeros((dim, LANES), np.float32)
    distance, least, at = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.int32)
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        for lane in range(count):
            for j in range(dim):
                x[j, lane] = vectors[start + lane, j]
        for lane in range(LANES):
            least[lane] = np.float32(np.inf)
            at[lane] = 0
        for entry in range(len(constant)):
            factor, base = doubled[entry, 0], constant[entry]
            for lane in range(LANES):
                distance[lane] = base + x[0, lane] * factor
            for j in range(1, dim):
                factor = doubled[entry, j]
                for lane in range(LANES):
                    distance[lane] += x[j, lane] * factor
            for lane in range(LANES):
                closer = distance[lane] < least[lane]
                least[lane] = distance[lane] if closer else least[lane]
                at[lane] = np.int32(entry) if closer else at[lane]
        for lane in range(count):
            nearest[start + lane] = at[lane]
