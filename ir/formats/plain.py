"""Number formats whose every element is one machine number: f32, f16, bf16, f64, eight-bit floats and integers; and the
base of all.

f8e4m3 (no infinities, largest 448) and f8e5m2 (largest 57344) are the FP8 formats of arXiv:2209.05433; e8m0 is the
scale of the OCP MX formats (v1.0): 2**(byte - 127), without sign or zero. Packing saturates in f8e4m3, which has no
infinity to say that a number was too large; e8m0 refuses what is no power of two.

Names and sizes are here, values in `ir.formats.plain_arrays`: what only counts bytes loads no numpy.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

ROUNDINGS = ("nearest", "mse")  # how `pack` of a low-bit format chooses scales and codes


@dataclass(frozen=True)
class NumberFormat:
    """Base of all formats; `str()` is the text form (`bf16`, `q4_sym<group=32, scale=f16>`)."""

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of an array of this shape, whatever the format stores beside the elements included."""
        raise TypeError(f"{type(self).__name__} does not say how large it is")


@dataclass(frozen=True)
class PlainFormat(NumberFormat):
    """One element, one machine number. `dtype` is the numpy dtype (ml_dtypes for bf16)."""

    name: str
    bits: int

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> np.dtype:
        from ir.formats.plain_arrays import dtype_of

        return dtype_of(self.name)

    @property
    def is_float(self) -> bool:
        return self.name in _FLOATS

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * max(1, self.bits // 8)  # a bit of its own takes a byte

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The values in this format: floats rounded to nearest, ties to even; integers must be representable."""
        from ir.formats.plain_arrays import pack

        return pack(self.name, values)

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """float32 (float64 for f64 and the wide integers, which float32 does not hold exactly)."""
        from ir.formats.plain_arrays import unpack

        return unpack(self.name, packed)

    def error_bound(self, values: np.ndarray) -> np.ndarray:
        """float64, like `values`: |x - unpack(pack(x))| is never larger. inf where x is out of range."""
        from ir.formats.plain_arrays import error_bound

        return error_bound(self.name, values)


_FLOATS = ("f64", "f32", "f16", "bf16", "f8e4m3", "f8e5m2")
F32 = PlainFormat("f32", 32)
F16 = PlainFormat("f16", 16)
BF16 = PlainFormat("bf16", 16)
F64 = PlainFormat("f64", 64)
F8E4M3 = PlainFormat("f8e4m3", 8)
F8E5M2 = PlainFormat("f8e5m2", 8)
E8M0 = PlainFormat("e8m0", 8)
I1 = PlainFormat("i1", 1)
I8 = PlainFormat("i8", 8)
U8 = PlainFormat("u8", 8)
I32 = PlainFormat("i32", 32)
I64 = PlainFormat("i64", 64)
PLAIN_FORMATS = {f.name: f for f in (F32, F16, BF16, F64, F8E4M3, F8E5M2, E8M0, I1, I8, U8, I32, I64)}
