"""The share of a token's weight below which an expert may be replaced: what is one, and when it means something."""

from __future__ import annotations

from ir.diagnostics import DiagnosticError


def check_threshold(stand_ins: float | None, *, streams: bool) -> float:
    """The share of a token's weight below which stand-ins are used; 0 for none. Raises DiagnosticError."""
    if stand_ins is None:
        return 0.0
    if not 0 < stand_ins <= 1:
        raise DiagnosticError(
            f"stand-ins for experts of less than {stand_ins:g} of a token's weight",
            expected="a share above 0, at most 1",
        )
    if not streams:
        raise DiagnosticError(
            "stand-ins are used for experts that are not in memory, and everything is",
            expected="a budget (--memory) or a plan (--plan) as well",
        )
    return float(stand_ins)
