"""Rope and appending for GPUs: what attn.rope and kv.append mean, for widths of 8 lanes and of fewer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.rope import append_kernel, rope_kernel, rope_table_kernel
from ir.attributes import Rope
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, PlainFormat
from ir.grid_interpreter import interpret_grid
from ir.kv_state import KVState
from ir.ops.attention import RopeOp, RopeTableOp
from ir.ops.kv_cache import KVAppendOp
from ir.tile_memory_model import KernelFault
from tests.samples.base import normal

ELEMENTS = st.sampled_from([F32, BF16, F16])


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.sampled_from([2, 12, 64, 80, 128]), ELEMENTS)
def test_rope(tokens: int, heads: int, width: int, element: PlainFormat) -> None:
    x = normal(tokens, heads, width, element=element)
    angles = normal(tokens, width // 2, seed="angles")
    cos, sin = np.cos(angles), np.sin(angles)
    made = rope_kernel(heads, width, element, "rope")
    y = np.full_like(x, -1)
    interpret_grid(made.func, [x, cos, sin, y], blocks=tokens, threads=made.threads)
    rounding = 1e-6 if element == F32 else 2.0**-8
    want = RopeOp.reference(x, cos, sin).astype(np.float32)
    np.testing.assert_allclose(y.astype(np.float32), want, rtol=rounding, atol=rounding)


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


@settings(max_examples=6, deadline=None)
@given(st.integers(1, 3), st.sampled_from([6, 64, 128]), ELEMENTS)
def test_append(heads: int, width: int, element: PlainFormat) -> None:
    """Three tokens, two of one slot; nothing else of the cache is touched."""
    slots, positions, ctx = np.array([1, 0, 1], np.int32), np.array([4, 0, 5], np.int32), 8
    new = [normal(3, heads, width, seed=seed, element=element) for seed in ("keys", "values")]
    caches = [np.full((2, heads, ctx, width), 7).astype(BF16.dtype) for _ in new]
    state = KVState(*(c.swapaxes(1, 2).copy() for c in caches))  # [slots, ctx, heads, width]
    after = KVAppendOp.reference(state, *new, positions, slots)
    made = append_kernel(heads, width, element, "append")
    interpret_grid(made.func, [*new, slots, positions, *caches, ctx], blocks=3, threads=made.threads)
    for got, wanted in zip(caches, (after.keys, after.values), strict=True):
        np.testing.assert_array_equal(got.swapaxes(1, 2), wanted)


def test_two_tokens_of_one_place_race() -> None:
    made = append_kernel(1, 8, F32, "append")
    new, place = normal(2, 1, 8), np.zeros(2, np.int32)
    caches = [np.zeros((1, 1, 2, 8)).astype(BF16.dtype) for _ in range(2)]
    with pytest.raises(KernelFault, match="written by another without a barrier"):
        interpret_grid(made.func, [new, new, place, place, *caches, 2], blocks=2, threads=made.threads)


def test_heads_that_are_not_rotated() -> None:
    with pytest.raises(DiagnosticError, match="heads of 7 are not rotated"):
        rope_kernel(1, 7, F32, "rope")
