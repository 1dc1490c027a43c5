"""Codes that stand for a table of levels rather than for integers in a row.

    ternary<group=64, scale=f16>       -1, 0, 1 as codes 0, 1, 2 of two bits (BitNet b1.58, arXiv:2402.17764)
    nf4<group=64, scale=f16>           the quantiles of normally distributed numbers (QLoRA, arXiv:2305.14314)
    nl4<group=32, scale=f16>           the 16 levels of least squared error for normally distributed groups of 32
    k4<group=32, scale=f16>            2**b levels learned for each matrix, k2 to k4: Lloyd's algorithm in one dimension
    mxfp4                              e2m1 floats in groups of 32 under powers of two (OCP MX formats, v1.0)

Levels are integers of 8 bits: what int8 products take. So the scale of nf4 is the largest magnitude of a group over
127, and the levels are round(127 * level). Those of mxfp4 are counted in halves: the stored scale is that of the
standard. Every family may have two levels of scales: <group=32, scale=i8, channel=f16>.

Bytes: as in `ir.formats.grouped_int`: codes, scales, channel scales; then the tables, int8, one for each matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np

from ir.formats.least_squares import GroupSearch, SearchPlan
from ir.formats.plain import E8M0, F16, PlainFormat
from ir.formats.registry import check_fields, read_group, read_scales, register_family, register_word
from ir.formats.scaled import ScaledFormat, check_scales
from ir.formats.search_plans import clipped_errors, power_plan, symmetric_plan

REACH = 127  # of the levels of tables
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
_NL4 = (-104, -82, -64, -50, -37, -25, -14, -2, 9, 20, 33, 46, 60, 77, 99, 127)
_E2M1 = (0, 1, 2, 3, 4, 6, 8, 12)  # in halves
# Where learning begins: what it makes of normally distributed values in groups of 32.
_START = {
    2: (-90, -18, 44, 127),
    3: (-102, -61, -32, -6, 19, 46, 78, 127),
    4: _NL4,
}
# Learning: at most so many values of a matrix, so many bins, so many steps for each of so many choices of scales.
_SAMPLE, _BINS, _STEPS, _ROUNDS = 1 << 16, 1 << 12, 20, 3


class CodebookFormat(ScaledFormat):
    """Base of the formats of this file. `levels` of the methods are a learned table, or None for the fixed one."""

    @property
    def kind(self) -> int:
        """Bits of integers that spread as the levels do; 0 for ternary."""
        return self.bits

    @property
    def outermost(self) -> int:
        """The level that the largest value of a group is put on by nearest rounding."""
        return REACH

    def _levels(self, table: np.ndarray | None) -> np.ndarray:
        levels = self.integer_levels if table is None else table
        assert levels is not None
        return levels.astype(np.int64)

    def _span(self, wide: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
        return np.abs(wide).max(axis=-1) / (self.outermost * self.level_unit)

    def _nearest_codes(
        self, wide: np.ndarray, scales: np.ndarray, levels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        ordered, codes = np.unique(self._levels(levels), return_index=True)
        quotient = wide / np.where(scales == 0, 1.0, scales)[..., None]
        return codes.astype(np.uint8)[np.searchsorted((ordered[1:] + ordered[:-1]) / 2, quotient)], None

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan:
        return symmetric_plan(self._levels(levels), self.kind, size, self.scale, self.channel)

    def _code_errors(self, rounding: str, table: np.ndarray | None, size: int) -> np.ndarray:
        levels = self._levels(table)
        reach = float(self.outermost)
        if rounding == "mse":
            reach = max(reach, float(self.search_plan(size, table).reach))
        return clipped_errors(levels, reach)

    def _check(self) -> None:
        if self.group < 0:
            raise ValueError(f"expected a group of 1 or more, or 0 for the whole row, got {self.group}")
        check_scales(self.scale, self.channel)

    def _text(self, name: str) -> str:
        channel = f", channel={self.channel}" if self.channel is not None else ""
        return f"{name}<group={self.group or 'row'}, scale={self.scale}{channel}>"


@dataclass(frozen=True)
class TernaryFormat(CodebookFormat):
    """-1, 0 and 1 in two bits. Nearest rounding puts the largest value of a group on a level."""

    group: int
    scale: PlainFormat = F16
    channel: PlainFormat | None = None
    bits: int = field(default=2, init=False)

    @property
    def kind(self) -> int:
        return 0

    def __post_init__(self) -> None:
        self._check()

    def __str__(self) -> str:
        return self._text("ternary")

    @property
    def code_count(self) -> int:
        return 3

    @property
    def outermost(self) -> int:
        return 1

    @property
    def integer_levels(self) -> np.ndarray:
        """Code 3 would be worth 2; no code 3 is written."""
        return np.arange(4) - 1

    def _levels(self, table: np.ndarray | None) -> np.ndarray:
        return self.integer_levels[:3]

    def _code_errors(self, rounding: str, table: np.ndarray | None, size: int) -> np.ndarray:
        return np.append(super()._code_errors(rounding, table, size), 0.0)


@dataclass(frozen=True)
class TableFormat(CodebookFormat):
    """Four bits, with the fixed levels called `name`: nf4 or nl4."""

    name: str
    group: int
    scale: PlainFormat = F16
    channel: PlainFormat | None = None
    bits: int = field(default=4, init=False)

    def __post_init__(self) -> None:
        if self.name not in TABLES:
            raise ValueError(f"expected {' or '.join(TABLES)}, got {self.name}")
        self._check()

    def __str__(self) -> str:
        return self._text(self.name)

    @property
    def integer_levels(self) -> np.ndarray:
        return np.array(TABLES[self.name], np.int64)


TABLES = {"nf4": tuple(int(x) for x in np.rint(REACH * np.array(_NF4))), "nl4": _NL4}


@dataclass(frozen=True)
class LearnedFormat(CodebookFormat):
    """2**bits levels for each matrix, int8, fitted to its values over the scales of their groups."""

    bits: int
    group: int
    scale: PlainFormat = F16
    channel: PlainFormat | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 4:
            raise ValueError(f"expected 2 to 4 bits, got {self.bits}")
        self._check()

    def __str__(self) -> str:
        return self._text(f"k{self.bits}")

    @property
    def integer_levels(self) -> None:
        return None

    @property
    def table_shape(self) -> tuple[int, ...]:
        return (1 << self.bits,)

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan:
        assert levels is not None
        return symmetric_plan(levels, self.bits, size, self.scale, self.channel)

    def learn(self, matrix: np.ndarray) -> np.ndarray:
        """int8 [2**bits], ascending. From fixed levels on, the scales of least squared error and the levels of least
        squared error (Lloyd's algorithm) are found in turn. No random number is taken.
        """
        size = self.group or matrix.shape[1]
        groups = matrix.reshape(-1, size)
        step = max(1, -(-groups.size // _SAMPLE))  # every step-th group
        x = np.ascontiguousarray(groups[::step].astype(np.float64).T)
        magnitude = np.abs(x).max(axis=0)
        unit = magnitude.max(initial=0.0)
        x = x[:, magnitude > unit * 2.0**-30] / (unit or 1.0)  # scaled so that all is tame
        if not x.size:
            return _even_table(self.bits)
        levels = np.array(_START[self.bits], np.float64)
        for _ in range(_ROUNDS):
            plan = symmetric_plan(_distinct(levels), self.bits, size, self.channel or self.scale)
            search = GroupSearch(replace(plan, levels=levels.astype(np.float32)), x.astype(np.float32))
            search.run()
            levels = _lloyd(x, search.scale.astype(np.float64), levels)
            levels = levels * (REACH / np.abs(levels).max())
        return _distinct(levels)


def _even_table(bits: int) -> np.ndarray:
    """int8 levels in even steps: the table where there is nothing to learn from."""
    return np.rint(np.linspace(-REACH, REACH, 1 << bits)).astype(np.int8)


def _lloyd(x: np.ndarray, scales: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """f64 levels, ascending, of less squared error of x [size, groups] under scales [groups] than `levels`.

    Works on a histogram of x / scale, weighted by scale**2.
    """
    entries = len(levels)
    edge = 2.0 * REACH
    quotient = np.clip(x / scales, -edge, edge).reshape(-1)
    weight = np.broadcast_to(scales**2, x.shape).reshape(-1)
    index = np.minimum((quotient + edge) * (_BINS / (2 * edge)), _BINS - 1).astype(np.int64)
    count = np.bincount(index, weight, _BINS)
    total = np.bincount(index, weight * quotient, _BINS)
    used = np.flatnonzero(count)
    centers, count, total = total[used] / count[used], count[used], total[used]
    for _ in range(_STEPS):
        nearest = np.searchsorted((levels[1:] + levels[:-1]) / 2, centers)
        weights = np.bincount(nearest, count, entries)
        sums = np.bincount(nearest, total, entries)
        levels = np.where(weights > 0, sums / np.where(weights > 0, weights, 1.0), levels)
    return levels


def _distinct(levels: np.ndarray) -> np.ndarray:
    """int8, ascending, no two alike."""
    table = np.clip(np.rint(np.sort(levels)), -REACH, REACH).astype(np.int64)
    for i in range(1, len(table)):
        table[i] = max(table[i], table[i - 1] + 1)
    for i in range(len(table) - 1, -1, -1):
        table[i] = min(table[i], REACH - (len(table) - 1 - i))
    return table.astype(np.int8)


@dataclass(frozen=True)
class MXFP4Format(CodebookFormat):
    """e2m1 in groups of 32 under e8m0. Code: sign, two bits of exponent, one of mantissa.

    `pack` writes scales of 2**-126 and above; code 8 (minus zero) is read, but not written.
    """

    bits: int = field(default=4, init=False)
    group: int = field(default=32, init=False)
    scale: PlainFormat = field(default=E8M0, init=False)
    level_unit = 0.5

    def __str__(self) -> str:
        return "mxfp4"

    @property
    def outermost(self) -> int:
        return _E2M1[-1]

    @property
    def integer_levels(self) -> np.ndarray:
        return np.array([*_E2M1, *(-x for x in _E2M1)], np.int64)

    def _nearest_scales(
        self, wide: np.ndarray, levels: np.ndarray | None, first_row: int
    ) -> tuple[np.ndarray, np.ndarray | None]:
        mantissa, exponent = np.frexp(self._span(wide, levels))
        exponent = np.where(mantissa == 0.5, exponent - 1, exponent)
        self._refuse_large(np.where(exponent > 127, np.inf, 0.0), wide, first_row)
        powers = np.where(mantissa == 0, -126, np.clip(exponent, -126, 127))
        return np.ldexp(1.0, powers).astype(E8M0.dtype), None

    def stored_scales(self, scales: np.ndarray) -> np.ndarray:
        return np.where(scales == 0, np.float32(2.0**-126), scales * 2).astype(E8M0.dtype)

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan:
        return power_plan(tuple(int(x) for x in self.integer_levels))


MXFP4 = MXFP4Format()
register_word(MXFP4)


def _read(name: str, fields: dict[str, str]) -> CodebookFormat:
    check_fields(name, fields, ("group", "scale"), f"{name}<group=32, scale=f16>", ("channel",))
    group = read_group(fields["group"])
    scale, channel = read_scales(fields)
    if name == "ternary":
        return TernaryFormat(group, scale, channel)
    if name in TABLES:
        return TableFormat(name, group, scale, channel)
    return LearnedFormat(int(name[1:][:4]), group, scale, channel)


register_family(r"ternary|nf4|nl4|k[0-9]+", ("ternary", "nf4", "nl4", "k4"), _read)
