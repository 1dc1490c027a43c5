"""The compiled rounding gives the bytes of the formats' own, for every family, dtype and shape."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from ir.formats import FP8Format
from ir.parse_value import parse_format
from passes.quantize import jit, rounding
from passes.quantize.rounding import quantize_rows

FORMATS = (
    "q4_sym<group=32, scale=f16>",
    "q4_zp<group=32, scale=f16>",
    "q1_sym<group=16, scale=bf16>",
    "q2_zp<group=8, scale=f32>",
    "q3_sym<group=row, scale=bf16>",
    "q8_sym<group=64, scale=f32>",
    "q4_sym<group=32, scale=u8, channel=f16>",
    "q4_sym<group=16, scale=i8, channel=f32>",
    "q5_zp<group=16, scale=u8, channel=bf16>",
    "ternary<group=64, scale=f16>",
    "nl4<group=32, scale=f16>",
    "nf4<group=32, scale=i8, channel=f16>",
    "k3<group=32, scale=f16>",
    "mxfp4",
    "pq<dim=4, bits=3, scale=f16>",
    "pq<dim=3, bits=8, scale=f32>",
    "f8e4m3<block=16x32, scale=f32>",
    "f8e4m3<block=row, scale=f32>",
    "f8e5m2<block=row, scale=f16>",
    "f8e5m2<block=33x50, scale=bf16>",
)


@st.composite
def weights(draw: st.DrawFn) -> np.ndarray:
    """[n, 192] with rows and groups of zeros, of denormals, of one sign, and with outliers."""
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    n, exponent = draw(st.integers(22, 70)), draw(st.sampled_from([0, 0, -6, -18, -50, 10]))
    values = rng.standard_normal((n, 192)) * 2.0 ** (rng.integers(-3, 4, (n, 192)) + exponent)
    values[3], values[5, 32:96] = 0, 0
    values[7] *= 2.0**-20
    values[9] = np.abs(values[9])
    values[11, 100] *= 50
    values[13] = values[13, 0]
    dtype = draw(st.sampled_from([np.float32, ml_dtypes.bfloat16, np.float16, np.float64]))
    return np.clip(values, -6e4, 6e4).astype(dtype)


@pytest.mark.parametrize("text", FORMATS)
@settings(max_examples=6)
@given(st.data())
def test_the_same_bytes(text: str, data: st.DataObject) -> None:
    format, values = parse_format(text), data.draw(weights())
    table = format.learn(values) if getattr(format, "table_shape", None) else None  # type: ignore[attr-defined]
    given_table = (table,) if table is not None else ()
    for kind in ("mse", "nearest"):
        slow = format.pack(values, kind, *given_table)  # type: ignore[attr-defined]
        fast = quantize_rows(format, values, kind, table)
        assert fast.tobytes() == slow.tobytes()
        assert (fast.format, fast.shape) == (slow.format, slow.shape)


@pytest.mark.parametrize("text", ["f8e4m3<block=row, scale=f32>", "f8e5m2<block=3x700, scale=f16>"])
def test_float8_of_long_rows(text: str) -> None:
    """Errors of many columns are added up by halves, as numpy does."""
    format = parse_format(text)
    assert isinstance(format, FP8Format)
    for k in (1, 8, 9, 136, 137, 2047, 5632):
        values = np.random.default_rng(k).standard_normal((-(-5000 // k), k)).astype(np.float32)
        assert quantize_rows(format, values).tobytes() == format.pack(values, "mse").tobytes()


def test_every_float8() -> None:
    """All elements, what lies half way between two of them, and what is just beside that."""
    for name in ("f8e4m3", "f8e5m2"):
        format = parse_format(f"{name}<block=row, scale=f32>")
        assert isinstance(format, FP8Format)
        elements = np.arange(128, dtype=np.uint8).view(format.element.dtype).astype(np.float64)
        elements = elements[np.isfinite(elements)]
        middles = (elements[1:] + elements[:-1]) / 2
        points = np.concatenate([elements, middles, np.nextafter(middles, 0), np.nextafter(middles, np.inf)])
        values = np.tile(np.concatenate([points, -points]), (9, 1))
        assert values.max() == format.largest  # so that the scale is 1
        packed = quantize_rows(format, values, "nearest")
        assert packed.tobytes() == format.pack(values, "nearest").tobytes()
        assert np.array_equal(packed.codes[0], values[0].astype(format.element.dtype).view(np.uint8))
        assert (np.abs(format.unpack(packed) - values) <= format.error_bound(packed, "nearest")).all()


def test_rows_are_rounded_by_themselves() -> None:
    values = np.random.default_rng(1).standard_normal((300, 128)).astype(np.float32)
    format = parse_format("q4_sym<group=32, scale=f16>")
    whole = quantize_rows(format, values)
    assert whole.rows(37, 200).tobytes() == quantize_rows(format, values[37:200]).tobytes()


def test_a_table_is_learned_from_the_whole_matrix() -> None:
    values = np.random.default_rng(1).standard_normal((64, 128)).astype(np.float32)
    format = parse_format("k2<group=32, scale=f16>")
    assert quantize_rows(format, values).tobytes() == format.pack(values, "mse").tobytes()  # type: ignore[attr-defined]


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize(
    "text", ["q4_sym<group=32, scale=f16>", "k2<group=32, scale=f16>", "nl4<group=row, scale=f32>"]
)
def test_numbers_that_are_not_finite_are_refused(text: str, dtype: type, bad: float) -> None:
    values = np.ones((80, 128), dtype)
    values[71, 99] = bad
    with pytest.raises(DiagnosticError, match=f"cannot store {bad} of row 71, column 99 as"):
        quantize_rows(parse_format(text), values)


def test_numbers_too_large_are_refused() -> None:
    values = np.ones((80, 128), np.float32)
    values[71, 99] = 1e9
    with pytest.raises(DiagnosticError, match="too large for a scale in f16"):
        quantize_rows(parse_format("q4_sym<group=32, scale=f16>"), values)


def test_more_threads_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(1).standard_normal((301, 96)).astype(np.float32)
    format = parse_format("q5_zp<group=32, scale=f16>")
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(jit, "thread_count", lambda threads=threads: threads)
        found.append(quantize_rows(format, values).tobytes())
    assert found[0] == found[1]


@pytest.mark.parametrize("count", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_ranges_cover_everything_once(count: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "thread_count", lambda: threads)
    seen = np.zeros(count, np.int64)

    def work(first: int, last: int) -> None:
        assert first % 64 == 0
        seen[first:last] += 1

    jit.run_in_threads(work, count, 64)
    assert (seen == 1).all()


def test_errors_of_threads_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jit, "thread_count", lambda: 2)

    def work(first: int, last: int) -> None:
        raise ValueError(f"{first} to {last}")

    with pytest.raises(ValueError, match=" to "):
        jit.run_in_threads(work, 100, 1)


def test_code_is_compiled_where_no_cache_can_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    taken = tmp_path / "file"
    taken.write_text("no folder")
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("STRATUM_CACHE", str(taken / "inside"))
    monkeypatch.setattr(jit.config, "CACHE_DIR", jit.config.CACHE_DIR)

    @jit.jit
    def double(x: int) -> int:
        return 2 * x

    assert double(21) == 42


def test_few_values_need_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounding, "_Rounding", None)
    values = np.ones((2, 32), np.float32)
    assert quantize_rows(parse_format("q4_sym<group=32, scale=f16>"), values).shape == (2, 32)
