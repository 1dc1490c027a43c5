"""Second-order rounding: never worse than nearest by its measure, nearest without correlations, one answer always."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from ir.formats import GroupedIntFormat
from ir.parse_value import parse_format
from passes.quantize.calibrate.gptq import Curvature, _second_order, gptq, gram, inverse_upper, weighted_error
from passes.quantize.calibrate.gptq_kernels import choose_candidates, descend, round_columns
from passes.quantize.rounding import quantize_rows


def int_format(text: str) -> GroupedIntFormat:
    format = parse_format(text)
    assert isinstance(format, GroupedIntFormat)
    return format


@st.composite
def problems(draw: st.DrawFn) -> tuple[GroupedIntFormat, np.ndarray, np.ndarray]:
    """(format, weights [n, k], inputs [rows, k]): correlated, sometimes fewer rows than columns, dead columns."""
    bits, kind = draw(st.integers(2, 8)), draw(st.sampled_from(("sym", "zp")))
    group, scale = draw(st.sampled_from(("32", "64", "row"))), draw(st.sampled_from(("f16", "bf16", "f32")))
    k = draw(st.sampled_from((64, 192)))
    n, rows = draw(st.integers(1, 9)), draw(st.sampled_from((5, 40, 300)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    w = rng.standard_normal((n, k)) * 10.0 ** draw(st.integers(-3, 2))
    w[:, : draw(st.sampled_from((0, 32)))] = 0
    x = rng.standard_normal((rows, k)) @ (rng.standard_normal((k, k)) / 8 + np.eye(k)) + rng.standard_normal((rows, 1))
    x[:, -draw(st.integers(1, 8)) :] *= draw(st.sampled_from((0.0, 1.0, 30.0)))
    return int_format(f"q{bits}_{kind}<group={group}, scale={scale}>"), w.astype(np.float32), x.astype(np.float32)


@settings(max_examples=25)
@given(problems())
def test_the_weighted_error_is_never_larger_than_that_of_the_nearest(problem: Any) -> None:
    format, w, x = problem
    curvature = Curvature.of(gram(x))
    assert curvature is not None
    packed = gptq(format, w, curvature)
    assert packed.format == format and packed.shape == w.shape
    nearest = quantize_rows(format, w, "mse")
    found = weighted_error(w, format.unpack(packed), curvature.h)
    limit = weighted_error(w, format.unpack(nearest), curvature.h)
    assert np.all(found <= limit * (1 + 1e-5) + 1e-30)


def test_correlated_inputs_lose_much_less() -> None:
    rng = np.random.default_rng(1)
    x = (rng.standard_normal((600, 6)) @ rng.standard_normal((6, 128)) + 0.1 * rng.standard_normal((600, 128))).astype(
        "f4"
    )
    w = rng.standard_normal((16, 128)).astype(np.float32)
    format = int_format("q4_sym<group=128, scale=f16>")
    curvature = Curvature.of(gram(x))
    assert curvature is not None

    def loss(values: np.ndarray) -> float:
        return float(np.square(x @ (values - w).T).sum())

    finer = int_format("q4_sym<group=32, scale=f16>")
    assert loss(format.unpack(gptq(format, w, curvature))) < 0.2 * loss(finer.unpack(quantize_rows(finer, w, "mse")))


def test_columns_behind_make_up_for_what_is_lost() -> None:
    """The order of columns by itself, before scales and codes are improved together."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((600, 96)) @ (rng.standard_normal((96, 96)) / 4) + rng.standard_normal((600, 1))
    w = rng.standard_normal((16, 96)).astype(np.float32)
    format = int_format("q4_sym<group=32, scale=f16>")
    curvature = Curvature.of(gram(x.astype(np.float32)))
    assert curvature is not None
    ordered = _second_order(format, w, curvature).values()
    nearest = format.unpack(quantize_rows(format, w, "mse"))
    h = curvature.h
    assert weighted_error(w, ordered, h).sum() < 0.6 * weighted_error(w, nearest, h).sum()


@given(st.integers(0, 2**32), st.sampled_from((1, 7, 64)))
def test_columns_without_correlation_get_their_nearest_codes(seed: int, n: int) -> None:
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n, 32)).astype(np.float32)
    scales = np.repeat(rng.uniform(-1, 1, (n, 1)).astype(np.float32), 32, axis=1)
    zeros = np.repeat(rng.integers(0, 16, (n, 1)).astype(np.float32), 32, axis=1)
    codes, errors = np.zeros(w.shape, np.uint8), np.zeros_like(w)
    round_columns(w.copy(), np.eye(32, dtype=np.float32), scales, zeros, np.float32(15), codes, errors)
    wanted = np.clip(np.rint(w / scales) + zeros, 0, 15)
    assert np.array_equal(codes, wanted)
    np.testing.assert_array_equal(errors, w - (wanted - zeros) * scales)
    # and there is no single code whose move loses less
    moved, gradient = codes.copy(), (codes - zeros) * scales - w
    descend(gradient, np.eye(32, dtype=np.float32), scales, zeros, np.float32(15), moved, 3)
    assert np.array_equal(moved, codes)


def test_candidates_are_weighed_by_column() -> None:
    values = np.array([[1.0, 0.3], [1.0, 0.3]], np.float32)
    scales = np.array([[1.0, 0.3]] * 2, np.float32)
    zeros = np.full((2, 2), 1, np.float32)
    best = np.zeros(2, np.int32)
    choose_candidates(values, np.array([1, 0.01], np.float32), scales, zeros, np.float32(2), best)
    assert best.tolist() == [0, 0]
    choose_candidates(values, np.array([0.01, 1], np.float32), scales, zeros, np.float32(2), best)
    assert best.tolist() == [1, 1]


def test_the_same_problem_gives_the_same_bytes() -> None:
    rng = np.random.default_rng(5)
    x, w = rng.standard_normal((200, 96)).astype(np.float32), rng.standard_normal((40, 96)).astype(np.float32)
    curvature = Curvature.of(gram(x))
    assert curvature is not None
    for text in ("q4_sym<group=32, scale=f16>", "q3_zp<group=row, scale=bf16>"):
        first, second = (gptq(int_format(text), w, curvature).tobytes() for _ in range(2))
        assert first == second


@given(st.integers(1, 200), st.integers(0, 2**32))
def test_the_inverse_of_a_triangle(k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    r = np.triu(rng.standard_normal((k, k))) / np.sqrt(k) + 2 * np.eye(k)
    inverse = inverse_upper(r)
    assert np.array_equal(inverse, np.triu(inverse))
    np.testing.assert_allclose(inverse @ r, np.eye(k), atol=1e-9)


def test_curvature_is_the_inverse_of_its_factor() -> None:
    x = np.random.default_rng(2).standard_normal((50, 20)).astype(np.float32)
    curvature = Curvature.of(gram(x))
    assert curvature is not None
    np.testing.assert_allclose(curvature.u.T @ curvature.u @ curvature.h, np.eye(20), atol=1e-3)
    assert np.array_equal(curvature.u, np.triu(curvature.u))


def test_inputs_that_say_nothing_have_no_curvature() -> None:
    assert Curvature.of(np.zeros((4, 4))) is None
    assert Curvature.of(np.full((4, 4), np.nan)) is None


@pytest.mark.parametrize(
    "text", ["q1_sym<group=32, scale=f16>", "q4_sym<group=32, scale=u8, channel=f16>", "nf4<group=32, scale=f16>"]
)
def test_formats_that_cannot_be_calibrated_are_refused(text: str) -> None:
    curvature = Curvature.of(np.eye(32))
    assert curvature is not None
    format: Any = parse_format(text)
    with pytest.raises(DiagnosticError, match="cannot be calibrated"):
        gptq(format, np.ones((2, 32), np.float32), curvature)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 3e38])
def test_weights_that_no_scale_can_hold_are_refused(bad: float) -> None:
    curvature = Curvature.of(np.eye(32))
    assert curvature is not None
    w = np.ones((3, 32), np.float32)
    w[1, 5] = bad
    with pytest.raises(DiagnosticError):
        gptq(int_format("q4_sym<group=32, scale=f16>"), w, curvature)
