"""Tables of angles for GPUs: what attn.rope_table means, up to large positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from codegen.nvptx.kernels.rope import rope_table_kernel
from ir.attributes import Rope
from ir.grid_interpreter import interpret_grid
from ir.ops.attention import RopeTableOp


@pytest.mark.parametrize("rope", [Rope(8), Rope(80, theta=5e5), Rope(128, scaling="linear", factor=4.0)], ids=str)
def test_tables(rope: Rope) -> None:
    positions = np.array([0, 1, 77, 4095, 131071], np.int32)
    half = rope.dim // 2
    made = rope_table_kernel(half, 1.25, "tables")
    cos, sin = (np.full((len(positions), half), np.nan, np.float32) for _ in range(2))
    arguments = [positions, rope.inverse_frequencies(), cos, sin]
    interpret_grid(made.func, arguments, blocks=len(positions), threads=made.threads)
    wanted: Any = RopeTableOp.reference(positions, rope=replace(rope, attention_factor=1.25))
    for got, want in zip((cos, sin), wanted, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=3e-7)
