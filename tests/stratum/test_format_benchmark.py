"""`compile-model bench --formats`: which builds a table compares, what it says of each, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hw_targets.calibrate import Calibration
from ir.diagnostics import DiagnosticError
from passes.quantize.recipe import load_recipe
from stratum import format_benchmark
from stratum.cli import main
from stratum.format_benchmark import (
    FLOAT,
    FormatPlan,
    FormatRow,
    default_recipes,
    format_table,
    mark_choices,
    measure_formats,
    split_recipes,
)
from tests.plain_code import plain_code

ROW = FormatRow("w8a8", 8.5, 2_000_000, "bf16", 500.0, 40.0, 30e9, 40e9, 0.75, 0.001, 0.01, 0.99)
merit = st.integers(1, 4)


@st.composite
def measured_rows(draw: st.DrawFn) -> list[FormatRow]:
    return [
        FormatRow(str(i), weights_bytes=draw(merit), decode_ts=float(draw(merit)), kl_mean=float(draw(merit)))
        if draw(st.integers(0, 5))
        else FormatRow(str(i), fault="cannot be built")
        for i in range(draw(st.integers(1, 6)))
    ]


def beats(a: FormatRow, b: FormatRow) -> bool:
    assert a.decode_ts and b.decode_ts and a.kl_mean and b.kl_mean and a.weights_bytes and b.weights_bytes
    pairs = [(a.decode_ts, b.decode_ts), (b.weights_bytes, a.weights_bytes), (b.kl_mean, a.kl_mean)]
    return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)


@given(measured_rows())
def test_a_row_is_chosen_unless_another_is_better_in_everything(rows: list[FormatRow]) -> None:
    marked = mark_choices(rows)
    good = [row for row in marked if not row.fault]
    assert [replace(row, chosen=False) for row in marked] == rows
    assert all(not row.chosen for row in marked if row.fault)
    for row in good:
        assert row.chosen == (not any(beats(other, row) for other in good))


def test_without_divergence_speed_and_size_decide() -> None:
    rows = [
        FormatRow("a", weights_bytes=10, decode_ts=1.0),
        FormatRow("b", weights_bytes=5, decode_ts=2.0),
        FormatRow("c", weights_bytes=9, decode_ts=3.0),
    ]
    assert [row.chosen for row in mark_choices(rows)] == [False, True, True]


def test_the_default_is_every_recipe_of_weights_most_bits_first() -> None:
    names = default_recipes()
    assert names[0] == FLOAT and {"w8a8", "w6a8", "w5a8", "w4a8-g32", "w3", "w2a8"} <= set(names)
    assert not {"kv8", "none", "as-stored", "rotate64", "w8a8-fp8"} & set(names)
    order = [names.index(name) for name in ("w8a8", "w6a8", "w5a8", "w4a8-g32", "w3", "w2a8")]
    assert order == sorted(order)
    assert all(load_recipe(name).weights.format is not None for name in names[1:])


def test_recipes_stand_between_blanks() -> None:
    assert split_recipes(" w8a8 w4a8-g32,kv8  w8a8") == ("w8a8", "w4a8-g32,kv8")
    with pytest.raises(DiagnosticError, match="no recipe is named"):
        split_recipes("  ")


def test_the_table_says_what_was_measured() -> None:
    rows = [replace(ROW, chosen=True), FormatRow("w9", fault="there is no recipe 'w9'")]
    lines = format_table(rows, num_prompt=512, num_generate=128, depth=64).splitlines()
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "recipe", "bits/weight", "MB", "KV cache", "pp512 @ d64 t/s", "tg128 @ d64 t/s", "GB/s", "% bandwidth",
        "KL mean", "KL 99 %", "top-1 %",
    ]  # fmt: skip
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == [
        "* w8a8", "8.50", "2.0", "bf16", "500.0", "40.0", "30.0", "75.0", "0.001000", "0.0100", "99.00",
    ]  # fmt: skip
    assert lines[-1] == "w9: there is no recipe 'w9'"
    plain = format_table([FormatRow("w8a8", 8.5, 100, "bf16", decode_ts=1.0)], num_prompt=0, num_generate=8)
    assert "KL" not in plain and "pp0" not in plain


def test_builds_are_measured_and_compared_with_floats(
    llama_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    limits = Calibration(1, read_bandwidth=1e12, f32_peak=1e12)
    monkeypatch.setattr("hw_targets.calibrate.calibrate", lambda threads, **_: replace(limits, threads=threads))
    text = tmp_path / "text.txt"
    text.write_text("the matter of the rest is that it is there " * 8)
    arguments = ["-p", "8", "-n", "2", "-r", "1", "-t", "1", "--text", str(text), "--chunks", "1", "--json", "--quiet"]
    arguments += ["--dtype", "f32"]  # the row without a recipe is the reference then: one build less
    with plain_code():
        assert main(["bench", str(llama_directory), "--formats", "--recipes", "float w9 w8a8", *arguments]) == 0
    found = json.loads(capsys.readouterr().out)
    floats, missing, low = found["rows"]
    assert (found["n_prompt"], found["n_gen"], found["n_depth"]) == (8, 2, 0)
    assert missing["fault"].startswith("there is no recipe 'w9'") and missing["decode_ts"] is None
    assert 8 < low["bits_per_weight"] < 10 and floats["bits_per_weight"] == 32
    assert low["weights_bytes"] < floats["weights_bytes"]
    assert abs(floats["kl_mean"]) < 1e-9 < low["kl_mean"] < 0.1 and 0 < low["top1"] <= 1
    for row in (floats, low):
        assert row["prefill_ts"] > 0 and row["decode_ts"] > 0
        assert row["fraction_of_bandwidth"] == pytest.approx(row["decode_bytes_per_s"] / 1e12)
    assert floats["chosen"]


def test_a_model_that_no_recipe_builds_is_a_fault(tmp_path: Path) -> None:
    with pytest.raises(DiagnosticError) as caught:
        measure_formats(tmp_path / "none", (FLOAT, "w8a8"), FormatPlan())
    assert str(tmp_path / "none") in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text", "x"], "--text goes with --formats"),
        (["--json"], "--json goes with --formats"),
        (["--formats", "-n", "8,16"], "one value for -n, not 2"),
        (["--formats", "--recipe", "w8a8"], "none of --recipe"),
        (["--formats", "-p", "0", "-n", "0"], "nothing to measure"),
        (["--formats", "--recipes", " "], "no recipe is named"),
    ],
)
def test_refusals(llama_directory: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", str(llama_directory), *arguments]) == 2
    assert words in capsys.readouterr().err


def test_an_artifact_has_its_formats(llama_artifact: Path) -> None:
    with pytest.raises(DiagnosticError, match="an artifact has the formats that it was built with"):
        measure_formats(llama_artifact, (FLOAT,), FormatPlan())


def test_bits_are_those_of_the_low_bit_weights(llama_artifact: Path) -> None:
    from runtime.artifact import open_artifact

    manifest = open_artifact(llama_artifact).manifest
    entries = [
        {"format": "q8_sym<group=32, scale=f16>", "tensors": 2, "parameters": 64, "nbytes": 68},
        {"format": "bf16", "tensors": 1, "parameters": 1000, "nbytes": 2000},
    ]
    low = replace(manifest, raw={"weights": {"formats": entries}})
    assert format_benchmark.low_bits(low) == 8.5
    assert format_benchmark.low_bits(replace(manifest, raw={"weights": {"formats": entries[1:]}})) == 16.0
    assert format_benchmark.low_bits(replace(manifest, raw={})) is None
