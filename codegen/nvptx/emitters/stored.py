"""What launches of products share: how a weight lies, its parts as arguments, what a kernel writes itself."""

from __future__ import annotations

from dataclasses import dataclass

from codegen.nvptx.fragments import Fragments
from codegen.nvptx.kernels.decode import MAX_ROWS, ROWS
from codegen.nvptx.launches import GridArgument, GridContext, WeightPart, refused_by
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import I32, PlainFormat
from ir.types import TensorType


@dataclass(frozen=True)
class Output:
    """What a product's kernel writes itself: where it lies, its element, whether a gate is part of it."""

    y: GridArgument
    element: PlainFormat
    gate: bool


def fragments_of(op: Op, type: TensorType) -> Fragments:
    """How a weight lies. Raises DiagnosticError for formats without a product."""
    n, k = type.shape[-2:]
    assert isinstance(n, int) and isinstance(k, int)
    try:
        return Fragments.of(n, k, type.element)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None


def weight_parts(layout: Fragments, weight: Value) -> list[GridArgument]:
    """Codes, and scales where there are some."""
    codes: list[GridArgument] = [WeightPart(weight, 0, I32)]
    return codes + ([WeightPart(weight, layout.code_bytes, layout.scale_element)] if layout.group else [])


def tile_rows(context: GridContext) -> int:
    """Rows that a product of a decode program is built for."""
    return ROWS if context.few <= ROWS else MAX_ROWS
