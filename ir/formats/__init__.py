"""Number formats: what the bits of an element mean.

Every format knows its exact size in bytes (`nbytes`), packs arrays of floats (`pack`), unpacks them (`unpack`) and
bounds the error of doing so (`error_bound`). Where the elements lie in memory is a layout, not a format.
"""

from __future__ import annotations

from ir.formats.grouped_int import GroupedIntFormat, PackedArray, read_grouped_format
from ir.formats.plain import (
    BF16,
    F16,
    F32,
    F64,
    I1,
    I8,
    I32,
    I64,
    PLAIN_FORMATS,
    U8,
    NumberFormat,
    PlainFormat,
)

__all__ = [
    "BF16",
    "F16",
    "F32",
    "F64",
    "I1",
    "I8",
    "I32",
    "I64",
    "PLAIN_FORMATS",
    "U8",
    "GroupedIntFormat",
    "NumberFormat",
    "PackedArray",
    "PlainFormat",
    "read_grouped_format",
]
