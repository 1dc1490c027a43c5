"""`compile-model bench`: which tests run, the figures they give, and both output formats."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from hw_targets.calibrate import Calibration
from ir.diagnostics import DiagnosticError
from runtime.session import Session
from stratum import benchmark
from stratum.benchmark import BenchTest, Result, Work
from stratum.cli import main

PLAIN = Result(BenchTest(512, 0, 0), 2, (10**9, 2 * 10**9, 10**9), (1, 1, 1), Work(1e9, 5e9))


def test_combinations_in_order() -> None:
    names = [t.name for t in benchmark.plan_tests((128, 512), (16,), (0, 1024))]
    assert names == ["pp128", "pp512", "tg16", "pp128 @ d1024", "pp512 @ d1024", "tg16 @ d1024"]
    assert benchmark.plan_tests((0,), (0,), (0,)) == []


def test_context_is_checked_before_anything_runs() -> None:
    tests = benchmark.plan_tests((512,), (128,), (0, 64))
    assert benchmark.check_context(tests, 576, "x") == 576
    with pytest.raises(DiagnosticError, match="context of 576 positions"):
        benchmark.check_context(tests, 575, "x")


def test_rates_are_means_of_rates() -> None:
    assert PLAIN.samples_ts == (512.0, 256.0, 512.0)
    assert math.isclose(PLAIN.avg_ts, 1280 / 3)
    assert math.isclose(PLAIN.stddev_ts, 147.801, rel_tol=1e-5)  # of a sample: divided by n - 1
    assert PLAIN.ttft_ms == 1000.0 and PLAIN.tpot_ms is None
    assert PLAIN.bytes_per_s == 1e9 and PLAIN.flops_per_s == 5e9
    tg = Result(BenchTest(0, 4, 0), 1, (8 * 10**6,), (1,), Work(0, 0))
    assert tg.tpot_ms == 2.0 and tg.ttft_ms is None and tg.stddev_ts == 0.0


def test_shares_of_the_machine() -> None:
    calibration = Calibration(2, read_bandwidth=2e9, f32_peak=10e9, bf16_peak=20e9)
    assert benchmark.limits(PLAIN, "bf16", calibration) == (0.5, 0.25)
    assert benchmark.limits(PLAIN, "f32", calibration) == (0.5, 0.5)
    assert benchmark.limits(PLAIN, "bf16", None) == (None, None)


def test_work_of_generation_is_the_weights_once_a_token(llama_artifact: Path) -> None:
    with Session(llama_artifact, threads=1) as session:
        manifest = session.manifest
    one = benchmark.work_of(manifest, BenchTest(0, 1, 0))
    weights = manifest.weights.bytes
    assert 0.5 * weights < one.bytes < 1.5 * weights  # less the embedding table, plus activations
    assert benchmark.work_of(manifest, BenchTest(0, 8, 0)).bytes == pytest.approx(
        8 * one.bytes + manifest.kv.bytes_per_position * 28
    )
    # 2 FLOPs a weight of every matrix but the embedding table, and little else
    matrices = 94784 - 258 * 64
    assert one.flops == pytest.approx(2 * matrices, rel=0.05)
    prompt = benchmark.work_of(manifest, BenchTest(100, 0, 0))
    head = 2 * 258 * 64
    attention = 4 * 2 * 64 * sum(range(100))
    assert prompt.flops == pytest.approx(100 * (one.flops - head) + head + attention, rel=0.02)


def test_measuring_repeats_after_a_warm_up(llama_artifact: Path) -> None:
    with Session(llama_artifact, threads=1, max_context=64) as session:
        result = benchmark.measure(session, BenchTest(8, 0, 16), 3)
        assert len(result.samples_ns) == 3 and all(ns > 0 for ns in result.samples_ns)
        assert session.filled(0) == 24
        result = benchmark.measure(session, BenchTest(0, 5, 3), 2)
        assert session.filled(0) == 8
        assert all(first <= total for first, total in zip(result.first_step_ns, result.samples_ns, strict=True))


def test_table_and_records(llama_artifact: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(llama_artifact), "-p", "8,16", "-n", "4", "-r", "2", "-t", "1", "--no-calibration"]
    assert main([*arguments, "--jsonl", str(tmp_path / "log.jsonl")]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    header = [cell.strip() for cell in lines[0].split("|")[1:-1]]
    assert header[:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert [line.split("|")[6].strip() for line in lines[2:]] == ["pp8", "pp16", "tg4"]
    assert all(" ± " in line for line in lines[2:])
    assert len({len(line) for line in lines}) == 1
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [(r["n_prompt"], r["n_gen"], r["n_depth"]) for r in records] == [(8, 0, 0), (16, 0, 0), (0, 4, 0)]
    assert all(len(r["samples_ts"]) == 2 and r["n_threads"] == 1 for r in records)
    assert main([*arguments, "-o", "jsonl", "-q"]) == 0
    captured = capsys.readouterr()
    assert len([json.loads(line) for line in captured.out.splitlines()]) == 3 and captured.err == ""


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["-p", "0", "-n", "0"], "nothing to measure"),
        (["-p", "x"], "expected whole numbers"),
        (["-t", "0"], "expected whole numbers >= 1"),
        (["-p", "100000"], "the tests need a context of 100000 positions"),
    ],
)
def test_wrong_options(
    llama_artifact: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    assert main(["bench", str(llama_artifact), *arguments]) == 2
    assert text in capsys.readouterr().err
