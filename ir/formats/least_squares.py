"""The scales whose squared error is least: what rounding="mse" means, in numpy.

For every group of values a few scales are tried: the value of largest magnitude divided by factors around that of the
outermost level, with both signs where the levels are not symmetric (so that the one level more on the negative side
serves whichever sign is larger), and the smallest scale that clips nothing. The best one is refined once by least
squares for the codes it gave, sum(x * level) / sum(level**2). With zero points, shrunken ranges are tried.
Two levels of scales: first without rounding; then, under the channel scale that holds the largest, the five integers
around each. Of equals the first one wins.

Everything is 32-bit floats without fused operations, and sums run over the elements of a group in order, so that the
compiled form (`passes.quantize.rounding`) gives the same bits. Groups whose magnitude lies outside of `SearchPlan.low`
to `high`, where such sums would lose digits, are left to the nearest rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIRST_MAGIC = np.float32(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer
SLACK = 2.0**-8  # scales are rounded to as few as 8 bits after they were chosen within the reach
NEIGHBOURS = (0, -1, 1, -2, 2)  # integers tried around a scale of the first level under a channel scale


@dataclass(frozen=True)
class SearchPlan:
    """What is searched. `levels` ascend; `codes` u8 are their codes; `linear` if the levels are all of lo, lo+1 .. hi.

    - `factors` f32: signed; the scales tried are the peak of a group times each of them (of a power of two: the
      smallest one that clips nothing times each of them);
    - `safe`: |peak| * safe is a scale that clips nothing;
    - `reach`: scales with |peak| > reach * |scale| are not taken: the error bound of the format;
    - `split`: 2**n + 1 rounds scales to 24 - n bits (Veltkamp); 0 leaves them;
    - `limit` of integer scales under a channel scale: 255 or 127 (which has signs), 0 without;
    - `shrink` f32: factors of the lower and of the upper end of a range, for zero points.
    """

    levels: np.ndarray
    codes: np.ndarray
    linear: bool
    factors: np.ndarray
    safe: np.float32
    reach: np.float32
    split: np.float32
    low: np.float32
    high: np.float32
    limit: int = 0
    powers: bool = False
    shrink: np.ndarray | None = None

    @property
    def middles(self) -> np.ndarray:
        """f32: what lies between neighbouring levels; equal distances go to the lower one."""
        return ((self.levels[1:] + self.levels[:-1]) * np.float32(0.5)).astype(np.float32)


def round_scale(scale: np.ndarray, split: np.float32) -> np.ndarray:
    """f32 rounded to the digits of the format."""
    if split == 0:
        return scale
    wide = scale * split
    return wide - (wide - scale)


def round_scale_up(scale: np.ndarray, split: np.float32) -> np.ndarray:
    """f32 >= 0, not below `scale`."""
    if split == 0:
        return scale
    rounded = round_scale(scale, split)
    step = np.float32(0.75) / (np.float32(1 << 23) / (split - np.float32(1)))  # 3/4 of a unit in the last place
    return np.where(rounded < scale, round_scale(rounded + rounded * step, split), rounded)


def inverse(scale: np.ndarray) -> np.ndarray:
    """f32 1 / scale, 0 for 0."""
    return np.where(scale == 0, np.float32(0), np.float32(1) / np.where(scale == 0, np.float32(1), scale))


def peaks(x: np.ndarray) -> np.ndarray:
    """f32 [groups]: the first value of largest magnitude of x [size, groups]."""
    return np.take_along_axis(x, np.abs(x).argmax(axis=0)[None], axis=0)[0]


class GroupSearch:
    """Groups x f32 [size, groups], all within the range of the plan or zero."""

    def __init__(self, plan: SearchPlan, x: np.ndarray) -> None:
        self.plan, self.x = plan, x
        count = x.shape[1]
        self.peak = peaks(x)
        self.scale = np.zeros(count, np.float32)
        self.zero = np.zeros(count, np.float32)
        self.error = np.full(count, np.inf, np.float32)
        self.lowest = np.minimum(x.min(axis=0), np.float32(0))
        self.highest = np.maximum(x.max(axis=0), np.float32(0))

    # -- one scale for each group

    def levels_of(self, scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(quotients, levels) f32 [size, groups]; levels are numbers of the plan, less the zero point."""
        quotient = self.x * inverse(scale)
        if self.plan.linear:
            lo, hi = self.plan.levels[0] - zero, self.plan.levels[-1] - zero
            clipped = np.minimum(np.maximum(quotient, lo), hi)
            return quotient, (clipped + FIRST_MAGIC) - FIRST_MAGIC
        return quotient, self.plan.levels[np.searchsorted(self.plan.middles, quotient, side="left")]

    def attempt(self, scale: np.ndarray, zero: np.ndarray) -> None:
        """Keeps the scales that are better than what there is."""
        quotient, level = self.levels_of(scale, zero)
        distance = quotient - level
        total = np.zeros_like(scale)
        for row in distance * distance:
            total = total + row
        error = total * (scale * scale)
        fits = self.fits(scale, zero) & (error < self.error)
        self.error = np.where(fits, error, self.error)
        self.scale, self.zero = np.where(fits, scale, self.scale), np.where(fits, zero, self.zero)

    def fits(self, scale: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """Whether nothing is clipped by more than the error bound allows."""
        if self.plan.shrink is None:
            return np.abs(self.peak) <= self.plan.reach * np.abs(scale)
        inv, top = inverse(scale), self.plan.levels[-1]
        over = self.highest * inv - (top - zero)
        under = -(self.lowest * inv) - zero
        return (scale > 0) & (over <= self.plan.reach) & (under <= self.plan.reach)

    def refine(self) -> None:
        """The scale of least squares for the levels that were found."""
        _, level = self.levels_of(self.scale, self.zero)
        above, below = np.zeros_like(self.scale), np.zeros_like(self.scale)
        for x, lev in zip(self.x, level, strict=True):
            above = above + x * lev
            below = below + lev * lev
        scale = above / np.where(below == 0, np.float32(1), below)
        self.attempt(round_scale(scale, self.plan.split), self.zero)

    # -- all that are tried

    def run(self) -> None:
        """Finds `scale` and `zero`."""
        plan = self.plan
        if plan.shrink is not None:
            self._ranges(plan.shrink)
        else:
            base, safe = self.peak, round_scale_up(np.abs(self.peak) * plan.safe, plan.split)
            if plan.powers:
                base = safe = power_of_two_up(np.abs(self.peak) * plan.safe)
            self.attempt(safe, self.zero)
            sign = np.sign(base) if plan.limit == 255 else np.float32(1)  # integer scales without sign
            for factor in plan.factors:
                self.attempt(round_scale(base * factor * sign, plan.split), self.zero)
        if not plan.powers:
            self.refine()

    def _ranges(self, shrink: np.ndarray) -> None:
        plan = self.plan
        top = plan.levels[-1]
        self._range(round_scale_up((self.highest - self.lowest) * plan.safe, plan.split), self.lowest, top)
        for lower in shrink:
            for upper in shrink:
                low = self.lowest * lower
                self._range(round_scale((self.highest * upper - low) * plan.safe, plan.split), low, top)

    def _range(self, scale: np.ndarray, low: np.ndarray, top: np.float32) -> None:
        zero = (np.minimum(-low * inverse(scale), top) + FIRST_MAGIC) - FIRST_MAGIC
        self.attempt(scale, zero)

    def run_integers(self, channel: np.ndarray, first: np.ndarray, zero: np.ndarray) -> np.ndarray:
        """f32 integers u, so that channel * u (f32) are the scales, near the scales `first`."""
        limit = np.float32(self.plan.limit)
        near = first / np.where(channel == 0, np.float32(1), channel)
        near = (np.minimum(np.maximum(near, -limit), limit) + FIRST_MAGIC) - FIRST_MAGIC
        chosen = np.zeros_like(near)
        self.zero = zero
        for offset in NEIGHBOURS:
            tried = near + np.float32(offset)
            scale = np.where(np.abs(tried) <= limit, channel * tried, np.float32(0))
            if self.plan.limit == 255:
                scale = np.where(tried < 0, np.float32(0), scale)
            before = self.error
            self.attempt(np.where(tried == 0, np.float32(0), scale), zero)
            chosen = np.where(self.error < before, tried, chosen)
        return chosen

    def codes(self) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 codes [size, groups], uint8 zero points [groups])."""
        quotient, level = self.levels_of(self.scale, self.zero)
        if self.plan.linear:
            index = level + self.zero - self.plan.levels[0]
            return self.plan.codes[index.astype(np.uint8)], self.zero.astype(np.uint8)
        return self.plan.codes[np.searchsorted(self.plan.middles, quotient, side="left")], self.zero.astype(np.uint8)


def power_of_two_up(values: np.ndarray) -> np.ndarray:
    """f32: the smallest powers of two that are not below `values` (> 0); 0 for 0."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)).view(np.float32)
