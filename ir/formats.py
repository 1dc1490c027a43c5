"""Number formats: what the bits of an element mean.

Every format knows its exact size in bytes, packs float arrays into bytes and unpacks them, and states its error bound.
Float formats are f32, f16, bf16; integers i1, i8, i32, i64; `GroupedIntFormat` is the general low-bit weight format.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np


@dataclass(frozen=True)
class NumberFormat:
    """Base of all formats; `str()` is the text form (`bf16`, `q4_sym<group=32, scale=f16>`)."""


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
        return self.name in ("f32", "f16", "bf16", "f64")

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Exact bytes of an array of this shape."""
        size = 1
        for d in shape:
            size *= d
        return size * self.dtype.itemsize


_DTYPES = {
    "f32": np.float32,
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
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
I1 = PlainFormat("i1", 1)
I8 = PlainFormat("i8", 8)
U8 = PlainFormat("u8", 8)
I32 = PlainFormat("i32", 32)
I64 = PlainFormat("i64", 64)
PLAIN_FORMATS = {f.name: f for f in (F32, F16, BF16, F64, I1, I8, U8, I32, I64)}


def read_grouped_format(bits, scheme, fields):
    raise ValueError("no")
