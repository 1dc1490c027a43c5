"""The search of `ir.formats.least_squares`, compiled: the same operations on 32-bit floats in the same order.

Groups are taken LANES at a time and turned, so that neighbouring lanes are neighbouring numbers of a register. `work`
holds a row of LANES numbers for each thing that is known of a group. Every function has one place that calls it, or
the compiler would copy it to each.
"""

from __future__ import annotations

import numpy as np

from passes.quantize.jit import jit

LANES = 64
MAX_LEVELS = 16  # of tables; the middles of shorter ones are followed by infinities
MAGIC = np.float32(12582912.0)
ZERO, ONE = np.float32(0), np.float32(1)
Array = np.ndarray
Real = np.float32
# Rows of `work`.
PEAK, LOW, HIGH, SCALE, ZEROS, ERROR, TRY, TRY_ZERO, INVERSE, BOTTOM, TOP, SUM, BELOW, CHOSEN, OTHER = (
    i * LANES for i in range(15)
)
WORK = 15 * LANES
TAME, UNTAME, NOT_FINITE = 0, 1, 2


@jit
def search_groups(
    raw16: Array,
    raw32: Array,
    narrow: bool,
    size: int,
    first: int,
    last: int,
    mode: int,
    linear: bool,
    ranges: bool,
    powers: bool,
    limit: int,
    factors: Array,
    shrink: Array,
    middles: Array,
    levels: Array,
    bottom: Real,
    top: Real,
    safe: Real,
    reach: Real,
    split: Real,
    step: Real,
    low: Real,
    high: Real,
    order: Array,
    channel: Array,
    scales: Array,
    zeros: Array,
    state: Array,
    codes: Array,
) -> None:
    """Groups first .. last-1, each `size` values of raw16 (bf16) or raw32 (f32), as bits.

    `mode` 0: finds `scales` and `zeros`, and writes `codes`. 1: the same without codes. 2: `scales` are those found
    before; writes integers under `channel` to them, and `codes`. `state` of each group: tame, untame or not finite.
    The rest is that of `SearchPlan`; `middles` and `levels`, the lowest left out, have MAX_LEVELS - 1 entries.
    """
    bits = np.empty(size * LANES, np.uint32)
    x = bits.view(np.float32)
    work = np.empty(WORK, np.float32)
    trials = 1 + (len(shrink) * len(shrink) if ranges else len(factors))
    refined = 0 if powers else 1
    if mode == 2:
        trials, refined = 5, 0
    for start in range(first, last, LANES):
        count = min(LANES, last - start)
        _load(raw16, raw32, narrow, start, count, size, bits)
        _begin(x, size, work)
        if mode == 2:
            for lane in range(count):
                work[ZEROS + lane] = zeros[start + lane]
        else:
            _judge(bits, size, work, count, low, high, state, start)
        for trial in range(trials + refined):
            refine = trial == trials
            if refine:
                for lane in range(LANES):
                    work[TRY + lane] = work[SCALE + lane]
                    work[TRY_ZERO + lane] = work[ZEROS + lane]
            elif mode == 2:
                _integers(work, start, count, trial, channel, scales, limit)
            elif ranges:
                i, j = divmod(trial - 1, len(shrink))
                lower = shrink[i] if trial else ONE
                upper = shrink[j] if trial else ONE
                _range(work, lower, upper, safe, split, step, trial == 0, top)
            elif trial == 0:
                _clip_nothing(work, safe, split, step, powers, limit == 255)
            else:
                for lane in range(LANES):
                    work[TRY + lane] = _rounded(work[OTHER + lane] * factors[trial - 1], split)
            for once in range(2 if refine else 1):
                for lane in range(LANES):
                    scale = work[TRY + lane]
                    work[INVERSE + lane] = ZERO if scale == ZERO else ONE / scale
                    work[BOTTOM + lane] = bottom - work[TRY_ZERO + lane]
                    work[TOP + lane] = top - work[TRY_ZERO + lane]
                    work[SUM + lane] = ZERO
                    work[BELOW + lane] = ZERO
                if refine and once == 0:
                    _fit(x, size, work, linear, middles, levels, bottom)
                    for lane in range(LANES):
                        below = work[BELOW + lane]
                        work[TRY + lane] = _rounded(work[SUM + lane] / (ONE if below == ZERO else below), split)
                else:
                    if linear:
                        _measure_linear(x, size, work)
                    else:
                        _measure_table(x, size, work, middles, levels, bottom)
                    _keep(work, ranges, reach, top)
        for lane in range(count):
            scales[start + lane] = work[CHOSEN + lane] if mode == 2 else work[SCALE + lane]
            zeros[start + lane] = np.uint8(work[ZEROS + lane])
        if mode != 1:
            _write_codes(x, size, work, linear, bottom, top, middles, order, codes, start, count)


@jit
def _load(raw16: Array, raw32: Array, narrow: bool, first: int, count: int, size: int, bits: Array) -> None:
    """Groups first .. first+count-1 into bits [size, LANES] of floats; lanes behind them are zero."""
    for lane in range(LANES):
        at = (first + lane) * size
        if lane >= count:
            for j in range(size):
                bits[j * LANES + lane] = 0
        elif narrow:
            group16 = raw16[at : at + size]  # so that no index can be negative, which would be looked at each time
            for j in range(size):
                bits[j * LANES + lane] = np.uint32(group16[j]) << np.uint32(16)
        else:
            group32 = raw32[at : at + size]
            for j in range(size):
                bits[j * LANES + lane] = group32[j]


@jit
def _begin(x: Array, size: int, work: Array) -> None:
    """The first value of largest magnitude, and the range, of every lane; nothing is found yet."""
    for lane in range(LANES):
        work[PEAK + lane] = x[lane]
        work[LOW + lane] = min(x[lane], ZERO)
        work[HIGH + lane] = max(x[lane], ZERO)
        work[SCALE + lane] = ZERO
        work[ZEROS + lane] = ZERO
        work[TRY_ZERO + lane] = ZERO
        work[CHOSEN + lane] = ZERO
        work[OTHER + lane] = ZERO
        work[ERROR + lane] = np.float32(np.inf)
    for j in range(1, size):
        for lane in range(LANES):
            value = x[j * LANES + lane]
            peak = work[PEAK + lane]
            work[PEAK + lane] = value if abs(value) > abs(peak) else peak
            low, high = work[LOW + lane], work[HIGH + lane]
            work[LOW + lane] = value if value < low else low
            work[HIGH + lane] = value if value > high else high


@jit
def _judge(bits: Array, size: int, work: Array, count: int, low: Real, high: Real, state: Array, start: int) -> None:
    """Whether groups are tame. Those that are not become zeros, which harm nothing."""
    largest = work.view(np.uint32)[SUM : SUM + LANES]  # exponents
    for lane in range(LANES):
        largest[lane] = 0
    for j in range(size):
        for lane in range(LANES):
            largest[lane] = max(largest[lane], bits[j * LANES + lane] & np.uint32(0x7F800000))
    for lane in range(count):
        magnitude = abs(work[PEAK + lane])
        found = TAME if magnitude == ZERO or (magnitude >= low and magnitude <= high) else UNTAME
        if largest[lane] == np.uint32(0x7F800000):
            found = NOT_FINITE
        state[start + lane] = found
        if found != TAME:
            for j in range(size):
                bits[j * LANES + lane] = np.uint32(0)
            work[PEAK + lane] = ZERO
            work[LOW + lane] = ZERO
            work[HIGH + lane] = ZERO


# -- what is tried -----------------------------------------------------------------------------------------------------


@jit
def _rounded(scale: Real, split: Real) -> Real:
    if split == ZERO:
        return scale
    wide = scale * split
    return wide - (wide - scale)


@jit
def _rounded_up(scale: Real, split: Real, step: Real) -> Real:
    rounded = _rounded(scale, split)
    if split == ZERO or rounded >= scale:
        return rounded
    return _rounded(rounded + rounded * step, split)


@jit
def _clip_nothing(work: Array, safe: Real, split: Real, step: Real, powers: bool, unsigned: bool) -> None:
    """The smallest scales that clip nothing, to TRY; what the factors are applied to, to OTHER."""
    for lane in range(LANES):
        work[TRY + lane] = abs(work[PEAK + lane]) * safe
    if powers:
        whole = work.view(np.uint32)
        for lane in range(LANES):
            whole[TRY + lane] = (whole[TRY + lane] + np.uint32(0x7FFFFF)) & np.uint32(0x7F800000)
            work[OTHER + lane] = work[TRY + lane]
    else:
        for lane in range(LANES):
            work[TRY + lane] = _rounded_up(work[TRY + lane], split, step)
            work[OTHER + lane] = abs(work[PEAK + lane]) if unsigned else work[PEAK + lane]


@jit
def _range(
    work: Array, low_factor: Real, high_factor: Real, safe: Real, split: Real, step: Real, up: bool, top: Real
) -> None:
    """The scale and zero point of a shrunken range."""
    for lane in range(LANES):
        low = work[LOW + lane] * low_factor
        wide = (work[HIGH + lane] * high_factor - low) * safe
        scale = _rounded_up(wide, split, step) if up else _rounded(wide, split)
        work[TRY + lane] = scale
        zero = -low * (ZERO if scale == ZERO else ONE / scale)
        zero = zero if zero < top else top
        work[TRY_ZERO + lane] = (zero + MAGIC) - MAGIC


@jit
def _integers(work: Array, start: int, count: int, trial: int, channel: Array, scales: Array, limit: int) -> None:
    """Integer scales under the channel scales, near those that were found without: 0, -1, +1, -2, +2 beside them."""
    most = np.float32(limit)
    offset = np.float32((trial + 1) // 2 * (1 - 2 * (trial % 2)))
    for lane in range(LANES):
        over = channel[start + lane] if lane < count else ZERO
        found = scales[start + lane] if lane < count else ZERO
        near = found / (ONE if over == ZERO else over)
        near = near if near > -most else -most
        near = near if near < most else most
        tried = ((near + MAGIC) - MAGIC) + offset
        scale = over * tried if abs(tried) <= most else ZERO
        if tried == ZERO or (limit == 255 and tried < ZERO):
            scale = ZERO
        work[TRY + lane] = scale
        work[TRY_ZERO + lane] = work[ZEROS + lane]
        work[OTHER + lane] = tried


# -- what it is worth --------------------------------------------------------------------------------------------------


@jit
def _measure_linear(x: Array, size: int, work: Array) -> None:
    """Squared distances to the nearest integers, to SUM."""
    for j in range(size):
        for lane in range(LANES):
            quotient = x[j * LANES + lane] * work[INVERSE + lane]
            low, high = work[BOTTOM + lane], work[TOP + lane]
            clipped = quotient if quotient > low else low
            clipped = clipped if clipped < high else high
            distance = quotient - ((clipped + MAGIC) - MAGIC)
            work[SUM + lane] += distance * distance


@jit
def _measure_table(x: Array, size: int, work: Array, m: Array, levels: Array, lowest: Real) -> None:
    """Squared distances to the levels of a table, to SUM. The comparisons are written out: they stay in registers."""
    m0, m1, m2, m3, m4, m5, m6, m7 = m[0], m[1], m[2], m[3], m[4], m[5], m[6], m[7]
    m8, m9, m10, m11, m12, m13, m14 = m[8], m[9], m[10], m[11], m[12], m[13], m[14]
    v0, v1, v2, v3, v4, v5, v6, v7 = (
        levels[0], levels[1], levels[2], levels[3], levels[4], levels[5], levels[6], levels[7]
    )  # fmt: skip
    v8, v9, v10, v11, v12, v13, v14 = levels[8], levels[9], levels[10], levels[11], levels[12], levels[13], levels[14]
    for j in range(size):
        for lane in range(LANES):
            q = x[j * LANES + lane] * work[INVERSE + lane]
            level = v0 if q > m0 else lowest
            level = v1 if q > m1 else level
            level = v2 if q > m2 else level
            level = v3 if q > m3 else level
            level = v4 if q > m4 else level
            level = v5 if q > m5 else level
            level = v6 if q > m6 else level
            level = v7 if q > m7 else level
            level = v8 if q > m8 else level
            level = v9 if q > m9 else level
            level = v10 if q > m10 else level
            level = v11 if q > m11 else level
            level = v12 if q > m12 else level
            level = v13 if q > m13 else level
            level = v14 if q > m14 else level
            distance = q - level
            work[SUM + lane] += distance * distance


@jit
def _keep(work: Array, ranges: bool, reach: Real, top: Real) -> None:
    """Takes over what is better and clips no more than it may."""
    for lane in range(LANES):
        scale, zero = work[TRY + lane], work[TRY_ZERO + lane]
        error = work[SUM + lane] * (scale * scale)
        if ranges:
            inverse = work[INVERSE + lane]
            over = work[HIGH + lane] * inverse - (top - zero)
            under = -(work[LOW + lane] * inverse) - zero
            fits = scale > ZERO and over <= reach and under <= reach
        else:
            fits = abs(work[PEAK + lane]) <= reach * abs(scale)
        if fits and error < work[ERROR + lane]:
            work[ERROR + lane] = error
            work[SCALE + lane] = scale
            work[ZEROS + lane] = zero
            work[CHOSEN + lane] = work[OTHER + lane]


@jit
def _fit(x: Array, size: int, work: Array, linear: bool, middles: Array, levels: Array, lowest: Real) -> None:
    """Sums of value * level, to SUM, and of level**2, to BELOW."""
    for j in range(size):
        for lane in range(LANES):
            value = x[j * LANES + lane]
            quotient = value * work[INVERSE + lane]
            if linear:
                low, high = work[BOTTOM + lane], work[TOP + lane]
                clipped = quotient if quotient > low else low
                clipped = clipped if clipped < high else high
                level = (clipped + MAGIC) - MAGIC
            else:
                level = lowest
                for i in range(MAX_LEVELS - 1):
                    level = levels[i] if quotient > middles[i] else level
            work[SUM + lane] += value * level
            work[BELOW + lane] += level * level


@jit
def _write_codes(
    x: Array,
    size: int,
    work: Array,
    linear: bool,
    bottom: Real,
    top: Real,
    middles: Array,
    order: Array,
    codes: Array,
    start: int,
    count: int,
) -> None:
    """The numbers of the levels take the place of `x`, then go to `codes` group by group."""
    for lane in range(LANES):
        scale, zero = work[SCALE + lane], work[ZEROS + lane]
        work[INVERSE + lane] = ZERO if scale == ZERO else ONE / scale
        work[BOTTOM + lane] = bottom - zero
        work[TOP + lane] = top - zero
    for j in range(size):
        for lane in range(LANES):
            quotient = x[j * LANES + lane] * work[INVERSE + lane]
            if linear:
                low, high = work[BOTTOM + lane], work[TOP + lane]
                clipped = quotient if quotient > low else low
                clipped = clipped if clipped < high else high
                level = ((clipped + MAGIC) - MAGIC) + work[ZEROS + lane] - bottom
                x[j * LANES + lane] = level
            else:
                index = ZERO
                for i in range(MAX_LEVELS - 1):
                    index += ONE if quotient > middles[i] else ZERO
                x[j * LANES + lane] = index
    for lane in range(count):
        group = codes[(start + lane) * size : (start + lane + 1) * size]
        for j in range(size):
            group[j] = order[np.uint8(np.int32(x[j * LANES + lane]))]
