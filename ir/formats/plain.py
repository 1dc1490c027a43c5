"""Number formats whose every element is one machine number: f32, f16, bf16, f64, eight-bit floats and integers; and the
base of all.

f8e4m3 (no infinities, largest 448) and f8e5m2 (largest 57344) are the FP8 formats of arXiv:2209.05433; e8m0 is the
scale of the OCP MX formats (v1.0): 2**(byte - 127), without sign or zero. Packing saturates in f8e4m3, which has no
infinity to say that a number was too large; e8m0 refuses what is no power of two.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from ir.diagnostics import DiagnosticError


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
        return np.dtype(_DTYPES[self.name])

    @property
    def is_float(self) -> bool:
        return self.name in _FLOATS

    def nbytes(self, shape: tuple[int, ...]) -> int:
        return math.prod(shape) * self.dtype.itemsize

    def pack(self, values: np.ndarray) -> np.ndarray:
        """The values in this format: floats rounded to nearest, ties to even; integers must be representable."""
        with np.errstate(over="ignore", invalid="ignore"):
            packed = values.astype(self.dtype)
            if self.name == "f8e4m3":
                finite = np.clip(values.astype(np.float64), -448.0, 448.0)
                packed = np.where(np.isnan(values.astype(np.float64)), packed, finite.astype(self.dtype))
        if not self.is_float and not np.array_equal(packed.astype(np.float64), values.astype(np.float64)):
            raise DiagnosticError(f"cannot store the values in {self}", expected=f"numbers that {self} represents")
        return packed

    def unpack(self, packed: np.ndarray) -> np.ndarray:
        """float32 (float64 for f64 and the wide integers, which float32 does not hold exactly)."""
        wide = self.name in ("f64", "i32", "i64")
        return packed.astype(np.float64 if wide else np.float32)

    def error_bound(self, values: np.ndarray) -> np.ndarray:
        """float64, like `values`: |x - unpack(pack(x))| is never larger. inf where x is out of range."""
        exact = np.abs(values.astype(np.float64))
        if not self.is_float:
            return np.zeros_like(exact)
        precision, smallest, largest = _FLOATS[self.name]
        # unpack gives float32 or wider, which is exact
        return np.where(exact > largest, np.inf, np.maximum(exact * precision, smallest / 2))


# Relative error of rounding to nearest, smallest number above zero, largest finite number (IEEE 754; bfloat16 as f32).
_FLOATS = {
    "f64": (0.0, 0.0, math.inf),
    "f32": (2.0**-24, 2.0**-149, float(np.finfo(np.float32).max)),
    "f16": (2.0**-11, 2.0**-24, 65504.0),
    "bf16": (2.0**-8, 2.0**-133, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "f8e4m3": (2.0**-4, 2.0**-9, 448.0),
    "f8e5m2": (2.0**-3, 2.0**-16, 57344.0),
}
_DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
    "e8m0": ml_dtypes.float8_e8m0fnu,
    "i1": np.bool_,
    "i8": np.int8,
    "u8": np.uint8,
    "i32": np.int32,
    "i64": np.int64,
    "f64": np.float64,
}
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
