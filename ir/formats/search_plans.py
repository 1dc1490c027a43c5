"""Which scales are tried for which levels: the numbers behind rounding="mse".

The ranges hold the best scale of 99 of 100 groups of normally distributed values, from groups of 32 to whole rows,
and reach further for rows, whose largest value may be far out.
"""

from __future__ import annotations

import functools

import numpy as np

from ir.formats.least_squares import SLACK, SearchPlan
from ir.formats.plain import PlainFormat

# For levels like those of integers of so many bits (0: -1, 0, 1), for groups up to 64, up to 512, and larger ones:
# the peak of a group over the outermost level, in scales, at least and at most.
_RANGES = {
    0: ((1.3, 3.1), (1.7, 3.4), (2.4, 4.5)),
    1: ((1.9, 4.9), (2.6, 5.3), (3.6, 6.5)),
    2: ((0.8, 1.7), (1.05, 2.0), (1.4, 2.6)),
    3: ((0.78, 1.35), (0.95, 1.55), (1.25, 2.1)),
    4: ((0.78, 1.15), (0.92, 1.3), (1.12, 1.8)),
    5: ((0.8, 1.06), (0.92, 1.12), (1.05, 1.5)),
    6: ((0.8, 1.03), (0.92, 1.06), (1.0, 1.3)),
    7: ((0.85, 1.01), (0.92, 1.01), (0.97, 1.1)),
    8: ((0.85, 1.01), (0.92, 1.01), (0.97, 1.1)),
}
# The same for zero points: the smallest and the largest part of the range that is kept at each of its ends.
_SHRINK = {1: (0.3, 0.9), 2: (0.5, 1.0), 3: (0.65, 1.02), 4: (0.74, 1.04), 5: (0.82, 1.02), 6: (0.88, 1.0)}
_TRIED, _TRIED_ENDS = 8, 5  # half of the time of 12, for half a percent more squared error
_SPLITS = {"f16": 2.0**13 + 1, "bf16": 2.0**16 + 1, "f32": 0.0}


def symmetric_plan(
    levels: np.ndarray, kind: int, size: int, scale: PlainFormat, channel: PlainFormat | None = None
) -> SearchPlan:
    """For codes that stand for `levels` (in any order), in groups of `size`. `kind`: bits of integers like them, 0
    for ternary."""
    return _symmetric_plan(tuple(int(x) for x in levels), kind, size, scale, channel)


@functools.cache
def _symmetric_plan(
    levels: tuple[int, ...], kind: int, size: int, scale: PlainFormat, channel: PlainFormat | None
) -> SearchPlan:
    ordered, codes = np.unique(np.array(levels), return_index=True)
    outermost = float(np.abs(ordered).max())
    mirrored = np.array_equal(ordered, -ordered[::-1])
    least, most = _RANGES[kind][0 if size <= 64 else 1 if size <= 512 else 2]
    factors = 1.0 / (outermost * np.linspace(least, most, _TRIED))
    limit = 0 if channel is None else (255 if scale.name == "u8" else 127)
    if not mirrored and limit != 255:
        factors = np.stack([factors, -factors], axis=1).reshape(-1)
    inside = float(min(abs(ordered[0]), abs(ordered[-1])))  # levels that serve both signs
    reach = max(outermost * most, inside) * (1 + SLACK)
    low, high = _tame(channel or scale, reach, outermost * least)
    return SearchPlan(
        levels=ordered.astype(np.float32),
        codes=codes.astype(np.uint8),
        linear=bool((np.diff(ordered) == 1).all()),
        factors=factors.astype(np.float32),
        safe=np.float32(1 / inside),
        reach=np.float32(reach),
        split=np.float32(_SPLITS[scale.name] if channel is None else 0.0),
        low=low,
        high=high,
        limit=limit,
    )


@functools.cache
def zero_point_plan(bits: int, size: int, scale: PlainFormat, channel: PlainFormat | None = None) -> SearchPlan:
    """For codes that stand for 0 .. 2**bits - 1 less a zero point."""
    top = (1 << bits) - 1
    least, most = _SHRINK.get(bits, (0.93, 1.0))
    least -= 0.0 if size <= 64 else 0.05 if size <= 512 else 0.15
    reach = (top * (1 / least - 1) + 0.5) * (1 + SLACK)
    low, high = _tame(channel or scale, top / least, top / 2)
    return SearchPlan(
        levels=np.arange(top + 1, dtype=np.float32),
        codes=np.arange(top + 1, dtype=np.uint8),
        linear=True,
        factors=np.zeros(0, np.float32),
        safe=np.float32(1 / top),
        reach=np.float32(reach),
        split=np.float32(_SPLITS[scale.name] if channel is None else 0.0),
        low=low,
        high=high,
        limit=0 if channel is None else 255,
        shrink=np.linspace(most, least, _TRIED_ENDS).astype(np.float32),
    )


@functools.cache
def power_plan(levels: tuple[int, ...]) -> SearchPlan:
    """For scales that are powers of two: the smallest one that clips nothing, and its half."""
    ordered, codes = np.unique(np.array(levels), return_index=True)
    outermost = float(ordered[-1])
    return SearchPlan(
        levels=ordered.astype(np.float32),
        codes=codes.astype(np.uint8),
        linear=False,
        factors=np.array([0.5], np.float32),
        safe=np.float32(1 / outermost),
        reach=np.float32(2 * outermost * (1 + SLACK)),
        split=np.float32(0),
        low=np.float32(2.0**-40),
        high=np.float32(2.0**40),
        powers=True,
    )


def _tame(scale: PlainFormat, largest: float, smallest: float) -> tuple[np.float32, np.float32]:
    """The magnitudes of groups whose scales are normal numbers of their format and whose squares are those of f32."""
    if scale.name != "f16":
        return np.float32(2.0**-40), np.float32(2.0**40)
    return np.float32(2.0**-14 * largest * 1.01), np.float32(30000.0 * min(smallest, 1e4))


def clipped_errors(levels: np.ndarray, reach: float) -> np.ndarray:
    """f64 [codes]: how far from the level of a code a value may lie, when values reach to `reach` on both sides."""
    ordered = np.unique(levels).astype(np.float64)
    gaps = np.diff(ordered) / 2 if len(ordered) > 1 else np.zeros(1)
    below = np.concatenate([[reach + ordered[0]], gaps])
    above = np.concatenate([gaps, [reach - ordered[-1]]])
    errors = np.maximum(np.maximum(below, above), 0)
    return errors[np.searchsorted(ordered, levels)]
