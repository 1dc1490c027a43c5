"""Rounding of weights to low-bit formats, fast: the bytes that `format.pack` defines, on all cores.

    packed = quantize_rows(format, values, rounding="mse")

Formats under scales with rounding="mse" take the compiled search (`passes.quantize.rounding_loops`); FP8 and product
quantization have loops of their own (`float8_loops`, `vector_loops`). Nearest rounding under scales goes to
`format.pack`, and so do the rows with groups too small or too large for the search, and a few values.
Raises what `format.pack` raises: numbers that are not finite, by row and column, and numbers too large for a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.formats import BF16, ROUNDINGS, FP8Format, PackedArray, ScaledFormat
from ir.formats.bit_packing import pack_codes
from ir.formats.least_squares import SearchPlan
from ir.formats.product import ProductFormat
from passes.quantize.jit import run_in_threads

_FEW = 1 << 12  # values for which compiled code need not be loaded


@dataclass(frozen=True)
class RoundedRows:
    """Rows in a format under scales, their codes and zero points not bit-packed yet: what strips are made of.

    `codes` u8 [n, k], `scales` [n, groups], `zeros` u8 [n, groups], `channel` [n], `table` int8 as in a PackedArray.
    """

    format: ScaledFormat
    shape: tuple[int, int]
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    channel: np.ndarray | None
    table: np.ndarray | None

    def code_array(self) -> np.ndarray:
        return self.codes

    def zero_array(self) -> np.ndarray:
        assert self.zeros is not None
        return self.zeros

    def rows(self, first: int, last: int) -> RoundedRows:
        """Rows [first, last)."""
        zeros = self.zeros[first:last] if self.zeros is not None else None
        channel = self.channel[first:last] if self.channel is not None else None
        cut = self.codes[first:last], self.scales[first:last], zeros, channel, self.table
        return RoundedRows(self.format, (last - first, self.shape[1]), *cut)

    def packed(self) -> PackedArray:
        """The same with packed codes."""
        zeros = pack_codes(self.zeros, self.format.bits) if self.zeros is not None else None
        codes = pack_codes(self.codes, self.format.bits)
        return PackedArray(self.format, self.shape, codes, self.scales, zeros, self.channel, self.table)


def quantize_rows(
    format: Any, values: np.ndarray, rounding: str = "mse", table: np.ndarray | None = None
) -> PackedArray:
    """`values` [rows, k], f32, bf16 or f16, in `format`; the same bytes as `format.pack(values, rounding, table)`.

    `table` int8: the levels of a format that learns them, in place of learning.
    """
    found = round_rows(format, values, rounding, table)
    return found.packed() if isinstance(found, RoundedRows) else found


def round_rows(
    format: Any, values: np.ndarray, rounding: str = "mse", table: np.ndarray | None = None
) -> PackedArray | RoundedRows:
    """`quantize_rows` for callers that would unpack the codes again: they are packed only where `format.pack` did."""
    few = values.ndim != 2 or values.size < _FEW
    if isinstance(format, FP8Format) and not few and rounding in ROUNDINGS:
        from passes.quantize.float8_loops import round_float8  # numba takes a while to import

        return round_float8(format, values, rounding)
    if isinstance(format, ProductFormat) and not few:
        from passes.quantize.vector_loops import round_vectors

        return round_vectors(format, values, rounding, table)
    if not isinstance(format, ScaledFormat):
        return format.pack(values, rounding)
    if rounding != "mse" or few:
        return format.pack(values, rounding, table)
    k = values.shape[1]
    size = k // format.groups(k)
    if format.table_shape is not None and table is None:
        table = format.checked_learn(values)
    plan = format.search_plan(size, table)
    if plan is None:
        return format.pack(values, rounding, table)
    return _Rounding(format, plan, values, size).run(table)


class _Rounding:
    """One matrix on its way."""

    def __init__(self, format: ScaledFormat, plan: SearchPlan, values: np.ndarray, size: int) -> None:
        self.format, self.plan, self.values, self.size = format, plan, values, size
        self.narrow = values.dtype == BF16.dtype
        bits = np.uint16 if self.narrow else np.uint32
        same = values if self.narrow else values.astype(np.float32, copy=False)
        flat = np.ascontiguousarray(same).reshape(-1).view(bits)
        none = np.zeros(1, np.uint32 if self.narrow else np.uint16)
        self.raw = (flat, none) if self.narrow else (none, flat)
        count = values.size // size
        self.scales, self.channel = np.zeros(count, np.float32), np.zeros(count, np.float32)
        self.zeros, self.state = np.zeros(count, np.uint8), np.zeros(count, np.uint8)
        self.codes = np.zeros(values.size, np.uint8)

    def run(self, table: np.ndarray | None) -> PackedArray | RoundedRows:
        format, (n, k) = self.format, self.values.shape
        channel = None
        self._search(0 if format.channel is None else 1)
        self._refuse_infinite()
        groups = k // self.size
        if format.channel is not None:
            channel = format.channel_of(self.plan, self.scales.reshape(n, groups))
            self.channel = np.repeat(channel.astype(np.float32), groups)
            self._search(2)
        scales = format.stored_scales(self.scales).reshape(n, groups)
        codes = self.codes.reshape(n, k)
        zeros = self.zeros.reshape(n, groups) if format.zero_point else None
        found = RoundedRows(format, (n, k), codes, scales, zeros, channel, table)
        rest = np.flatnonzero(self.state.reshape(n, groups).any(axis=1))
        if not rest.size:
            return found
        return _with_rows(found.packed(), rest, format.pack(self.values[rest], "mse", table))

    def _search(self, mode: int) -> None:
        from passes.quantize.rounding_loops import LANES, MAX_LEVELS, search_groups  # numba takes a while to import

        plan, none = self.plan, np.zeros(0, np.float32)
        middles, levels = np.full(MAX_LEVELS - 1, np.inf, np.float32), np.zeros(MAX_LEVELS - 1, np.float32)
        if not plan.linear:
            middles[: plan.middles.size], levels[: plan.middles.size] = plan.middles, plan.levels[1:]
        step = 0.75 / ((1 << 23) / (float(plan.split) - 1)) if plan.split else 0.0
        arguments = (
            plan.linear, plan.shrink is not None, plan.powers, plan.limit,
            plan.factors, none if plan.shrink is None else plan.shrink, middles, levels,
            plan.levels[0], plan.levels[-1], plan.safe, plan.reach, plan.split, np.float32(step), plan.low, plan.high,
            plan.codes, self.channel, self.scales, self.zeros, self.state, self.codes,
        )  # fmt: skip
        run_in_threads(
            lambda first, last: search_groups(*self.raw, self.narrow, self.size, first, last, mode, *arguments),
            self.scales.size,
            LANES,
        )

    def _refuse_infinite(self) -> None:
        bad = np.flatnonzero(self.state == 2)
        if bad.size:
            row = int(bad[0]) * self.size // self.values.shape[1]
            self.format.refuse_unfit(self.values[row].astype(np.float64).reshape(1, -1, self.size), row)


def _with_rows(found: PackedArray, rows: np.ndarray, other: PackedArray) -> PackedArray:
    """`found`, its rows `rows` replaced by those of `other`."""
    for mine, theirs in zip(found.parts(), other.parts(), strict=True):
        if mine is not found.table:
            mine[rows] = theirs
    return found
