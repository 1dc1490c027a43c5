"""The recipe below floats as numbers alone: what `w8a8` stores and computes in, without the arrays of its format.

    formats_below_floats("bf16").nbytes(tensor) == formats_of("w8a8", "bf16").nbytes(tensor)

Plans for whole devices say what that recipe would buy, and are made without numpy, which the format itself loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError
from ir.formats.plain import F16, NumberFormat
from passes.place.formats import LADDER, Formats
from passes.quantize.recipe import Choice, Recipe

_GROUP = 32


@dataclass(frozen=True)
class EightBits(NumberFormat):
    """`q8_sym<group=32, scale=f16>`: a byte an element, and a scale for each group of a row."""

    def __str__(self) -> str:
        return f"q8_sym<group={_GROUP}, scale=f16>"

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of codes and scales. DiagnosticError for rows that are no whole number of groups."""
        if not shape or shape[-1] % _GROUP or not shape[-1]:
            raise DiagnosticError(f"rows of {shape[-1] if shape else 0} elements", expected=f"groups of {_GROUP}")
        return math.prod(shape) + F16.nbytes((*shape[:-1], shape[-1] // _GROUP))


def formats_below_floats(dtype: str) -> Formats:
    """What `formats_of("w8a8", dtype)` says of bytes and of elements."""
    format = EightBits()
    return Formats(LADDER[1], Recipe(LADDER[1], weights=Choice(format=format, activations=format)), dtype)
