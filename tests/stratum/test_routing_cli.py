"""`compile-model routing`: the figures it prints, the JSON, and files it refuses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from hw_targets.routing import Router, synthetic_trace, write_trace
from stratum.cli import main
from tests.hw_targets.routing_samples import DATA


@pytest.fixture
def small_file(tmp_path: Path) -> Path:
    """Four layers of 32 experts of 1 KiB, three for each of 60 tokens."""
    path = tmp_path / "small.csv"
    trace = synthetic_trace(Router(1.2), experts=32, top_k=3, layers=4, tokens=60, prompt=5, expert_bytes=1024)
    write_trace(trace, path)
    return path


def test_the_recorded_trace(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(DATA / "qwen.route.csv.gz"), "--capacity", "500MiB"]) == 0
    printed = capsys.readouterr().out
    assert "Qwen3-30B-A3B-Q4_K_M.gguf, 48 layers with 128 experts, 6 for each token" in printed
    assert "38 % at lag 1" in printed and "SRP 46.6 %" in printed
    row = next(line for line in printed.splitlines() if line.startswith("  500 MiB"))
    assert row.split()[2:] == ["0.0", "26.6", "29.2", "17.5", "22.8", "-", "-", "45.3"]
    assert re.search(r"^best       at 500 MiB: lr?fu, .*Belady 43\.\d %", printed, re.MULTILINE)


def test_a_small_trace_with_layers_and_fit(small_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(small_file), "--layers", "--fit"]) == 0
    printed = capsys.readouterr().out
    assert "\nknee " in printed and "\nrouter     Zipf exponent" in printed
    assert len(re.findall(r"^ +\d+ +\d+ +[\d.]+ %", printed, re.MULTILINE)) == 4
    assert "experts    128 KiB; one token uses 12 KiB" in printed


def test_warnings_of_a_cache_that_is_too_small(small_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(small_file), "--capacity", "2KiB"]) == 0
    assert "warning    the cache of 2048 B is less than the 3072 B" in capsys.readouterr().out


def test_json(small_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["routing", str(small_file), "--capacity", "24KiB", "--capacity", "1GiB", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["schema"] == "stratum.routing/1"
    assert (answer["layers"], answer["experts"], answer["top_k"], answer["decode_tokens"]) == (4, 32, 3, 60)
    assert len(answer["curves"]) == 8 * 2
    small, large = answer["choices"]
    assert small["bound"]["decode_hit_rate"] >= small["best"]["decode_hit_rate"] > 0
    assert small["candidates"][0]["decode_hit_rate"] >= small["candidates"][-1]["decode_hit_rate"]
    assert [warning["code"] for warning in large["warnings"]] == ["holds-everything"]


def test_a_file_that_is_no_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("hello\n")
    assert main(["routing", str(path)]) == 2
    error = capsys.readouterr().err
    assert "not a routing trace" in error and "hint: 'compile-model run MODEL --record-routing FILE'" in error
    assert main(["routing", str(path), "--capacity", "many"]) == 2
