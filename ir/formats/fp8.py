"""Eight-bit floats under scales: a block of rows and columns of a matrix shares one.

    f8e4m3<block=row, scale=f32>          x = scale[row] * element: one scale for each row (output channel)
    f8e4m3<block=128x128, scale=f32>      x = scale[row // 128, column // 128] * element
    f8e5m2<block=1x64, scale=bf16>        any other block; blocks at the edges are smaller

The elements are those of arXiv:2209.05433; scales of blocks as in DeepSeek-V3 (arXiv:2412.19437, section 3.3).
Bytes: the elements, one a byte; then the scales, row by row, [ceil(n / rows), ceil(k / columns)] for each matrix.

`pack` takes the smallest scales with which the largest value of a block is not clipped, and the nearest elements;
with rounding="mse" the least squared error among that and a few smaller ones by powers of two to an eighth.
Refused: values that are no finite numbers, by row and column, and values too large for a scale of the format.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats.packed import PackedArray, stored_bytes
from ir.formats.plain import F8E4M3, F8E5M2, F32, ROUNDINGS, NumberFormat, PlainFormat
from ir.formats.registry import SCALE_FORMATS, check_fields, read_scale, register_family
from ir.formats.scaled import QUOTIENT_SLACK, round_up

ELEMENTS = {"f8e4m3": F8E4M3, "f8e5m2": F8E5M2}
_LARGEST = {"f8e4m3": 448.0, "f8e5m2": 57344.0}
_F32_MAX = float(np.finfo(np.float32).max)
# Smaller scales are tried with rounding="mse": the largest value may be this much beyond the largest element.
_CLIPS = tuple(2.0 ** (i / 8) for i in range(1, 5))


@dataclass(frozen=True)
class FP8Format(NumberFormat):
    """`element` f8e4m3 or f8e5m2; blocks of `block_rows` rows and `block_cols` columns (0 = all) share a scale."""

    element: PlainFormat
    block_rows: int = 1
    block_cols: int = 0
    scale: PlainFormat = F32
    bits = 8
    zero_point = False
    channel = None
    table_shape = None
    code_count = 256

    def __post_init__(self) -> None:
        if self.element not in ELEMENTS.values():
            raise ValueError(f"expected elements of f8e4m3 or f8e5m2, got {self.element}")
        if self.block_rows < 1 or self.block_cols < 0:
            raise ValueError(f"expected blocks of 1 or more rows and columns, got {self.block_rows}x{self.block_cols}")
        if self.scale not in SCALE_FORMATS.values():
            raise ValueError(f"expected a scale of f16, bf16 or f32, got {self.scale}")
        if not self.block_cols and self.block_rows != 1:
            raise ValueError(f"expected blocks of columns too, got {self.block_rows} whole rows")

    def __str__(self) -> str:
        block = f"{self.block_rows}x{self.block_cols}" if self.block_cols else "row"
        return f"{self.element}<block={block}, scale={self.scale}>"

    def groups(self, k: int) -> int:
        """Blocks across a row of `k` elements; the last may be smaller."""
        if k < 1:
            raise DiagnosticError(f"{self} cannot hold rows of {k} elements", expected="one column or more")
        return -(-k // self.block_cols) if self.block_cols else 1

    def codes_per_row(self, k: int) -> int:
        """One byte an element."""
        return k

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the elements and the scales."""
        return stored_bytes(self, shape)

    @property
    def largest(self) -> float:
        """The largest finite element."""
        return _LARGEST[self.element.name]

    def pack(self, values: np.ndarray, rounding: str = "nearest") -> PackedArray:
        """`values` [..., n, k], finite floats."""
        if rounding not in ROUNDINGS:
            raise ValueError(f"expected a rounding of {' or '.join(ROUNDINGS)}, got {rounding!r}")
        k = values.shape[-1] if values.ndim else 0
        self.groups(k)
        n = values.shape[-2] if values.ndim > 1 else 1
        flat = values.reshape(-1, k)
        codes = np.zeros(flat.shape, np.uint8)
        scales = []
        for first in range(0, flat.shape[0], max(1, n)):
            for start in range(first, first + n, self.block_rows):
                rows = slice(start, min(start + self.block_rows, first + n))
                codes[rows], found = self._pack_rows(flat[rows].astype(np.float64), rounding, start)
                scales.append(found)
        stacked = np.array(scales, self.scale.dtype).reshape(-1, self.groups(k))
        return PackedArray(self, values.shape, codes, stacked)

    def _pack_rows(self, wide: np.ndarray, rounding: str, first_row: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes [rows, k] and scales [blocks] of one row of blocks."""
        finite = np.isfinite(wide)
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise DiagnosticError(
                f"cannot store {wide[row, column]} of row {first_row + row}, column {column} as {self}",
                expected="finite numbers",
            )
        starts = np.arange(0, wide.shape[1], self.block_cols or wide.shape[1])
        extent = np.maximum.reduceat(np.abs(wide).max(axis=0), starts)
        tried = self.scales_tried(extent, rounding)
        best = tried[0]
        if not np.isfinite(best.astype(np.float64)).all():
            block = int(np.argmin(np.isfinite(best.astype(np.float64))))
            raise DiagnosticError(
                f"block {block} of row {first_row} has values up to {extent[block]:.6g}, "
                f"too large for a scale in {self.scale}",
                hint="use scale=bf16 or scale=f32",
            )
        codes = self._codes(wide, best)
        least = self._squared_error(wide, codes, best, starts)
        for scales in tried[1:]:
            others = self._codes(wide, scales)
            error = self._squared_error(wide, others, scales, starts)
            better = error < least
            least, best = np.where(better, error, least), np.where(better, scales, best)
            codes = np.where(self._spread(better, wide.shape[1]), others, codes)
        return codes, best

    def scales_tried(self, extent: np.ndarray, rounding: str) -> np.ndarray:
        """[tries, *blocks]: scales for blocks whose largest magnitude is `extent` (f64): the smallest that clip none,
        and with rounding="mse" those that clip a little. Infinite where the scale's format ends.
        """
        clips = (1.0, *_CLIPS) if rounding == "mse" else (1.0,)
        return np.stack([round_up(extent / (self.largest * clip), self.scale) for clip in clips])

    def _spread(self, blocks: np.ndarray, k: int) -> np.ndarray:
        """What belongs to the blocks of columns, for each of `k` columns (the last axis)."""
        return np.repeat(blocks, self.block_cols or k, axis=-1)[..., :k]

    def _codes(self, wide: np.ndarray, scales: np.ndarray) -> np.ndarray:
        divisor = np.where(scales.astype(np.float64) == 0, 1.0, scales.astype(np.float64))
        quotient = np.clip(wide / self._spread(divisor, wide.shape[1]), -self.largest, self.largest)
        return quotient.astype(self.element.dtype).view(np.uint8)

    def _squared_error(self, wide: np.ndarray, codes: np.ndarray, scales: np.ndarray, starts: np.ndarray) -> np.ndarray:
        spread = self._spread(scales.astype(np.float64), wide.shape[1])
        error = wide - codes.view(self.element.dtype).astype(np.float64) * spread
        return np.add.reduceat((error * error).sum(axis=0), starts)

    def _row_scales(self, packed: PackedArray) -> np.ndarray:
        """f64 [R, k]: the scale of every element."""
        *outer, k = packed.shape
        n = outer[-1] if outer else 1
        per_row = packed.scales.astype(np.float64)
        if self.block_rows > 1 and n:
            blocks = per_row.reshape(-1, -(-n // self.block_rows), per_row.shape[1])
            per_row = np.repeat(blocks, self.block_rows, axis=1)[:, :n].reshape(-1, per_row.shape[1])
        return self._spread(per_row, k)

    def unpack(self, packed: PackedArray) -> np.ndarray:
        """float32 of the shape that was packed."""
        wide = packed.codes.view(self.element.dtype).astype(np.float64) * self._row_scales(packed)
        return np.clip(wide, -_F32_MAX, _F32_MAX).astype(np.float32).reshape(packed.shape)

    def error_bound(self, packed: PackedArray, rounding: str = "mse") -> np.ndarray:
        """float64 of the packed shape: |x - unpack(pack(x))| of an element is never larger.

        Half the distance of neighbouring elements; of the largest element, how far rounding="mse" may clip; and the
        roundings of the quotient, which becomes an element by way of float32, and of the product to float32.
        """
        scales = np.abs(self._row_scales(packed))
        elements = np.abs(packed.codes.view(self.element.dtype).astype(np.float64))
        precision, smallest = (2.0**-4, 2.0**-9) if self.element == F8E4M3 else (2.0**-3, 2.0**-16)
        reach = np.maximum(elements * precision, smallest / 2)
        if rounding == "mse":
            reach = np.where(elements == self.largest, self.largest * (_CLIPS[-1] - 1), reach)
        wide = np.minimum(elements * scales, _F32_MAX)
        quotient = (elements * 1.25 + smallest) * 2.0**-24 + self.largest * QUOTIENT_SLACK
        bound = (reach + quotient) * scales + np.maximum(wide * 2.0**-23, 2.0**-149)
        return np.where(scales == 0, 0.0, bound).reshape(packed.shape)


def _read(name: str, fields: dict[str, str]) -> FP8Format:
    check_fields(name, fields, ("block", "scale"), f"{name}<block=128x128, scale=f32> or {name}<block=row, scale=f32>")
    block = fields["block"]
    rows, cross, columns = block.partition("x")
    if block == "row":
        rows, columns = "1", "0"
    elif not cross or not all(d.isdecimal() and len(d) < 10 and int(d) > 0 for d in (rows, columns)):
        raise ValueError(f"expected block=row or block=ROWSxCOLUMNS, like block=128x128, got {block}")
    return FP8Format(ELEMENTS[name], int(rows), int(columns), read_scale(fields["scale"]))


register_family(r"f8e4m3|f8e5m2", (), _read)
