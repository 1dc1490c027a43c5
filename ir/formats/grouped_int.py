"""The general low-bit format: integers of 1 to 8 bits that share a scale, and maybe a zero point, by groups of
consecutive elements of a row.

    q4_sym<group=32, scale=f16>                   x = scale * (code - 8)
    q4_zp<group=64, scale=bf16>                   x = scale * (code - zero), zero a code of its own for each group
    q1_sym<group=row, scale=f32>                  x = scale * (2 * code - 1): one bit is the sign; one group a row
    q4_sym<group=32, scale=u8, channel=f16>       x = channel * scale * (code - 8): a scale of a byte for each group
                                                  under one for the row (the progressive scales of arXiv:2405.04532)
    q4_sym<group=32, scale=i8, channel=f16>       the same with signed scales, which rounding="mse" makes use of

Bytes: the codes of each row, code i in bits [i * bits, (i + 1) * bits) from the lowest bit of its first byte; then the
scales of each row; then its zero points, packed as codes are; then the channel scales.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from ir.formats.least_squares import SearchPlan
from ir.formats.plain import F16, I8, PlainFormat
from ir.formats.registry import check_fields, read_group, read_scales, register_family
from ir.formats.scaled import ScaledFormat, check_scales
from ir.formats.search_plans import clipped_errors, symmetric_plan, zero_point_plan


@dataclass(frozen=True)
class GroupedIntFormat(ScaledFormat):
    """`bits` 1..8; `group` elements share a scale (0 = the whole row); `zero_point` or symmetric; format of scales.

    `channel` is the format of the second level, under which `scale` is u8 or i8.
    """

    bits: int
    group: int
    zero_point: bool = False
    scale: PlainFormat = F16
    channel: PlainFormat | None = None

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"expected 1 to 8 bits, got {self.bits}")
        if self.group < 0:
            raise ValueError(f"expected a group of 1 or more, or 0 for the whole row, got {self.group}")
        check_scales(self.scale, self.channel)
        if self.zero_point and self.scale == I8:
            raise ValueError("expected scale=u8 beside zero points, got scale=i8")

    def __str__(self) -> str:
        scheme = "zp" if self.zero_point else "sym"
        channel = f", channel={self.channel}" if self.channel is not None else ""
        return f"q{self.bits}_{scheme}<group={self.group or 'row'}, scale={self.scale}{channel}>"

    @property
    def offset(self) -> int:
        """The code that means 0 in the symmetric scheme of 2 and more bits."""
        return 1 << (self.bits - 1)

    @property
    def largest(self) -> int:
        """How many scales the largest value of a group may be (the range of a group, with a zero point)."""
        return (1 << self.bits) - 1 if self.zero_point else max(1, self.offset - 1)

    @property
    def half_step(self) -> float:
        """Half the distance between neighbouring values, in scales."""
        return 1.0 if self.bits == 1 and not self.zero_point else 0.5

    @property
    def integer_levels(self) -> np.ndarray:
        """int64 [2**bits]: what a code is worth in scales, before the zero point."""
        codes = np.arange(1 << self.bits)
        if self.zero_point:
            return codes
        return 2 * codes - 1 if self.bits == 1 else codes - self.offset

    def _span(self, wide: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
        if self.zero_point:  # zero is always representable
            extent = np.maximum(wide.max(axis=-1), 0) - np.minimum(wide.min(axis=-1), 0)
        else:
            extent = np.abs(wide).max(axis=-1)
        return extent / self.largest

    def _nearest_codes(
        self, wide: np.ndarray, scales: np.ndarray, levels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        divisor = np.where(scales == 0, 1.0, scales)  # a group of zeros has scale 0
        quotient = wide / divisor[..., None]
        if self.zero_point:
            lowest = np.minimum(wide.min(axis=-1), 0)
            zero = np.minimum(np.rint(-lowest / divisor), self.largest)
            codes = np.clip(np.rint(quotient + zero[..., None]), 0, self.largest)
            return codes.astype(np.uint8), zero.astype(np.uint8)
        if self.bits == 1:
            return (quotient >= 0).astype(np.uint8), None
        return (np.rint(quotient) + self.offset).astype(np.uint8), None

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan:
        if self.zero_point:
            return zero_point_plan(self.bits, size, self.scale, self.channel)
        return symmetric_plan(self.integer_levels, self.bits, size, self.scale, self.channel)

    def _code_errors(self, rounding: str, table: np.ndarray | None, size: int) -> np.ndarray:
        errors = np.full(1 << self.bits, self.half_step)
        if rounding == "nearest":
            return errors
        reach = float(self.search_plan(size, None).reach)
        if not self.zero_point:
            return np.maximum(errors, clipped_errors(self.integer_levels, reach))
        errors[[0, -1]] = max(0.5, reach)
        return errors


def _read(name: str, fields: dict[str, str]) -> GroupedIntFormat:
    found = re.fullmatch(r"q([0-9]+)_([a-z]+)", name, re.ASCII)
    assert found
    bits, scheme = int(found[1][:4]), found[2]
    if scheme not in ("sym", "zp"):
        raise ValueError(f"expected q{bits}_sym or q{bits}_zp, got {name}")
    check_fields(name, fields, ("group", "scale"), "q4_sym<group=32, scale=f16>", ("channel",))
    group = read_group(fields["group"])
    scale, channel = read_scales(fields)
    return GroupedIntFormat(bits, group, scheme == "zp", scale, channel)


register_family(r"q[0-9]+_[a-z]+", ("q4_sym", "q4_zp"), _read)
