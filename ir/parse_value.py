"""Types, number formats and layouts from strings of their own, as recipes, manifests and options name them.

    parse_type("tensor<4x8xbf16>"), parse_format("q4_sym<group=32, scale=f16>"), parse_layout("strips<rows=64, pack=2>")

The grammar is loaded when the first is read. Raises DiagnosticError for what means nothing.
"""

from __future__ import annotations

from typing import Any

from ir.diagnostics import DiagnosticError
from ir.formats import NumberFormat
from ir.text_reader import TextFault
from ir.types import Layout, Type


def _read(text: str, kind: type, what: str) -> Any:
    from ir.parser import shared_reader

    try:
        reader = shared_reader()
        found = reader.type(text.strip()) if kind is Type else reader.bracketed_or_word(text.strip())
    except TextFault as fault:
        raise DiagnosticError(f"{fault.message} in {text.strip()!r}") from fault
    if not isinstance(found, kind):
        raise DiagnosticError(f"expected {what}, got {text.strip()!r}")
    return found


def parse_type(text: str) -> Type:
    """The type that a string names. Raises DiagnosticError."""
    return _read(text, Type, "a type")


def parse_format(text: str) -> NumberFormat:
    """The number format that a string names: `bf16`, `q4_sym<group=32, scale=f16>`. Raises DiagnosticError."""
    return _read(text, NumberFormat, "a number format")


def parse_layout(text: str) -> Layout:
    """The layout that a string names: `strips<rows=64, pack=2>`. Raises DiagnosticError."""
    return _read(text, Layout, "a layout")
