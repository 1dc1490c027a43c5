"""What holds for every low-bit format: its error bound with both roundings, its bytes, its text, rows and joins."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from ir.formats import (
    BF16,
    F8E4M3,
    F16,
    I8,
    MXFP4,
    U8,
    FP8Format,
    GroupedIntFormat,
    LearnedFormat,
    PackedArray,
    ProductFormat,
    ScaledFormat,
    TableFormat,
    TernaryFormat,
    concatenate_packed,
    read_format,
)
from ir.parse_value import parse_format
from ir.sizes import num_bytes
from ir.types import TensorType
from tests.strategies.formats import arrays_for, low_bit_formats

ROUNDINGS = ("nearest", "mse")
SOME = [
    parse_format(text)
    for text in (
        "q4_sym<group=8, scale=f16>",
        "q3_zp<group=8, scale=bf16>",
        "q4_sym<group=8, scale=u8, channel=f16>",
        "q5_zp<group=8, scale=u8, channel=f32>",
        "q4_sym<group=8, scale=i8, channel=bf16>",
        "ternary<group=8, scale=f16>",
        "nf4<group=8, scale=f16>",
        "nl4<group=8, scale=i8, channel=f16>",
        "k3<group=8, scale=f16>",
        "pq<dim=4, bits=4, scale=f16>",
        "f8e4m3<block=row, scale=f32>",
        "f8e5m2<block=2x8, scale=bf16>",
        "mxfp4",
    )
]


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def squared_error(format: ScaledFormat, values: np.ndarray, rounding: str) -> float:
    wrong = values.astype(np.float64) - format.unpack(format.pack(values, rounding))
    return float((wrong * wrong).sum())


# -- every format, every array


@given(st.data(), low_bit_formats, st.sampled_from(ROUNDINGS))
def test_error_bound_holds(data: st.DataObject, format: ScaledFormat, rounding: str) -> None:
    values = data.draw(arrays_for(format))
    packed = format.pack(values, rounding)
    restored = format.unpack(packed)
    assert restored.dtype == np.float32 and restored.shape == values.shape
    error = np.abs(values.astype(np.float64) - restored.astype(np.float64))
    assert (error <= format.error_bound(packed, rounding)).all()
    assert (error <= format.error_bound(packed)).all()


@given(st.data(), low_bit_formats, st.sampled_from(ROUNDINGS))
def test_bytes_are_exact(data: st.DataObject, format: ScaledFormat, rounding: str) -> None:
    values = data.draw(arrays_for(format))
    packed = format.pack(values, rounding)
    assert packed.nbytes == format.nbytes(values.shape) == len(packed.tobytes())
    assert num_bytes(TensorType(values.shape, format), {}) == packed.nbytes
    again = PackedArray.frombytes(format, values.shape, packed.tobytes())
    assert again.tobytes() == packed.tobytes()
    np.testing.assert_array_equal(format.unpack(again), format.unpack(packed))


@given(low_bit_formats)
def test_text_is_read_back(format: ScaledFormat) -> None:
    assert parse_format(str(format)) == read_format(str(format)) == format


@given(st.data(), low_bit_formats)
def test_parts_make_the_same_array(data: st.DataObject, format: ScaledFormat) -> None:
    values = data.draw(arrays_for(format))
    packed = format.pack(values)
    zeros = packed.zero_array() if format.zero_point else None
    made = PackedArray.assemble(
        format, values.shape, packed.code_array(), packed.scales, zeros, packed.channel, packed.table
    )
    assert made.tobytes() == packed.tobytes()


@given(st.data(), low_bit_formats.filter(lambda f: f.channel is None and f != MXFP4))
def test_searched_scales_lose_no_more(data: st.DataObject, format: ScaledFormat) -> None:
    values = data.draw(arrays_for(format))
    loss = squared_error(format, values, "nearest") * 1.001 + 1e-60
    if values.shape[-1] == format.groups(values.shape[-1]):
        # One value alone can lie on any level: what is lost is the rounding of its scale, which is smaller for some.
        loss += float((values.astype(np.float64) ** 2).sum() * float(ml_dtypes.finfo(format.scale.dtype).eps) ** 2 / 4)
    assert squared_error(format, values, "mse") <= loss


# -- stacks and rows


@pytest.mark.parametrize("format", SOME, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_stack_is_its_matrices(format: ScaledFormat, rounding: str) -> None:
    values = normal(3, 5, 32)
    whole = format.pack(values, rounding)
    assert PackedArray.frombytes(format, values.shape, whole.tobytes()).tobytes() == whole.tobytes()
    for e in range(3):
        one, part = format.pack(values[e], rounding), whole.rows(e * 5, e * 5 + 5)
        assert part.tobytes() == one.tobytes()
        np.testing.assert_array_equal(format.unpack(part).reshape(5, 32), format.unpack(one))
    joined = concatenate_packed([whole.rows(0, 10), whole.rows(10, 15)])
    assert joined.tobytes() == whole.tobytes()


@pytest.mark.parametrize("format", SOME, ids=str)
def test_rows_are_cut_and_joined(format: ScaledFormat) -> None:
    packed = format.pack(normal(7, 32))
    cut = [packed.rows(0, 2), packed.rows(2, 6), packed.rows(6, 7)]
    assert [part.shape for part in cut] == [(2, 32), (4, 32), (1, 32)]
    np.testing.assert_array_equal(format.unpack(cut[1]), format.unpack(packed)[2:6])
    joined = concatenate_packed(cut)
    assert joined.shape == (7, 32) and joined.tobytes() == packed.tobytes()
    assert packed.rows(4, 4).shape == (0, 32)


def test_rows_that_share_a_scale_stay_together() -> None:
    packed = FP8Format(F8E4M3, 4, 8).pack(normal(10, 16))
    assert packed.rows(4, 10).scales.shape == (2, 2)
    for first, last in ((2, 8), (0, 6)):
        with pytest.raises(ValueError, match="cut through a block of 4 rows"):
            packed.rows(first, last)
    with pytest.raises(IndexError, match="rows 4 to 11"):
        packed.rows(4, 11)


def test_matrices_with_tables_of_their_own() -> None:
    format = LearnedFormat(2, 8)
    stack = format.pack(np.stack([normal(4, 16), np.abs(normal(4, 16))]))
    assert stack.table is not None and stack.table.shape == (2, 4)
    with pytest.raises(ValueError, match="of several matrices"):
        stack.rows(2, 6)
    with pytest.raises(ValueError, match="unlike tables"):
        concatenate_packed([format.pack(normal(4, 16)), format.pack(np.abs(normal(4, 16)))])
    with pytest.raises(ValueError, match="unlike formats or shapes"):
        concatenate_packed([format.pack(normal(4, 16)), MXFP4.pack(normal(4, 32))])


def test_a_given_table_is_used() -> None:
    table = np.array([-127, -40, 40, 127], np.int8)
    packed = LearnedFormat(2, 8).pack(normal(4, 16), "mse", table)
    assert packed.table is not None and packed.table.tolist() == table.tolist()
    with pytest.raises(ValueError, match="takes no table"):
        GroupedIntFormat(4, 8).pack(normal(4, 16), "mse", table)


# -- what is refused


@pytest.mark.parametrize("format", SOME, ids=str)
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(format: ScaledFormat, rounding: str, bad: float) -> None:
    values = np.zeros((3, 32), np.float32)
    values[2, 21] = bad
    with pytest.raises(DiagnosticError) as caught:
        format.pack(values, rounding)
    assert f"cannot store {bad} of row 2, column 21 as {format}" in str(caught.value)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("q4_zp<group=4, scale=f16>", "use scale=bf16 or scale=f32"),
        ("nl4<group=4, scale=f16>", "use scale=bf16 or scale=f32"),
        ("q4_sym<group=4, scale=u8, channel=f16>", "use channel=bf16 or channel=f32"),
        ("f8e4m3<block=row, scale=f16>", "use scale=bf16 or scale=f32"),
    ],
)
def test_values_too_large_for_the_scale_are_refused(text: str, hint: str, rounding: str) -> None:
    values = np.zeros((3, 8), np.float32)
    values[1, 1] = 1e9
    with pytest.raises(DiagnosticError) as caught:
        parse_format(text).pack(values, rounding)  # type: ignore[attr-defined]
    assert "row 1 has values up to 1e+09, too large for a scale in f16" in str(caught.value)
    assert hint in str(caught.value)


@pytest.mark.parametrize("format", [f for f in SOME if f.block_rows == 1 and not str(f).startswith("f8")], ids=str)
def test_rows_that_do_not_fill_groups_are_refused(format: ScaledFormat) -> None:
    for action in (lambda: format.pack(np.zeros((2, 37))), lambda: format.nbytes((2, 37))):
        with pytest.raises(DiagnosticError) as caught:
            action()
        assert f"{format} cannot hold rows of 37 elements" in str(caught.value)
        assert "expected: a number of columns that is a multiple of" in str(caught.value)


def test_parts_that_do_not_fit_are_refused() -> None:
    format = GroupedIntFormat(4, 8, zero_point=True)
    codes, scales, zeros = np.zeros((2, 16), np.uint8), np.ones((2, 2), np.float16), np.zeros((2, 2), np.uint8)
    wrong = [
        ({"zeros": None}, "is assembled without zeros"),
        ({"channel": np.ones(2, np.float16)}, "is assembled with channel"),
        ({"scales": np.ones((2, 2), np.float32)}, r"scales of \[2, 16\] in .* cannot be float32 \[2, 2\]"),
        ({"codes": codes[:, :8]}, r"codes of \[2, 16\] in .* cannot be uint8 \[2, 8\]"),
        ({"codes": codes + np.uint8(16)}, "code 16 of row 0, column 0 does not exist"),
        ({"zeros": zeros + np.uint8(16)}, "zero point 16 of row 0, column 0 does not exist"),
    ]
    for change, message in wrong:
        with pytest.raises(DiagnosticError, match=message):
            PackedArray.assemble(format, (2, 16), **{"codes": codes, "scales": scales, "zeros": zeros, **change})
    with pytest.raises(DiagnosticError, match="code 3 of row 1, column 0 does not exist in ternary"):
        PackedArray.assemble(
            TernaryFormat(0), (2, 4), np.array([[0] * 4, [3] * 4], np.uint8), np.ones((2, 1), np.float16)
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q4_sym<group=32, scale=u8>", "expected scale=u8 or scale=i8 under channel=f16, bf16 or f32, got scale=u8"),
        ("q4_sym<group=32, scale=f16, channel=f16>", "under channel=f16, bf16 or f32, got scale=f16"),
        ("q4_zp<group=32, scale=i8, channel=f16>", "expected scale=u8 beside zero points"),
        ("q4_sym<group=32, scale=u8, channel=u8>", "expected a scale of f16, bf16 or f32, got u8"),
        ("k5<group=32, scale=f16>", "expected 2 to 4 bits, got 5"),
        ("nf4<group=32>", "nf4 needs group and scale, like nf4<group=32, scale=f16>"),
        ("pq<dim=9, bits=8, scale=f16>", "expected a dim of 2 to 8, got 9"),
        ("pq<dim=row, bits=8, scale=f16>", "expected dim to be a number, got row"),
        ("pq<dim=2, bits=9, scale=f16>", "expected 1 to 8 bits, got 9"),
        ("f8e4m3<block=128, scale=f32>", "expected block=row or block=ROWSxCOLUMNS, like block=128x128, got 128"),
        ("f8e4m3<block=0x8, scale=f32>", "expected block=row or block=ROWSxCOLUMNS"),
        ("f8e4m3<scale=f32>", "f8e4m3 needs block and scale, like f8e4m3<block=128x128, scale=f32>"),
        ("ternery<group=8, scale=f16>", "did you mean 'ternary'"),
        ("mxfp5", "did you mean 'mxfp4'"),
    ],
)
def test_texts_that_make_no_sense(text: str, message: str) -> None:
    with pytest.raises(DiagnosticError) as caught:
        parse_format(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GroupedIntFormat(4, 32, False, U8), "u8 goes with channel"),
        (lambda: TableFormat("nf5", 32), "expected nf4 or nl4"),
        (lambda: TernaryFormat(-1), "expected a group"),
        (lambda: LearnedFormat(4, 32, F16, F16), "expected scale=u8 or scale=i8"),
        (lambda: ProductFormat(4, 8, U8), "expected a scale"),
        (lambda: FP8Format(BF16), "expected elements of f8e4m3 or f8e5m2"),
        (lambda: FP8Format(F8E4M3, 0, 8), "expected blocks of 1 or more"),
        (lambda: FP8Format(F8E4M3, 8, 0), "expected blocks of columns too"),
        (lambda: FP8Format(F8E4M3, 1, 0, I8), "expected a scale"),
        (lambda: GroupedIntFormat(4, 8).pack(np.ones((1, 8)), "up"), "expected a rounding of nearest or mse"),
        (lambda: FP8Format(F8E4M3).pack(np.ones((1, 8)), "up"), "expected a rounding of nearest or mse"),
    ],
)
def test_formats_that_make_no_sense(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# -- nothing but zeros


def test_all_zero_groups_stay_zero() -> None:
    for format in SOME:
        for rounding in ROUNDINGS:
            packed = format.pack(np.zeros((2, 32), np.float32), rounding)
            assert not format.unpack(packed).any()
            assert (format.error_bound(packed) < 1e-30).all()
            assert format == MXFP4 or not packed.scales.astype(np.float32).any()
