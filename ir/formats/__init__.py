"""Number formats: what the bits of an element mean.

Every format knows its exact size in bytes (`nbytes`), packs arrays of floats (`pack`), unpacks them (`unpack`) and
bounds the error of doing so (`error_bound`). Where the elements lie in memory is a layout, not a format.

A new family of formats is one file in this folder: it registers how its text is read (`ir.formats.registry`), which
imports every file of the folder when a text is read that is no plain format. Names of families are loaded when they
are asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from ir.formats.plain import (
    BF16,
    E8M0,
    F8E4M3,
    F8E5M2,
    F16,
    F32,
    F64,
    I1,
    I8,
    I32,
    I64,
    PLAIN_FORMATS,
    ROUNDINGS,
    U8,
    NumberFormat,
    PlainFormat,
)
from ir.formats.registry import format_family, format_names, format_word, read_format

if TYPE_CHECKING:
    from ir.formats.codebook import MXFP4, LearnedFormat, MXFP4Format, TableFormat, TernaryFormat
    from ir.formats.fp8 import FP8Format
    from ir.formats.grouped_int import GroupedIntFormat
    from ir.formats.packed import PackedArray, concatenate_packed
    from ir.formats.product import ProductFormat
    from ir.formats.scaled import ScaledFormat

__all__ = [
    "BF16",
    "E8M0",
    "F8E4M3",
    "F8E5M2",
    "F16",
    "F32",
    "F64",
    "I1",
    "I8",
    "I32",
    "I64",
    "PLAIN_FORMATS",
    "ROUNDINGS",
    "U8",
    "FP8Format",
    "MXFP4",
    "LearnedFormat",
    "MXFP4Format",
    "ProductFormat",
    "TableFormat",
    "TernaryFormat",
    "GroupedIntFormat",
    "NumberFormat",
    "PackedArray",
    "PlainFormat",
    "ScaledFormat",
    "concatenate_packed",
    "format_family",
    "format_names",
    "format_word",
    "read_format",
]

_HOMES = {
    "codebook": ("MXFP4", "LearnedFormat", "MXFP4Format", "TableFormat", "TernaryFormat"),
    "fp8": ("FP8Format",),
    "grouped_int": ("GroupedIntFormat",),
    "packed": ("PackedArray", "concatenate_packed"),
    "product": ("ProductFormat",),
    "scaled": ("ScaledFormat",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
