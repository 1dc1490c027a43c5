"""Clipped rounding: it never loses more than nearest rounding in the measure that it minimises."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from ir.formats import GroupedIntFormat, PackedArray
from ir.parse_value import parse_format
from passes.quantize.calibrate.awq_clip import GroupGrams, divided, group_grams, round_clipped
from passes.quantize.calibrate.executor import Product
from passes.quantize.rounding import quantize_rows


def int_format(text: str) -> GroupedIntFormat:
    format = parse_format(text)
    assert isinstance(format, GroupedIntFormat)
    return format


def losses(packed: PackedArray, w: np.ndarray, x: np.ndarray, size: int) -> np.ndarray:
    """f64 [n, groups]: what each group of columns adds to the squared error of the products, a hundredth of its
    squared error times the mean of its inputs included."""
    groups = w.shape[1] // size
    d = (packed.format.unpack(packed).astype(np.float64) - w).reshape(len(w), groups, size)
    parts = x.astype(np.float64).reshape(len(x), groups, size)
    outputs = np.einsum("ngc,tgc->ngt", d, parts)
    mean = np.square(parts).sum(axis=(0, 2)) / size
    return np.square(outputs).sum(axis=-1) + 0.01 * mean * np.square(d).sum(axis=-1)


@settings(max_examples=25)
@given(
    text=st.sampled_from(
        (
            "q4_sym<group=32, scale=f16>",
            "q3_zp<group=32, scale=bf16>",
            "q8_sym<group=row, scale=f32>",
            "q2_zp<group=64, scale=f16>",
        )
    ),
    n=st.integers(1, 20),
    rows=st.integers(0, 40),
    seed=st.integers(0, 2**32),
)
def test_no_group_loses_more_than_rounded_to_nearest(text: str, n: int, rows: int, seed: int) -> None:
    format, rng = int_format(text), np.random.default_rng(seed)
    w = rng.standard_t(3, (n, 128)).astype(np.float32)
    x = (rng.standard_normal((rows, 128)) * rng.lognormal(0, 2, 128)).astype(np.float32)
    size = 128 // format.groups(128)
    found, nearest = round_clipped(format, w, group_grams(x, size)), quantize_rows(format, w, "mse")
    assert (losses(found, w, x, size) <= losses(nearest, w, x, size) * (1 + 1e-4) + 1e-30).all()
    if not rows:  # nothing is known of the input
        assert found.tobytes() == nearest.tobytes()


def test_a_large_weight_that_nothing_is_multiplied_by_is_clipped() -> None:
    rng = np.random.default_rng(1)
    w = rng.uniform(-1, 1, (8, 32)).astype(np.float32)
    w[:, 5] = 1.8
    x = rng.standard_normal((100, 32)).astype(np.float32)
    x[:, 5] *= 1e-3
    format = int_format("q4_sym<group=32, scale=f16>")
    found = round_clipped(format, w, group_grams(x, 32))
    values = format.unpack(found)
    assert (values[:, 5] < 1.3).all()
    nearest = format.unpack(quantize_rows(format, w, "mse"))
    assert np.square(x @ (values - w).T).sum() < 0.6 * np.square(x @ (nearest - w).T).sum()


def test_sums_of_inputs() -> None:
    x = np.random.default_rng(2).standard_normal((1500, 96)).astype(np.float32)
    s = np.linspace(0.5, 2, 96, dtype=np.float32)
    whole = x.astype(np.float64).T @ x
    for size in (32, 96):
        found = group_grams(x, size)
        for g in range(96 // size):
            part = slice(g * size, (g + 1) * size)
            np.testing.assert_allclose(found[g], whole[part, part], rtol=1e-4, atol=1e-2)
        np.testing.assert_allclose(divided(found, s), group_grams(x / s, size), rtol=1e-3, atol=1e-2)
        assert divided(found, None) is found


def test_experts_with_few_rows_get_those_of_all_tokens() -> None:
    x = np.random.default_rng(3).standard_normal((50, 64)).astype(np.float32)
    nobody: Any = None
    product = Product(nobody, "w", "experts.up", x[:4], lambda: x, nobody, 1, x)
    grams = GroupGrams(4)
    assert grams.of(product, "none", 32) is None
    own, more = grams.of(product, "own", 32), grams.of(product, "shared", 32)
    assert own is not None and more is not None
    np.testing.assert_allclose(own, group_grams(x[:4], 32))
    np.testing.assert_allclose(more, own + group_grams(x, 32) / 50 * (64 // 4 - 4))


def test_what_cannot_be_rounded_is_refused() -> None:
    w, grams = np.zeros((4, 32), np.float32), np.ones((1, 32, 32))
    with pytest.raises(DiagnosticError, match="cannot be calibrated"):
        round_clipped(int_format("q1_sym<group=32, scale=f16>"), w, grams)
    w[2, 3] = 1e9
    with pytest.raises(DiagnosticError, match="row 2"):
        round_clipped(int_format("q4_sym<group=32, scale=f16>"), w, grams)
