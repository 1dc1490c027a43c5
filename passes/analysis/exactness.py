"""Which number formats hold which others without rounding."""

from __future__ import annotations

from ir.formats import BF16, F16, F32, F64, NumberFormat

_HOLDS_ALL_OF: dict[NumberFormat, tuple[NumberFormat, ...]] = {
    F64: (F64, F32, F16, BF16),
    F32: (F32, F16, BF16),
    F16: (F16,),
    BF16: (BF16,),
}


def is_exact(source: NumberFormat, to: NumberFormat) -> bool:
    """Whether every number of format `source` is one of format `to`."""
    return source in _HOLDS_ALL_OF.get(to, ())
