"""What all formats of codes under scales share: a row is cut into groups, and an element is

    value = channel[row] * scale[row, group] * (level[code] - zero[row, group])

`pack` with rounding="nearest" takes the smallest scales with which no value lies beyond the outermost levels, and the
nearest codes; with rounding="mse" the scales whose squared error is least (`ir.formats.least_squares`), among which
those of a symmetric format may be negative. The same values give the same bytes everywhere.
Refused, by row and column: values that are no finite numbers, and those too large for a scale of the format.
"""

from __future__ import annotations

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats.bit_packing import pack_codes
from ir.formats.least_squares import GroupSearch, SearchPlan
from ir.formats.packed import PackedArray, stored_bytes
from ir.formats.plain import BF16, F16, F32, I8, ROUNDINGS, U8, NumberFormat, PlainFormat

_F32_MAX = float(np.finfo(np.float32).max)
# The quotient value / scale is computed in float64, below 2**8 and with a relative error of 2**-53.
QUOTIENT_SLACK = 2.0**-44
SEARCH_SLACK = 2.0**-12  # in float32, with a few roundings, below 2**9
_CHUNK = 1 << 20  # elements converted to float64 at a time


class ScaledFormat(NumberFormat):
    """Base of the formats whose codes stand for levels under scales. Subclasses are frozen dataclasses.

    `bits` of a code as stored; `group` elements share a scale (0 = the whole row); `scale` and `channel` are the
    formats of the scales (`channel` None without a second level); `zero_point`: whether groups have one.
    """

    bits: int
    group: int
    scale: PlainFormat
    channel: PlainFormat | None = None
    zero_point: bool = False
    block_rows = 1  # rows that share a scale
    level_unit = 1.0  # what a level of 1 under a scale of 1 is worth

    # -- what a family says ------------------------------------------------------------------------------------------

    @property
    def integer_levels(self) -> np.ndarray | None:
        """int64 [2**bits]: what a code is worth in scales before the zero point; None where each matrix learns it."""
        raise TypeError(f"{type(self).__name__} has no levels")

    @property
    def table_shape(self) -> tuple[int, ...] | None:
        """Shape of the int8 table of a matrix, of formats that learn one."""
        return None

    @property
    def code_count(self) -> int:
        """Codes 0 .. code_count - 1 exist."""
        return 1 << self.bits

    def codes_per_row(self, k: int) -> int:
        """Codes of a row of `k` elements."""
        return k

    # -- sizes -------------------------------------------------------------------------------------------------------

    def groups(self, k: int) -> int:
        """Groups in a row of `k` elements. Raises DiagnosticError when they do not fill it."""
        group = self.group or k
        if k < 1 or k % group:
            raise DiagnosticError(
                f"{self} cannot hold rows of {k} elements",
                expected=f"a number of columns that is a multiple of the group of {group}"
                if k
                else "one column or more",
                hint="group=row fits every row; so does any group that divides the number of columns",
            )
        return k // group

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the codes (rows of whole bytes), the scales, the zero points, the channel scales and tables."""
        return stored_bytes(self, shape)

    # -- floats to codes ---------------------------------------------------------------------------------------------

    def pack(self, values: np.ndarray, rounding: str = "nearest", table: np.ndarray | None = None) -> PackedArray:
        """`values` [..., k], finite floats. Raises DiagnosticError for other values and for what no scale can hold.

        `table` int8, of formats that learn one: the levels to use for all of it in place of learning them.
        """
        if rounding not in ROUNDINGS:
            raise ValueError(f"expected a rounding of {' or '.join(ROUNDINGS)}, got {rounding!r}")
        k = values.shape[-1] if values.ndim else 0
        groups = self.groups(k)
        flat = values.reshape(-1, k)
        table = self._tables(values, table)
        n, per_row = flat.shape[0], self.codes_per_row(k)
        codes = np.zeros((n, per_row), np.uint8)
        scales = np.zeros((n, groups), self.scale.dtype)
        zeros = np.zeros((n, groups), np.uint8) if self.zero_point else None
        channel = np.zeros(n, self.channel.dtype) if self.channel is not None else None
        for rows, levels in self._row_chunks(values.shape, table):
            wide = flat[rows].astype(np.float64).reshape(-1, groups, k // groups)
            self.refuse_unfit(wide, rows.start)
            found = self._encode(wide, rounding, levels, rows.start)
            codes[rows], scales[rows] = found[0].reshape(-1, per_row), found[1]
            if zeros is not None and found[2] is not None:
                zeros[rows] = found[2]
            if channel is not None and found[3] is not None:
                channel[rows] = found[3]
        packed_zeros = pack_codes(zeros, self.bits) if zeros is not None else None
        return PackedArray(self, values.shape, pack_codes(codes, self.bits), scales, packed_zeros, channel, table)

    def _row_chunks(self, shape: tuple[int, ...], table: np.ndarray | None) -> list[tuple[slice, np.ndarray | None]]:
        """Runs of rows that are converted at once, none of two matrices with tables of their own; and their table."""
        *outer, k = shape
        rows = int(np.prod(outer))
        step = max(1, _CHUNK // k)
        if table is None or table.ndim == len(self.table_shape or ()):
            return [(slice(start, min(start + step, rows)), table) for start in range(0, rows, step)]
        n = outer[-1]
        flat = table.reshape(-1, *(self.table_shape or ()))
        return [
            (slice(m * n + start, m * n + min(start + step, n)), flat[m])
            for m in range(len(flat))
            for start in range(0, n, step)
        ]

    def _tables(self, values: np.ndarray, table: np.ndarray | None) -> np.ndarray | None:
        """The tables of all matrices of `values`."""
        if self.table_shape is None:
            if table is not None:
                raise ValueError(f"{self} takes no table")
            return None
        if values.ndim > 2:
            if table is not None:
                return np.broadcast_to(table, (*values.shape[:-2], *self.table_shape)).copy()
            outer = values.reshape(-1, *values.shape[-2:])
            learned = [self.checked_learn(matrix) for matrix in outer]
            return np.array(learned, np.int8).reshape(*values.shape[:-2], *self.table_shape)
        return self.checked_learn(values.reshape(-1, values.shape[-1])) if table is None else table

    def checked_learn(self, matrix: np.ndarray) -> np.ndarray:
        """`learn`, after the numbers that are not finite are refused."""
        k = matrix.shape[1]
        for start in range(0, matrix.shape[0], step := max(1, _CHUNK // k)):
            self.refuse_unfit(matrix[start : start + step].astype(np.float64).reshape(-1, 1, k), start)
        return self.learn(matrix)

    def learn(self, matrix: np.ndarray) -> np.ndarray:
        """int8 of `table_shape`, fitted to a matrix [n, k] of finite numbers."""
        raise TypeError(f"{self} learns nothing")

    def refuse_unfit(self, wide: np.ndarray, first_row: int) -> None:
        """Raises DiagnosticError unless all of wide [n, groups, size], rows first_row and on, is finite."""
        finite = np.isfinite(wide)
        if not finite.all():
            row, group, at = (int(i) for i in np.argwhere(~finite)[0])
            column = group * wide.shape[2] + at
            value = wide[row, group, at]
            raise DiagnosticError(
                f"cannot store {value} of row {first_row + row}, column {column} as {self}", expected="finite numbers"
            )

    def _encode(
        self, wide: np.ndarray, rounding: str, levels: np.ndarray | None, first_row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        """Codes [n, groups, size], scales and zeros [n, groups], channel [n] of f64 [n, groups, size]."""
        plan = self.search_plan(wide.shape[2], levels) if rounding == "mse" else None
        if plan is None:
            return self._encode_nearest(wide, levels, first_row)
        tame = self.tame(plan, np.abs(wide).max(axis=-1))
        if tame.all():
            return self._encode_least(plan, wide)
        found = self._encode_nearest(wide, levels, first_row)
        if not tame.any():
            return found
        least = self._encode_least(plan, np.where(tame[..., None], wide, 0.0))
        codes = np.where(tame[..., None], least[0], found[0])
        parts = [
            None if b is None or a is None else np.where(tame if a.ndim == 2 else tame[:, 0], a, b)
            for a, b in zip(least[1:], found[1:], strict=True)
        ]
        return codes, np.asarray(parts[0]).astype(self.scale.dtype), parts[1], parts[2]

    def _encode_nearest(
        self, wide: np.ndarray, levels: np.ndarray | None, first_row: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        scales, channel = self._nearest_scales(wide, levels, first_row)
        codes, zeros = self._nearest_codes(wide, effective_scales(scales, channel) * self.level_unit, levels)
        return codes, scales, zeros, channel

    # -- least squared error -----------------------------------------------------------------------------------------

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan | None:
        """How scales of groups of `size` are searched; None where nearest rounding is all there is."""
        raise TypeError(f"{type(self).__name__} does not say how its scales are searched")

    def tame(self, plan: SearchPlan, extent: np.ndarray) -> np.ndarray:
        """bool like `extent` [n, groups], the largest magnitudes: which groups are searched; others go to nearest.

        Groups under one channel scale go together.
        """
        fits = (extent == 0) | ((extent >= plan.low) & (extent <= plan.high))
        return fits if self.channel is None else np.broadcast_to(fits.all(axis=-1, keepdims=True), fits.shape)

    def stored_scales(self, scales: np.ndarray) -> np.ndarray:
        """f32 scales that were found, which the format represents, as they are stored."""
        return scales.astype(self.scale.dtype)

    def channel_of(self, plan: SearchPlan, scales: np.ndarray) -> np.ndarray:
        """Channel scales [n] over f32 scales [n, groups]."""
        assert self.channel is not None
        return round_up(np.abs(scales).max(axis=-1).astype(np.float64) / plan.limit, self.channel)

    def _encode_least(
        self, plan: SearchPlan, wide: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
        n, groups, size = wide.shape
        x = np.ascontiguousarray(wide.astype(np.float32).reshape(-1, size).T)
        search = GroupSearch(plan, x)
        search.run()
        scales, channel = search.scale, None
        if self.channel is not None:
            channel = self.channel_of(plan, search.scale.reshape(n, groups))
            over = np.repeat(channel.astype(np.float32), groups)
            first, zero = search.scale, search.zero
            search = GroupSearch(plan, x)
            scales = search.run_integers(over, first, zero)
        codes, zeros = search.codes()
        stored = self.stored_scales(scales).reshape(n, groups)
        return codes.T.reshape(n, groups, size), stored, zeros.reshape(n, groups) if self.zero_point else None, channel

    # -- nearest -----------------------------------------------------------------------------------------------------

    def _span(self, wide: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
        """f64 [n, groups]: the smallest scales with which every value lies between the outermost levels."""
        raise TypeError(f"{type(self).__name__} does not say how its scales are chosen")

    def _nearest_codes(
        self, wide: np.ndarray, scales: np.ndarray, levels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """(uint8 codes [n, groups, size], uint8 zero points [n, groups] or None) under f64 scales."""
        raise TypeError(f"{type(self).__name__} does not say how its codes are chosen")

    def _nearest_scales(
        self, wide: np.ndarray, levels: np.ndarray | None, first_row: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """The smallest representable scales that are not below the span, and the channel scales above them."""
        span = self._span(wide, levels)
        if self.channel is None:
            scales = round_up(span, self.scale)
            self._refuse_large(scales, wide, first_row)
            return scales, None
        limit = 255 if self.scale == U8 else 127
        channel = round_up(span.max(axis=-1) / limit, self.channel)
        self._refuse_large(np.repeat(channel[:, None], span.shape[1], axis=1), wide, first_row)
        divisor = np.where(channel == 0, 1.0, channel.astype(np.float64))
        return np.minimum(np.ceil(span / divisor[:, None]), limit).astype(self.scale.dtype), channel

    def _refuse_large(self, scales: np.ndarray, wide: np.ndarray, first_row: int) -> None:
        finite = np.isfinite(scales.astype(np.float64))
        if not finite.all():
            row, group = (int(i) for i in np.argwhere(~finite)[0])
            field = "scale" if self.channel is None else "channel"
            raise DiagnosticError(
                f"group {group} of row {first_row + row} has values up to {np.abs(wide[row, group]).max():.6g}, "
                f"too large for a scale in {self.channel or self.scale}",
                hint=f"use {field}=bf16 or {field}=f32",
            )

    # -- codes to floats ---------------------------------------------------------------------------------------------

    def unpack(self, packed: PackedArray) -> np.ndarray:
        """float32 of the shape that was packed."""
        *_, k = packed.shape
        groups = self.groups(k)
        out = np.zeros((packed.codes.shape[0], k), np.float32)
        for rows, table in self._row_chunks(packed.shape, packed.table):
            worth = self._worth(packed, rows, table).reshape(-1, groups, k // groups)
            wide = worth * packed_scales(packed, rows)[..., None]
            out[rows] = np.clip(wide, -_F32_MAX, _F32_MAX).reshape(-1, k)
        return out.reshape(packed.shape)

    def _worth(self, packed: PackedArray, rows: slice, table: np.ndarray | None) -> np.ndarray:
        """f64 [rows, k]: what the elements are worth in scales."""
        levels = self.integer_levels if table is None else table
        assert levels is not None
        worth = levels.astype(np.float64)[packed.code_array(rows)]
        if self.zero_point:
            worth -= np.repeat(packed.zero_array(rows), worth.shape[1] // packed.scales.shape[1], axis=-1)
        return worth

    def error_bound(self, packed: PackedArray, rounding: str = "mse") -> np.ndarray:
        """float64 of the packed shape: |x - unpack(pack(x))| of an element is never larger.

        Holds for arrays packed with either rounding; rounding="nearest" gives the smaller bound of those packed so:
        half the distance of neighbouring levels, since no value of its group was clipped. And, where a scale is f32
        or of two levels, the rounding of the product to float32 (with f16 and bf16 scales the product is exact).
        """
        *_, k = packed.shape
        groups = self.groups(k)
        bound = np.zeros((packed.codes.shape[0], k))
        for rows, table in self._row_chunks(packed.shape, packed.table):
            slack = QUOTIENT_SLACK if rounding == "nearest" else SEARCH_SLACK
            reach = self._code_errors(rounding, table, k // groups)[packed.code_array(rows)] + slack
            scales = np.abs(packed_scales(packed, rows))
            bound[rows] = (reach.reshape(-1, groups, k // groups) * scales[..., None]).reshape(-1, k)
        bound = bound.reshape(packed.shape)
        if self.scale == F32 or self.channel is not None:
            values = np.abs(self.unpack(packed).astype(np.float64))
            bound = bound + np.maximum(values * 2.0**-23, 2.0**-149)
        return bound

    def _code_errors(self, rounding: str, table: np.ndarray | None, size: int) -> np.ndarray:
        """f64 [2**bits]: how far from its level, in scales, the value of a code in groups of `size` may lie."""
        raise TypeError(f"{type(self).__name__} does not bound its errors")


def effective_scales(scales: np.ndarray, channel: np.ndarray | None) -> np.ndarray:
    """f64 [n, groups]: both levels of scales multiplied."""
    wide = scales.astype(np.float64)
    return wide if channel is None else wide * channel.astype(np.float64)[:, None]


def packed_scales(packed: PackedArray, rows: slice) -> np.ndarray:
    """f64 [rows, groups]: the scales of an array, both levels multiplied, in units of its levels."""
    channel = packed.channel[rows] if packed.channel is not None else None
    return effective_scales(packed.scales[rows], channel) * packed.format.level_unit


def round_up(values: np.ndarray, format: PlainFormat) -> np.ndarray:
    """The smallest numbers of a float format that are not below `values` (>= 0); inf where there is none."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(format.dtype)
        above = np.nextafter(rounded, np.array(np.inf, format.dtype))
    return np.where(rounded.astype(np.float64) < values, above, rounded)


def check_scales(scale: PlainFormat, channel: PlainFormat | None) -> None:
    """Raises ValueError unless scales are f16, bf16 or f32, or u8 or i8 under a channel scale of those."""
    floats = (F16, BF16, F32)
    if channel is None and scale not in floats:
        hint = f"; {scale} goes with channel=f16, bf16 or f32" if scale in (U8, I8) else ""
        raise ValueError(f"expected a scale of f16, bf16 or f32, got {scale}{hint}")
    if channel is not None and (scale not in (U8, I8) or channel not in floats):
        raise ValueError(
            f"expected scale=u8 or scale=i8 with channel=f16, bf16 or f32, got scale={scale}, channel={channel}"
        )
