"""silu(gate) * up inside of a product: which rows of the joint matrix lie side by side, and what a lane does with them.

Gate and up rows take turns of 8. Of the fragments of `grid.mma`, the one with 8 gate rows and the one with 8 up rows
then have the two numbers of a result at one place of one lane.
"""

from __future__ import annotations

import numpy as np

from codegen.kernels.math import LOG2_E
from codegen.nvptx.builder import GridBuilder
from codegen.tile_builder import Expr
from ir.diagnostics import DiagnosticError

TURN = 8  # rows of gate, then so many of up


def check_gate_up(n: int) -> None:
    """Raises DiagnosticError unless a joint matrix of n rows has whole turns of gate and up rows."""
    if n % (2 * TURN):
        raise DiagnosticError(f"gate and up of {n // 2} rows each on GPUs", expected=f"a multiple of {TURN} rows")


def turns(n: int) -> np.ndarray:
    """The rows of a joint matrix (n / 2 of gate, then as many of up) in the order in which kernels want them."""
    check_gate_up(n)
    return np.arange(n).reshape(2, n // (2 * TURN), TURN).swapaxes(0, 1).reshape(-1)


def gated(k: GridBuilder, gate: Expr, up: Expr) -> Expr:
    """silu(gate) * up in f32."""
    return gate / (k.exp2(gate * -LOG2_E) + 1.0) * up
