"""Arrays of plain formats: which numpy dtype an element is, rounding to it, reading it, and the error of doing so.

    dtype_of("bf16"), pack("bf16", values), unpack("bf16", packed), error_bound("bf16", values)

Formats go by their names: `ir.formats.plain` describes them, which is all that sizes need, and loads this for what
touches values. Refuses integers that a format does not represent.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

from ir.diagnostics import DiagnosticError

_DTYPES = {
    name: np.dtype(kind)
    for name, kind in {
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
    }.items()
}
# Relative error of rounding to nearest, smallest number above zero, largest finite number (IEEE 754; bfloat16 as f32).
_FLOATS = {
    "f64": (0.0, 0.0, math.inf),
    "f32": (2.0**-24, 2.0**-149, float(np.finfo(np.float32).max)),
    "f16": (2.0**-11, 2.0**-24, 65504.0),
    "bf16": (2.0**-8, 2.0**-133, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)),
    "f8e4m3": (2.0**-4, 2.0**-9, 448.0),
    "f8e5m2": (2.0**-3, 2.0**-16, 57344.0),
}


def dtype_of(name: str) -> np.dtype:
    """The numpy dtype of an element (of ml_dtypes for bf16 and the eight-bit floats)."""
    return _DTYPES[name]


def pack(name: str, values: np.ndarray) -> np.ndarray:
    """The values in the format: floats rounded to nearest, ties to even. Raises DiagnosticError for integers that it
    does not represent."""
    dtype = _DTYPES[name]
    with np.errstate(over="ignore", invalid="ignore"):
        packed = values.astype(dtype)
        if name == "f8e4m3":
            finite = np.clip(values.astype(np.float64), -448.0, 448.0)
            packed = np.where(np.isnan(values.astype(np.float64)), packed, finite.astype(dtype))
    if name not in _FLOATS and not np.array_equal(packed.astype(np.float64), values.astype(np.float64)):
        raise DiagnosticError(f"cannot store the values in {name}", expected=f"numbers that {name} represents")
    return packed


def unpack(name: str, packed: np.ndarray) -> np.ndarray:
    """float32 (float64 for f64 and the wide integers, which float32 does not hold exactly)."""
    wide = name in ("f64", "i32", "i64")
    return packed.astype(np.float64 if wide else np.float32)


def error_bound(name: str, values: np.ndarray) -> np.ndarray:
    """float64, like `values`: |x - unpack(pack(x))| is never larger. inf where x is out of range."""
    exact = np.abs(values.astype(np.float64))
    if name not in _FLOATS:
        return np.zeros_like(exact)
    precision, smallest, largest = _FLOATS[name]
    # unpack gives float32 or wider, which is exact
    return np.where(exact > largest, np.inf, np.maximum(exact * precision, smallest / 2))
