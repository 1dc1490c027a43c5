"""The loops of second-order rounding, compiled: each works on some rows by itself, so that threads can share them.

All take codes as levels under scales: value = scale * (code - zero), 0 <= code <= high; symmetric formats have the
middle code as their zero. Arrays are float32 and contiguous, codes uint8. Sums run in one fixed order.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from passes.quantize.jit import jit, run_in_threads

_ROWS = 16  # rows that a thread takes at least


@jit
def choose_candidates(
    values: np.ndarray, weights: np.ndarray, scales: np.ndarray, zeros: np.ndarray, high: np.float32, best: np.ndarray
) -> None:
    """`best` int32 [n]: which of `scales`, `zeros` [n, c] gives the group `values` [n, g] the least weighted error."""
    n, g = values.shape
    c = scales.shape[1]
    errors = np.empty(c, np.float32)
    inverse = np.empty(c, np.float32)
    for r in range(n):
        for i in range(c):
            s = scales[r, i]
            inverse[i] = np.float32(1.0) / s if s != 0 else np.float32(0.0)
            errors[i] = 0
        for j in range(g):
            x = values[r, j]
            weight = weights[j]
            for i in range(c):
                q = np.rint(x * inverse[i]) + zeros[r, i]
                q = min(max(q, np.float32(0.0)), high)
                e = x - (q - zeros[r, i]) * scales[r, i]
                errors[i] += weight * e * e
        at = 0
        for i in range(1, c):
            if errors[i] < errors[at]:
                at = i
        best[r] = at


@jit
def round_columns(
    block: np.ndarray,
    u: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    high: np.float32,
    codes: np.ndarray,
    errors: np.ndarray,
) -> None:
    """Codes of the columns `block` [n, b] one after another, each error spread over the columns behind it.

    `u` [b, b] is the upper factor of the inverse curvature; `scales`, `zeros` [n, b]; `errors` [n, b] gets what has to
    be spread over the columns behind the block.
    """
    n, b = block.shape
    for r in range(n):
        for i in range(b):
            s = scales[r, i]
            z = zeros[r, i]
            x = block[r, i]
            q = z
            if s != 0:
                q = min(max(np.rint(x / s) + z, np.float32(0.0)), high)
            codes[r, i] = np.uint8(q)
            e = (x - (q - z) * s) / u[i, i]
            errors[r, i] = e
            for j in range(i + 1, b):
                block[r, j] -= e * u[i, j]


@jit
def descend(
    gradient: np.ndarray,
    h: np.ndarray,
    scales: np.ndarray,
    zeros: np.ndarray,
    high: np.float32,
    codes: np.ndarray,
    sweeps: int,
) -> None:
    """Moves single codes of `codes` [n, k] to where the error is least, column by column, `sweeps` times.

    `gradient` [n, k] is (value - weight) h and stays so; `scales`, `zeros` [n, k].
    """
    n, k = codes.shape
    for r in range(n):
        for _ in range(sweeps):
            moved = False
            for i in range(k):
                s = scales[r, i]
                if s == 0 or h[i, i] <= 0:
                    continue
                old = np.float32(codes[r, i])
                q = np.rint(old - gradient[r, i] / (h[i, i] * s))
                q = min(max(q, np.float32(0.0)), high)
                if q != old:
                    moved = True
                    codes[r, i] = np.uint8(q)
                    step = (q - old) * s
                    for j in range(k):
                        gradient[r, j] += step * h[i, j]
            if not moved:
                break


def over_rows(n: int, work: Callable[[slice], None]) -> None:
    """`work(rows)` for slices that make up n rows, on several threads."""
    run_in_threads(lambda first, last: work(slice(first, last)), n, _ROWS)
