"""The rounding of `ir.formats.fp8`, compiled: the bytes of `FP8Format.pack`, blocks shared among threads.

    packed = round_float8(format, values, "mse")

Candidates for the scales are made in numpy, as there; each block is then rounded with all of them. Squared errors are
added up in numpy's order (rows one after another, columns by pairs of halves), so that the same candidate wins.
What cannot be stored goes to `FP8Format.pack`, which says why.
"""

from __future__ import annotations

import numpy as np

from ir.formats import F8E4M3, FP8Format, PackedArray
from passes.quantize.jit import jit, run_in_threads

_RUN = 128  # numbers that numpy adds up without halving


def round_float8(format: FP8Format, values: np.ndarray, rounding: str) -> PackedArray:
    """`values` [n, k] of floats in `format`. Raises what `format.pack` raises."""
    wide = values if values.dtype == np.float64 else values.astype(np.float32)
    if not np.isfinite(wide).all():
        return format.pack(values, rounding)
    n, k = wide.shape
    rows, columns = format.block_rows, format.block_cols or k
    down, across = np.arange(0, n, rows), np.arange(0, k, columns)
    extent = np.maximum.reduceat(np.maximum.reduceat(np.abs(wide), down, axis=0), across, axis=1).astype(np.float64)
    candidates = format.scales_tried(extent, rounding)
    if not np.isfinite(candidates[0].astype(np.float64)).all():
        return format.pack(values, rounding)
    divisors = candidates.astype(np.float64)
    worth = np.arange(256, dtype=np.uint8).view(format.element.dtype).astype(np.float64)
    codes, chosen = np.zeros((n, k), np.uint8), np.zeros(extent.shape, np.int64)
    e4m3 = format.element == F8E4M3

    def work(first: int, last: int) -> None:
        _round_blocks(wide, divisors, worth, rows, columns, first, last, format.largest, e4m3, codes, chosen)

    run_in_threads(work, extent.size, 1)
    scales = np.take_along_axis(candidates, chosen[None], axis=0)[0]
    return PackedArray(format, (n, k), codes, scales)


@jit
def _round_blocks(
    wide: np.ndarray,
    divisors: np.ndarray,
    worth: np.ndarray,
    rows: int,
    columns: int,
    first: int,
    last: int,
    largest: float,
    e4m3: bool,
    codes: np.ndarray,
    chosen: np.ndarray,
) -> None:
    """Blocks first .. last-1, row by row: codes, and which of the divisors [candidates, down, across] is best."""
    n, k = wide.shape
    across = divisors.shape[2]
    tried = np.empty((rows, columns), np.uint8)
    errors = np.empty(columns, np.float64)
    for block in range(first, last):
        i, j = divmod(block, across)
        top, left = i * rows, j * columns
        height, width = min(rows, n - top), min(columns, k - left)
        least = np.inf
        for candidate in range(divisors.shape[0]):
            scale = divisors[candidate, i, j]
            divisor = 1.0 if scale == 0 else scale
            errors[:width] = 0.0
            for row in range(height):
                for column in range(width):
                    value = np.float64(wide[top + row, left + column])
                    code = _code(np.float32(min(max(value / divisor, -largest), largest)), e4m3)
                    tried[row, column] = code
                    error = value - worth[code] * scale
                    errors[column] += error * error
            total = errors[0] + _sum(errors, 1, width - 1)
            if candidate == 0 or total < least:
                least = total
                chosen[i, j] = candidate
                for row in range(height):
                    for column in range(width):
                        codes[top + row, left + column] = tried[row, column]


@jit
def _code(narrow: np.float32, e4m3: bool) -> np.uint8:
    """The nearest element to a number within their range, ties to even. f32: so ml_dtypes converts f64, too."""
    x = np.float64(narrow)
    bits = x.view(np.uint64)
    magnitude = bits & np.uint64(0x7FFFFFFFFFFFFFFF)
    low = np.uint64(49 if e4m3 else 50)  # bits of the mantissa that are cut off
    bias = np.uint64((1023 - 7) << 3 if e4m3 else (1023 - 15) << 2)
    half = (np.uint64(1) << (low - np.uint64(1))) - np.uint64(1)
    rounded = (magnitude + half + ((magnitude >> low) & np.uint64(1))) >> low
    smallest, steps = (2.0**-6, 2.0**9) if e4m3 else (2.0**-14, 2.0**16)
    code = np.uint64(np.rint(abs(x) * steps)) if abs(x) < smallest else rounded - bias
    return np.uint8(code | ((bits >> np.uint64(63)) << np.uint64(7)))


@jit
def _sum(x: np.ndarray, first: int, count: int) -> float:
    """x[first] + ... in the order of numpy: the sums of both halves of what is longer than a run.

    A stack in place of recursion, which numba cannot take from its cache.
    """
    begin, length, done = np.empty(64, np.int64), np.empty(64, np.int64), np.zeros(64, np.int64)
    left = np.empty(64, np.float64)
    depth, total = 0, 0.0
    begin[0], length[0] = first, count
    while depth >= 0:
        half = length[depth] // 2
        half -= half % 8
        if length[depth] <= _RUN:
            total = _sum_of_run(x, begin[depth], length[depth])
            depth -= 1
        elif done[depth] == 0:  # the left half comes next
            done[depth] = 1
            depth += 1
            begin[depth], length[depth], done[depth] = begin[depth - 1], half, 0
        elif done[depth] == 1:
            left[depth], done[depth] = total, 2
            depth += 1
            begin[depth], length[depth], done[depth] = begin[depth - 1] + half, length[depth - 1] - half, 0
        else:
            total = left[depth] + total
            depth -= 1
    return total


@jit
def _sum_of_run(x: np.ndarray, first: int, count: int) -> float:
    """Of at most _RUN numbers: eight sums side by side."""
    if count < 8:
        total = 0.0
        for i in range(first, first + count):
            total += x[i]
        return total
    a, b, c, d = x[first], x[first + 1], x[first + 2], x[first + 3]
    e, f, g, h = x[first + 4], x[first + 5], x[first + 6], x[first + 7]
    whole = count - count % 8
    for i in range(first + 8, first + whole, 8):
        a += x[i]
        b += x[i + 1]
        c += x[i + 2]
        d += x[i + 3]
        e += x[i + 4]
        f += x[i + 5]
        g += x[i + 6]
        h += x[i + 7]
    total = ((a + b) + (c + d)) + ((e + f) + (g + h))
    for i in range(first + whole, first + count):
        total += x[i]
    return total
