"""Low-bit formats, each family by hand: sizes, levels, scales, tables."""

from __future__ import annotations

import numpy as np
import pytest

from ir.formats import (
    BF16,
    E8M0,
    F8E4M3,
    F8E5M2,
    F16,
    F32,
    MXFP4,
    FP8Format,
    GroupedIntFormat,
    LearnedFormat,
    ProductFormat,
    ScaledFormat,
    TableFormat,
    TernaryFormat,
)
from ir.parse_value import parse_format


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(format: ScaledFormat, values: np.ndarray, rounding: str) -> float:
    wrong = values.astype(np.float64) - format.unpack(format.pack(values, rounding))
    return float((wrong * wrong).sum())


def test_sizes_by_hand() -> None:
    assert parse_format("q4_sym<group=32, scale=u8, channel=f16>").nbytes((8, 64)) == 8 * (32 + 2 + 2)
    assert TernaryFormat(32).nbytes((8, 64)) == 8 * (16 + 4)
    assert LearnedFormat(3, 32).nbytes((2, 8, 64)) == 16 * (24 + 4) + 2 * 8
    assert ProductFormat(4, 8).nbytes((8, 64)) == 8 * (16 + 2) + 256 * 4
    assert MXFP4.nbytes((8, 64)) == 8 * (32 + 2)
    assert FP8Format(F8E4M3, 128, 128).nbytes((2, 130, 200)) == 2 * (130 * 200 + 2 * 2 * 4)
    assert FP8Format(F8E5M2).nbytes((3, 7)) == 3 * (7 + 4)


def test_two_levels_by_hand() -> None:
    format = parse_format("q4_sym<group=2, scale=u8, channel=f32>")
    packed = format.pack(np.array([[7.0, -3.0, 0.0, 1785.0]], np.float32))  # type: ignore[attr-defined]
    assert packed.channel.tolist() == [1.0] and packed.scales.tolist() == [[1, 255]]
    assert format.unpack(packed).tolist() == [[7.0, -3.0, 0.0, 1785.0]]  # type: ignore[attr-defined]


def test_negative_scales_use_the_lowest_code() -> None:
    format = GroupedIntFormat(4, 4, scale=F32)
    values = np.array([[8.0, 3.0, -7.0, 1.0]], np.float32)
    packed = format.pack(values, "mse")
    assert packed.scales.tolist() == [[-1.0]] and packed.code_array().tolist() == [[0, 5, 15, 7]]
    assert format.unpack(packed).tolist() == values.tolist()


def test_ternary_by_hand() -> None:
    packed = TernaryFormat(4, F32).pack(np.array([[2.0, -2.0, 0.9, 0.0]], np.float32))
    assert packed.code_array().tolist() == [[2, 0, 1, 1]] and packed.scales.tolist() == [[2.0]]
    assert packed.format.unpack(packed).tolist() == [[2.0, -2.0, 0.0, 0.0]]


def test_nf4_levels_are_those_of_the_paper() -> None:
    levels = TableFormat("nf4", 4, F32).integer_levels
    assert levels[[0, 7, 15]].tolist() == [-127, 0, 127]
    exact = [-1, -0.696, -0.525, -0.395, -0.284, -0.185, -0.091, 0, 0.080, 0.161, 0.246, 0.338, 0.441, 0.563, 0.723, 1]
    np.testing.assert_allclose(levels / 127, exact, atol=0.005)
    packed = TableFormat("nf4", 4, F32).pack(np.array([[254.0, -254.0, 0.0, 20.0]], np.float32))
    assert packed.scales.tolist() == [[2.0]] and packed.code_array().tolist() == [[15, 0, 7, 8]]


def test_mxfp4_by_hand() -> None:
    values = np.zeros((1, 32), np.float32)
    values[0, :8] = [0.5, 1.0, 1.5, 2.0, -3.0, 4.0, 6.0, -0.5]
    packed = MXFP4.pack(values * 4)
    assert packed.code_array()[0, :9].tolist() == [1, 2, 3, 4, 13, 6, 7, 9, 0]
    assert packed.scales.dtype == E8M0.dtype and packed.scales.view(np.uint8).tolist() == [[129]]
    assert MXFP4.unpack(packed).tolist() == (values * 4).tolist()


def test_fp8_by_hand() -> None:
    format = FP8Format(F8E4M3, 2, 2)
    values = np.array([[448.0, 1.0, 3.0], [2.0, -0.5, 0.0], [1.0, 0.0, 0.0]], np.float32)
    packed = format.pack(values)
    assert packed.scales.shape == (2, 2)
    assert packed.scales[0, 0] == 1.0 and packed.codes[0, :2].tolist() == [0x7E, 0x38]
    np.testing.assert_allclose(format.unpack(packed), values, rtol=2**-4)


def test_learned_levels_fit_what_they_are_learned_from() -> None:
    values = np.abs(normal(64, 64)) ** 3 + 0.1  # far from what learning begins with
    learned = LearnedFormat(3, 16, F32)
    assert squared_error(learned, values, "mse") < 0.7 * squared_error(
        GroupedIntFormat(3, 16, scale=F32), values, "mse"
    )
    table = learned.pack(values).table
    assert table is not None and (np.diff(table.astype(int)) > 0).all()
    assert learned.pack(values, "mse").tobytes() == learned.pack(values, "mse").tobytes()


def test_nothing_to_learn_from() -> None:
    for format in (LearnedFormat(4, 8), ProductFormat(4, 8)):
        for values in (np.zeros((2, 16), np.float32), np.zeros((0, 16), np.float32)):
            assert not format.unpack(format.pack(values, "mse")).any()


def test_vectors_that_a_table_holds_are_kept() -> None:
    vectors = np.array([[127, 0], [0, -127], [50, 50], [-127, 3]], np.float32)
    values = np.tile(vectors, (8, 2)).reshape(8, -1)
    packed = ProductFormat(2, 2, F32).pack(values)
    np.testing.assert_array_equal(packed.format.unpack(packed), values)


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("q4_sym<group=32, scale=f16>", 0.0067),
        ("q4_zp<group=32, scale=f16>", 0.0061),
        ("q4_sym<group=32, scale=i8, channel=f16>", 0.0067),
        ("nl4<group=32, scale=f16>", 0.0054),
        ("k4<group=32, scale=f16>", 0.0054),
        ("q3_sym<group=32, scale=f16>", 0.0268),
        ("q2_sym<group=32, scale=f16>", 0.111),
        ("ternary<group=32, scale=f16>", 0.181),
        ("q1_sym<group=32, scale=f16>", 0.355),
        ("pq<dim=4, bits=8, scale=f16>", 0.11),
    ],
)
def test_squared_errors_of_normal_weights(text: str, most: float) -> None:
    """Relative squared errors; ggml's Q4_0 has 0.0074."""
    values = normal(64, 512, seed=3)
    format: ScaledFormat = parse_format(text)  # type: ignore[assignment]
    assert squared_error(format, values, "mse") / float((values.astype(np.float64) ** 2).sum()) < most


def test_scales_are_those_of_the_formats() -> None:
    for scale in (F16, BF16, F32):
        assert GroupedIntFormat(4, 8, scale=scale).pack(normal(2, 8), "mse").scales.dtype == scale.dtype
