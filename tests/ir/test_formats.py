"""Number formats: exact sizes, packing, and error bounds that hold for every array, scale and width."""

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
    F8E5M2,
    F16,
    F32,
    F64,
    I8,
    I32,
    PLAIN_FORMATS,
    U8,
    GroupedIntFormat,
    NumberFormat,
    PackedArray,
    PlainFormat,
    read_format,
)
from ir.formats.bit_packing import pack_codes, row_bytes, unpack_codes
from ir.formats.scaled import round_up
from ir.parse_value import parse_format
from ir.sizes import num_bytes
from ir.types import TensorType

WIDTHS = range(1, 9)
SCALES = (F16, BF16, F32)

formats = st.builds(
    GroupedIntFormat,
    bits=st.integers(1, 8),
    group=st.sampled_from([0, 1, 2, 3, 8, 32]),
    zero_point=st.booleans(),
    scale=st.sampled_from(SCALES),
)


@st.composite
def arrays_for(draw: st.DrawFn, format: GroupedIntFormat) -> np.ndarray:
    """Rows that fill whole groups; magnitudes from denormals up to what the scale's format can take."""
    k = (format.group or draw(st.integers(1, 40))) * draw(st.integers(1, 3))
    n = draw(st.integers(0, 3))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    exponent = draw(st.integers(-40, 4) if format.scale == F16 else st.integers(-150, 126))
    values = rng.standard_normal((n, k)) * 2.0**exponent
    values *= 2.0 ** rng.integers(-6, 1, (n, k))  # unlike sizes within a group
    match draw(st.integers(0, 5)):
        case 0:
            values = np.abs(values)
        case 1:
            values = -np.abs(values)
        case 2:
            values[:] = 0
        case 3:
            values[:, ::2] = 0
        case 4:
            values[:] = 2.0**exponent
    dtype = draw(st.sampled_from([np.float32, np.float64, ml_dtypes.bfloat16]))
    return np.clip(values, -1e38, 1e38).astype(dtype)


@given(st.data(), formats)
def test_error_bound_holds(data: st.DataObject, format: GroupedIntFormat) -> None:
    values = data.draw(arrays_for(format))
    packed = format.pack(values)
    restored = format.unpack(packed)
    assert restored.dtype == np.float32
    assert restored.shape == values.shape
    error = np.abs(values.astype(np.float64) - restored.astype(np.float64))
    assert (error <= format.error_bound(packed)).all()


@given(st.data(), formats)
def test_error_bound_is_no_larger_than_a_step(data: st.DataObject, format: GroupedIntFormat) -> None:
    """A bound that is always true because it is huge would be worthless."""
    values = data.draw(arrays_for(format))
    packed = format.pack(values)
    groups = values.shape[-1] // packed.scales.shape[-1]
    grouped = np.abs(values.astype(np.float64)).reshape(*packed.scales.shape, groups)
    extent = 2 * grouped.max(axis=-1) / format.largest
    tiny = {"f16": 2.0**-24, "bf16": 2.0**-133, "f32": 2.0**-149}[format.scale.name]
    bound = format.error_bound(packed, "nearest").reshape(grouped.shape)
    assert (bound <= extent[..., None] * 1.02 + 2 * tiny).all()


@given(st.data(), formats)
def test_sizes_are_exact(data: st.DataObject, format: GroupedIntFormat) -> None:
    values = data.draw(arrays_for(format))
    packed = format.pack(values)
    assert packed.nbytes == format.nbytes(values.shape) == len(packed.tobytes())
    assert num_bytes(TensorType(values.shape, format), {}) == packed.nbytes
    again = PackedArray.frombytes(format, values.shape, packed.tobytes())
    np.testing.assert_array_equal(format.unpack(again), format.unpack(packed))


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zero_point", [False, True])
@pytest.mark.parametrize("group", [0, 8, 24])
def test_every_code_survives(bits: int, zero_point: bool, group: int) -> None:
    """What the format represents is packed without loss, for all codes of a width (with exact f16 scales)."""
    format = GroupedIntFormat(bits, group, zero_point, F16)
    levels = np.arange(2**bits) - (2 ** (bits - 1)) if not zero_point else np.arange(2**bits) - 2**bits // 3
    if bits == 1 and not zero_point:
        levels = np.array([-1, 1])
    if not zero_point and bits > 1:
        levels = levels[1:]  # the default rounding never uses the lowest code
    rng = np.random.default_rng(bits)
    values = rng.choice(levels, (4, 24)).astype(np.float32)
    values[:, ::8], values[:, 1::8] = levels[0], levels[-1]  # every group spans the whole range
    values *= np.float32(0.375)
    np.testing.assert_array_equal(format.unpack(format.pack(values)), values)


@given(st.integers(1, 8), st.integers(0, 5), st.integers(0, 70), st.integers(0, 2**16))
def test_codes_survive_bit_packing(bits: int, n: int, count: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 2**bits, (n, count)).astype(np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (n, row_bytes(count, bits)) == (n, math.ceil(count * bits / 8))
    np.testing.assert_array_equal(unpack_codes(packed, count, bits), codes)


def test_bits_lie_from_the_lowest_up() -> None:
    assert pack_codes(np.array([[0x3, 0xA, 0xF]], np.uint8), 4).tolist() == [[0xA3, 0x0F]]
    assert pack_codes(np.array([[1, 0, 0, 0, 0, 0, 0, 1, 1]], np.uint8), 1).tolist() == [[0x81, 0x01]]
    assert pack_codes(np.array([[0b101, 0b010, 0b111]], np.uint8), 3).tolist() == [[0b11010101, 0b1]]


def test_q4_by_hand() -> None:
    format = GroupedIntFormat(4, 4)
    packed = format.pack(np.array([[7.0, -7.0, 3.4, 0.0]], np.float32))
    assert packed.scales.tolist() == [[1.0]]
    assert packed.codes.tolist() == [[0x1F, 0x8B]]
    assert format.unpack(packed).tolist() == [[7.0, -7.0, 3.0, 0.0]]
    assert format.error_bound(packed, "nearest")[0, 0] == pytest.approx(0.5)


def test_zero_point_by_hand() -> None:
    format = GroupedIntFormat(2, 4, zero_point=True, scale=F32)
    packed = format.pack(np.array([[-1.0, 2.0, 0.4, 1.0]], np.float32))
    assert packed.scales.tolist() == [[1.0]]
    assert packed.zeros is not None
    assert packed.zeros.tolist() == [[1]]
    assert format.unpack(packed).tolist() == [[-1.0, 2.0, 0.0, 1.0]]


def test_one_bit_is_a_sign() -> None:
    format = GroupedIntFormat(1, 0, scale=F32)
    assert format.unpack(format.pack(np.array([[-0.5, 2.0, 0.0]], np.float32))).tolist() == [[-2.0, 2.0, 2.0]]


def test_groups_of_zeros_stay_zero() -> None:
    for bits in WIDTHS:
        for zero_point in (False, True):
            format = GroupedIntFormat(bits, 4, zero_point)
            packed = format.pack(np.zeros((2, 8), np.float32))
            assert not packed.scales.any()
            assert not format.unpack(packed).any()
            assert not format.error_bound(packed).any()


def test_sizes_by_hand() -> None:
    assert GroupedIntFormat(4, 32).nbytes((64, 64)) == 64 * (32 + 2 * 2)
    assert GroupedIntFormat(4, 32, True).nbytes((64, 64)) == 64 * (32 + 2 * 2 + 1)
    assert GroupedIntFormat(3, 0, scale=F32).nbytes((5, 7)) == 5 * (3 + 4)
    assert GroupedIntFormat(8, 16).nbytes((3, 5, 16)) == 15 * (16 + 2)
    assert GroupedIntFormat(2, 8).nbytes((8,)) == 2 + 2


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_refused(bad: float) -> None:
    values = np.zeros((3, 8), np.float32)
    values[2, 5] = bad
    with pytest.raises(DiagnosticError) as caught:
        GroupedIntFormat(4, 4).pack(values)
    assert f"cannot store {bad} of row 2, column 5 as q4_sym<group=4, scale=f16>" in str(caught.value)


def test_values_too_large_for_the_scale_are_refused() -> None:
    values = np.zeros((3, 8), np.float32)
    values[1, 6] = 1e6
    with pytest.raises(DiagnosticError) as caught:
        GroupedIntFormat(4, 4).pack(values)
    assert "group 1 of row 1 has values up to 1e+06, too large for a scale in f16" in str(caught.value)
    assert "use scale=bf16 or scale=f32" in str(caught.value)
    GroupedIntFormat(4, 4, scale=BF16).pack(values)


def test_rows_that_do_not_fill_groups_are_refused() -> None:
    format = GroupedIntFormat(4, 32)
    for action in (lambda: format.pack(np.zeros((2, 33))), lambda: format.nbytes((2, 33))):
        with pytest.raises(DiagnosticError) as caught:
            action()
        assert "cannot hold rows of 33 elements" in str(caught.value)
        assert "a multiple of the group of 32" in str(caught.value)
    with pytest.raises(DiagnosticError, match="cannot hold rows of 0 elements"):
        format.nbytes((2, 0))
    with pytest.raises(DiagnosticError, match="cannot hold rows of 0 elements"):
        GroupedIntFormat(4, 0).pack(np.zeros(()))


def test_bytes_of_a_wrong_number_are_refused() -> None:
    format = GroupedIntFormat(4, 32)
    with pytest.raises(DiagnosticError) as caught:
        PackedArray.frombytes(format, (2, 32), b"x" * 35)
    assert "35 bytes are no array [2, 32] in q4_sym<group=32, scale=f16>" in str(caught.value)
    assert "expected: 36 bytes" in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 32), "expected 1 to 8 bits, got 0"),
        ((4, -1), "expected a group"),
        ((4, 32, False, I8), "expected a scale of"),
    ],
)
def test_formats_that_make_no_sense(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupedIntFormat(*arguments)


@given(formats)
def test_grouped_formats_survive_text(format: GroupedIntFormat) -> None:
    assert parse_format(str(format)) == read_format(str(format)) == format


_written_fields = st.lists(
    st.tuples(
        st.sampled_from(["group", "scale", "channel", "block", "dim", "bits", "x"]),
        st.sampled_from(
            ["32", "032", "0", "row", "f16", "u8", "f32", "1x32", "2", "8", "-1", "2.5", '"f16"', "f8e4m3"]
        ),
    ),
    max_size=4,
)


@given(
    st.sampled_from(["q4_sym", "q4_zp", "q0_sym", "pq", "k4", "nf4", "f8e4m3", "kv", "tensor", "Q4"]), _written_fields
)
def test_what_is_read_without_the_grammar_is_what_the_grammar_reads(name: str, fields: list[tuple[str, str]]) -> None:
    text = f"{name}<{', '.join(f'{key}={value}' for key, value in fields)}>"
    try:
        expected = parse_format(text)
    except DiagnosticError:
        expected = None
    assert read_format(text) in (expected, None)


@pytest.mark.parametrize("name", sorted(PLAIN_FORMATS))
def test_plain_formats_survive_text(name: str) -> None:
    format = PLAIN_FORMATS[name]
    assert parse_format(str(format)) is read_format(str(format)) is format
    assert format.nbytes((3, 5)) == 15 * format.dtype.itemsize
    assert format.nbytes(()) == format.dtype.itemsize


@given(
    st.sampled_from([F32, F16, BF16, F64, F8E4M3, F8E5M2]),
    st.lists(st.floats(width=64, allow_nan=False, allow_infinity=False), max_size=8),
)
def test_error_bound_of_plain_formats_holds(format: PlainFormat, values: list[float]) -> None:
    given_values = np.array(values)
    restored = format.unpack(format.pack(given_values)).astype(np.float64)
    finite = np.isfinite(restored)
    bound = format.error_bound(given_values)
    assert (np.abs(given_values - restored)[finite] <= bound[finite]).all()
    assert np.isinf(bound[~finite]).all()


def test_integers_must_be_representable() -> None:
    assert I8.pack(np.array([-128, 127])).dtype == np.int8
    assert I32.unpack(I32.pack(np.array([2**31 - 1]))).tolist() == [2**31 - 1]
    assert U8.error_bound(np.array([1.0])).tolist() == [0.0]
    for values in ([300], [0.5], [-129]):
        with pytest.raises(DiagnosticError, match="cannot store the values in i8"):
            I8.pack(np.array(values))


def test_scales_are_rounded_up() -> None:
    rng = np.random.default_rng(0)
    values = np.abs(rng.standard_normal(1000)) * 2.0 ** rng.integers(-30, 15, 1000)
    for format in SCALES:
        up = round_up(values, format).astype(np.float64)
        down = np.nextafter(round_up(values, format), np.array(-np.inf, format.dtype)).astype(np.float64)
        assert (up >= values).all()
        assert (down < values).all()
    assert np.isinf(round_up(np.array([1e5]), F16).astype(np.float64)).all()


def test_a_format_says_how_large_it_is() -> None:
    with pytest.raises(TypeError, match="does not say how large it is"):
        NumberFormat().nbytes((1,))
