"""The general low-bit format of weights: integers of 1 to 8 bits that share a scale, and maybe a zero point, by groups
of consecutive elements of a row.

    q4_sym<group=32, scale=f16>     x = scale * (code - 8)
    q4_zp<group=64, scale=bf16>     x = scale * (code - zero), zero a code of its own for each group
    q1_sym<group=row, scale=f32>    x = scale * (2 * code - 1): one bit is the sign; one group for the whole row

`pack` chooses the smallest scale of the scale's format with which no value of the group is clipped, and rounds to the
nearest code; better choices (by calibration) store their own codes through `PackedArray`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats.bit_packing import pack_codes, row_bytes, unpack_codes
from ir.formats.plain import BF16, F16, F32, NumberFormat, PlainFormat

SCALE_FORMATS = {"f16": F16, "bf16": BF16, "f32": F32}
_F32_MAX = float(np.finfo(np.float32).max)
# The quotient value / scale is computed in float64, below 2**8 and with a relative error of 2**-53.
_QUOTIENT_SLACK = 2.0**-44
_CHUNK = 1 << 22  # elements converted to float64 at a time


@dataclass(frozen=True)
class GroupedIntFormat(NumberFormat):
    """`bits` 1..8; `group` elements share a scale (0 = the whole row); `zero_point` or symmetric; format of scales."""

    bits: int
    group: int
    zero_point: bool = False
    scale: PlainFormat = F16

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise ValueError(f"expected 1 to 8 bits, got {self.bits}")
        if self.group < 0:
            raise ValueError(f"expected a group of 1 or more, or 0 for the whole row, got {self.group}")
        if self.scale not in SCALE_FORMATS.values():
            raise ValueError(f"expected a scale of f16, bf16 or f32, got {self.scale}")

    def __str__(self) -> str:
        scheme = "zp" if self.zero_point else "sym"
        return f"q{self.bits}_{scheme}<group={self.group or 'row'}, scale={self.scale}>"

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
        """Bytes of the codes (rows of whole bytes), the scales and the zero points."""
        *outer, k = shape
        groups = self.groups(k)
        zeros = row_bytes(groups, self.bits) if self.zero_point else 0
        return math.prod(outer) * (row_bytes(k, self.bits) + groups * self.scale.dtype.itemsize + zeros)

    # -- floats to codes and back ------------------------------------------------------------------------------------

    def pack(self, values: np.ndarray) -> PackedArray:
        """`values` [..., k], finite floats. Raises DiagnosticError for other values and for what no scale can hold."""
        k = values.shape[-1] if values.ndim else 0
        groups = self.groups(k)
        flat = values.reshape(-1, k)
        n = flat.shape[0]
        codes = np.zeros((n, row_bytes(k, self.bits)), np.uint8)
        scales = np.zeros((n, groups), self.scale.dtype)
        zeros = np.zeros((n, row_bytes(groups, self.bits)), np.uint8) if self.zero_point else None
        step = max(1, _CHUNK // k)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            wide = flat[rows].astype(np.float64).reshape(-1, groups, k // groups)
            self._refuse_unfit(wide, start)
            scales[rows] = chosen = self._scales(wide, start)
            found, zero = self._codes(wide, chosen.astype(np.float64))
            codes[rows] = pack_codes(found.reshape(-1, k), self.bits)
            if zeros is not None:
                zeros[rows] = pack_codes(zero, self.bits)
        return PackedArray(self, values.shape, codes, scales, zeros)

    def _refuse_unfit(self, wide: np.ndarray, first_row: int) -> None:
        finite = np.isfinite(wide)
        if not finite.all():
            row, group, at = (int(i) for i in np.argwhere(~finite)[0])
            column = group * wide.shape[2] + at
            value = wide[row, group, at]
            raise DiagnosticError(
                f"cannot store {value} of row {first_row + row}, column {column} as {self}", expected="finite numbers"
            )

    def _scales(self, wide: np.ndarray, first_row: int) -> np.ndarray:
        """The smallest representable scales that clip nothing, [n, groups]."""
        if self.zero_point:  # zero is always representable
            extent = np.maximum(wide.max(axis=-1), 0) - np.minimum(wide.min(axis=-1), 0)
        else:
            extent = np.abs(wide).max(axis=-1)
        scales = round_up(extent / self.largest, self.scale)
        if not np.isfinite(scales.astype(np.float64)).all():
            row, group = (int(i) for i in np.argwhere(~np.isfinite(scales.astype(np.float64)))[0])
            raise DiagnosticError(
                f"group {group} of row {first_row + row} has values up to {np.abs(wide[row, group]).max():.6g}, "
                f"too large for a scale in {self.scale}",
                hint="use scale=bf16 or scale=f32",
            )
        return scales

    def _codes(self, wide: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(uint8 codes [n, groups, group], uint8 zero points [n, groups])."""
        divisor = np.where(scales == 0, 1.0, scales)  # a group of zeros has scale 0
        quotient = wide / divisor[..., None]
        if self.zero_point:
            lowest = np.minimum(wide.min(axis=-1), 0)
            zero = np.rint(-lowest / divisor)
            codes = np.clip(np.rint(quotient + zero[..., None]), 0, self.largest)
            return codes.astype(np.uint8), zero.astype(np.uint8)
        if self.bits == 1:
            return (quotient >= 0).astype(np.uint8), np.zeros(scales.shape, np.uint8)
        return (np.rint(quotient) + self.offset).astype(np.uint8), np.zeros(scales.shape, np.uint8)

    def unpack(self, packed: PackedArray) -> np.ndarray:
        """float32 of the shape that was packed."""
        *_, k = packed.shape
        groups = self.groups(k)
        n = packed.codes.shape[0]
        out = np.zeros((n, k), np.float32)
        step = max(1, _CHUNK // k)
        for start in range(0, n, step):
            rows = slice(start, start + step)
            levels = packed.levels(rows).reshape(-1, groups, k // groups)
            wide = levels * packed.scales[rows].astype(np.float64)[..., None]
            out[rows] = np.clip(wide, -_F32_MAX, _F32_MAX).reshape(-1, k)
        return out.reshape(packed.shape)

    def error_bound(self, packed: PackedArray) -> np.ndarray:
        """float64 of the packed shape: |x - unpack(pack(x))| of an element is never larger.

        Half a step, since no value of its group was clipped; and, where the scale is f32, the rounding of the product
        to float32 (with f16 and bf16 scales the product is exact).
        """
        *_, k = packed.shape
        groups = self.groups(k)
        half = packed.scales.astype(np.float64) * (self.half_step + _QUOTIENT_SLACK)
        bound = np.repeat(half, k // groups, axis=-1).reshape(packed.shape)
        if self.scale == F32:
            values = np.abs(self.unpack(packed).astype(np.float64))
            bound = bound + np.maximum(values * 2.0**-23, 2.0**-149)
        return bound


@dataclass(frozen=True)
class PackedArray:
    """An array in a grouped format: packed codes [n, row bytes], scales [n, groups], packed zero points or None.

    n counts the rows of all outer dimensions of `shape`.
    """

    format: GroupedIntFormat
    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None

    def levels(self, rows: slice = slice(None)) -> np.ndarray:
        """float64 [rows, k]: what each code is worth in scales."""
        fmt, k = self.format, self.shape[-1]
        codes = unpack_codes(self.codes[rows], k, fmt.bits).astype(np.float64)
        if self.zeros is not None:
            groups = fmt.groups(k)
            zero = unpack_codes(self.zeros[rows], groups, fmt.bits).astype(np.float64)
            return codes - np.repeat(zero, k // groups, axis=-1)
        return 2 * codes - 1 if fmt.bits == 1 else codes - fmt.offset

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes + (self.zeros.nbytes if self.zeros is not None else 0)

    def tobytes(self) -> bytes:
        """Codes, scales, zero points, one after another."""
        zeros = self.zeros.tobytes() if self.zeros is not None else b""
        return self.codes.tobytes() + self.scales.tobytes() + zeros

    @classmethod
    def frombytes(cls, format: GroupedIntFormat, shape: tuple[int, ...], data: bytes) -> PackedArray:
        """The inverse of `tobytes`. Raises DiagnosticError unless there are exactly as many bytes as it takes."""
        if len(data) != format.nbytes(shape):
            raise DiagnosticError(
                f"{len(data)} bytes are no array {list(shape)} in {format}", expected=f"{format.nbytes(shape)} bytes"
            )
        *outer, k = shape
        n, groups = math.prod(outer), format.groups(k)
        sizes = (n * row_bytes(k, format.bits), n * groups * format.scale.dtype.itemsize)
        codes = np.frombuffer(data, np.uint8, sizes[0]).reshape(n, row_bytes(k, format.bits))
        scales = np.frombuffer(data, format.scale.dtype, n * groups, sizes[0]).reshape(n, groups)
        zeros = None
        if format.zero_point:
            zeros = np.frombuffer(data, np.uint8, offset=sum(sizes)).reshape(n, row_bytes(groups, format.bits))
        return cls(format, shape, codes, scales, zeros)


def round_up(values: np.ndarray, format: PlainFormat) -> np.ndarray:
    """The smallest numbers of a float format that are not below `values` (>= 0); inf where there is none."""
    with np.errstate(over="ignore", under="ignore"):
        rounded = values.astype(format.dtype)
        above = np.nextafter(rounded, np.array(np.inf, format.dtype))
    return np.where(rounded.astype(np.float64) < values, above, rounded)


def read_grouped_format(bits: int, scheme: str, fields: dict[str, str]) -> GroupedIntFormat:
    """The format of `q<bits>_<scheme><fields>`. Raises ValueError saying what is wrong."""
    if scheme not in ("sym", "zp"):
        raise ValueError(f"expected q{bits}_sym or q{bits}_zp, got q{bits}_{scheme}")
    for name in fields:
        if name not in ("group", "scale"):
            raise ValueError(f"q{bits}_{scheme} has no field {name!r}; it has group, scale")
    if "group" not in fields or "scale" not in fields:
        raise ValueError(f"q{bits}_{scheme} needs group and scale, like q4_sym<group=32, scale=f16>")
    group, scale = fields["group"], fields["scale"]
    if group != "row" and not (group.isdecimal() and len(group) < 10 and int(group) > 0):
        raise ValueError(f"expected a group of 1 or more, or group=row, got {group}")
    if scale not in SCALE_FORMATS:
        raise ValueError(f"expected a scale of f16, bf16 or f32, got {scale}")
    return GroupedIntFormat(bits, 0 if group == "row" else int(group), scheme == "zp", SCALE_FORMATS[scale])
