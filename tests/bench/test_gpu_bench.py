"""bench.gpu without a GPU: its refusals, and its whole way with a driver whose launches are interpreted."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bench.gpu as bench_gpu
from bench import gpu_kernels, gpu_models
from bench.gpu import main
from bench.gpu_attention_cases import small_attention
from bench.gpu_cases import GpuCase, small_cases
from bench.gpu_dense_cases import small_dense
from bench.gpu_device import MeasuringDevice
from bench.gpu_moe_cases import small_experts, small_group_experts
from bench.gpu_product_cases import small_fp8, small_products, small_wgmma
from bench.gpu_rows import MODELS, Row, in_order, rows_table
from codegen.nvptx import gpu_code
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.lower_to_grid import LoweredGridStep, lower_grid_step
from ir.diagnostics import DiagnosticError
from runtime.artifact import open_artifact
from runtime.cuda.device import open_device
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import GridRunner

PTX_HEAD = ".version 7.8\n"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is given holds the names of the kernels only."""

    def names(kernels: list[GridKernel], architecture: str) -> str:
        return PTX_HEAD + "".join(f".entry {k.name}(" for k in kernels)

    monkeypatch.setattr(gpu_kernels, "compile_ptx", names)


def run(cases: list[GpuCase], *arguments: str, **named: Any) -> int:
    driver = EmulatedDriver(GridRunner([c.kernel for c in cases]), order="eager", **named)
    return main(arguments, lambda: cases, lambda: open_device(driver=driver), apart=False)


@pytest.mark.usefixtures("no_compiler")
def test_every_small_case_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [*small_cases(), *small_products(), *small_wgmma(), *small_fp8(), *small_attention()]
    cases += [*small_experts(), *small_group_experts(), *small_dense()]
    assert run(cases, "--check") == 0
    said = capsys.readouterr().out
    assert "emulated GPU, PTX for sm_90" in said and "WRONG" not in said
    assert all(f"| {c.name} " in said for c in cases)


@pytest.mark.usefixtures("no_compiler")
def test_measured_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Beside a copy and torch; a kernel that does not compile is a row that says so. All of it is kept in files."""
    monkeypatch.setattr(gpu_kernels, "BEHIND_CACHES", 0)  # one set of arguments
    monkeypatch.setattr(
        gpu_kernels, "torch_with_cuda", lambda: (SimpleNamespace(cuda=SimpleNamespace(empty_cache=list)), "")
    )
    monkeypatch.setattr(gpu_kernels, "torch_seconds", lambda torch, name: 1e-3)
    monkeypatch.setattr(bench_gpu, "copy_bandwidth", lambda device, nbytes: 1e6)
    monkeypatch.setattr(bench_gpu, "MODELS", {})
    monkeypatch.setattr(MeasuringDevice.seconds, "__defaults__", (1,))
    names = gpu_kernels.compile_ptx

    def compiled(kernels: list[GridKernel], architecture: str) -> str:
        if kernels[0].name == "swiglu":
            raise DiagnosticError("LLVM is not amused")
        return names(kernels, architecture)

    monkeypatch.setattr(gpu_kernels, "compile_ptx", compiled)
    cases = [c for c in small_cases() if c.name in ("rms_norm", "gemm", "swiglu")]
    assert run(cases, "-o", str(tmp_path)) == 1
    said = capsys.readouterr().out
    assert (tmp_path / "table.md").read_text() == said
    kept = [Row.from_json(json.dumps({k: v for k, v in json.loads(line).items() if k != "machine"}))
            for line in (tmp_path / "rows.jsonl").read_text().splitlines()]  # fmt: skip
    rows = {row.name: row for row in kept}
    norm = next(c for c in cases if c.name == "rms_norm")
    assert rows["rms_norm"].seconds == pytest.approx(4e-6)
    assert rows["rms_norm"].share == pytest.approx(norm.nbytes / 4e-6 / 1e6)
    assert rows["gemm"].share == pytest.approx(250) and rows["gemm"].beside == "torch's speed"
    assert rows["swiglu"].verdict == "NOT MEASURED: LLVM is not amused"
    lines = said.splitlines()
    assert "| gemm |" in lines[4] and len(lines) == 4 + len(cases)  # the rows with a bar come first


def test_verdicts() -> None:
    """What a row says of its bar."""
    for row, verdict in (
        (Row("a", 1.0, 0.81, 0.8), "reached"), (Row("a", 1.0, 0.79, 0.8), "MISSED"),
        (Row("a", 1.0, 0.02, 0.03, most=True), "reached"), (Row("a", 1.0, 0.04, 0.03, most=True), "MISSED"),
        (Row("a", 1.0, None, 0.8, said="torch is not there"), "not compared: torch is not there"),
        (Row("a", 1.0, 0.9, 0.8, error=1.5), "WRONG"), (Row("a", 1.0, 0.9, 0.8, error=float("nan")), "WRONG"),
        (Row("a", fault="no memory"), "NOT MEASURED: no memory"), (Row("a", 1.0, 0.5), ""),
    ):  # fmt: skip
        assert row.verdict == verdict
        assert Row.from_json(row.to_json()).verdict == verdict
    assert [row.name for row in in_order([Row("a"), Row("prefill", fault="no")])] == ["prefill", "a"]
    assert set(MODELS) == set(bench_gpu.MODELS)
    text = rows_table([Row("plain", 1e-6, 0.5, nbytes=2e3), Row("barred", 1e-6, 3.2, 3.0, "torch's speed")])
    assert text.splitlines()[2].startswith("| barred | - | 1.0 | - | - | 3.20 x | torch's speed | at least 3.00 x |")
    assert "| plain | - | 1.0 | 2 | - | 50 % |" in text


CHILD = """
import json, sys, time
for name in json.loads(sys.argv[1])["names"]:
    print(json.dumps({"begin": name}), flush=True)
    if name == "faults":
        print("cuda: illegal address", file=sys.stderr)
        sys.exit(1)
    if name == "hangs":
        time.sleep(100)
    print("a library says hello")
    print(json.dumps({"name": name, "seconds": 1.0}), flush=True)
"""


def test_what_ends_a_child_is_one_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault or a hang of one row, and the others are measured; when time is up the rest says so."""
    monkeypatch.setattr(bench_gpu, "child_command", lambda words: [sys.executable, "-c", CHILD, words])
    asked = bench_gpu.Asked(("a", "faults", "b"), True, 1.0)
    found = [(row.name, row.fault) for row in bench_gpu.in_children(asked, math.inf)]
    assert found == [("a", ""), ("faults", "cuda: illegal address"), ("b", "")]
    monkeypatch.setattr(bench_gpu, "QUIET_S", 0.0)
    found = [(row.name, row.fault) for row in bench_gpu.in_children(bench_gpu.Asked(("hangs",), True, 1.0), math.inf)]
    assert found == [("hangs", "hung for 0 s")]
    found = [(row.name, row.fault) for row in bench_gpu.in_children(asked, -math.inf)]
    assert [name for name, _ in found] == ["a", "faults", "b"] and all("no time was left" in why for _, why in found)


def test_models_without_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Built as any other, with a hole for the weights; its steps and a hybrid run of it, on the emulated driver."""
    lowered: list[LoweredGridStep] = []

    def lower(*given: Any) -> LoweredGridStep:
        lowered.append(lower_grid_step(*given))
        return lowered[-1]

    def names(kernels: Any, architectures: Any, cache: Any = None) -> dict[str, str]:
        return {a: PTX_HEAD + "".join(f".entry {k.name}(" for k in kernels) for a in architectures}

    monkeypatch.setattr(gpu_models, "lower_grid_step", lower)
    monkeypatch.setattr(gpu_code, "compile_ptx_for", names)
    monkeypatch.setattr(gpu_code, "find_ptxas", lambda: None)
    monkeypatch.setattr(gpu_code, "LEVELS", ())
    monkeypatch.setattr(gpu_models, "CONTEXT", 2)
    monkeypatch.setattr(gpu_models, "WARM_STEPS", 1)
    size = gpu_models.ModelSize(layers=1, hidden=64, ffn=64, heads=2, kv_heads=1, vocab=70, context=64)
    path = gpu_models.write_model(tmp_path, size, "w4a16-g32", gpu_models.gpu_target("sm_80"))
    weights = path / "weights" / "weights.bin"
    assert weights.stat().st_size == open_artifact(path).manifest.weights.bytes > weights.stat().st_blocks * 512 // 2
    step, overhead = gpu_models.decode_rows(
        "decode", path, lambda: open_device(driver=EmulatedDriver(GridRunner(lowered[0].kernels))), 1e9, steps=1
    )
    assert step.said == f"{len(lowered[0].programs[0].launches)} kernels, one graph" and step.nbytes > 0 < step.seconds
    assert (
        step.share == pytest.approx(step.nbytes / step.seconds / 1e9) and overhead.most and overhead.share is not None
    )


@pytest.mark.usefixtures("no_compiler")
def test_a_wrong_kernel_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    norm = next(c for c in small_cases() if c.name == "rms_norm")
    wrong = GpuCase(**{**vars(norm), "meant": lambda a: [m.astype(np.float32) + 1 for m in norm.meant(a)]})
    assert run([wrong], "--check") == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_copy_is_measured() -> None:
    driver = EmulatedDriver()
    device = open_device(driver=driver)
    assert bench_gpu.copy_bandwidth(device, 1000) == pytest.approx(2 * 1e10)
    device.close()
    assert driver.leaks() == []


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"capability": 75}, "emulated GPU is sm_75\nexpected: sm_80"),
        ({"version": 11040}, "the NVIDIA driver knows CUDA 11.4\nexpected: CUDA 11.8"),
    ],
)
def test_gpus_that_are_too_old(named: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small_cases()[:1], **named) == 2
    assert capsys.readouterr().err.startswith(f"bench.gpu: error: {message}")


def test_no_kernel_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small_cases()[:1], "--only", "nothing") == 2
    assert "no row begins with 'nothing'" in capsys.readouterr().err


def test_without_the_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    assert main([]) == 2
    assert "cuda-bindings is not installed" in capsys.readouterr().err


def test_real_cases_fill_a_gpu() -> None:
    """Every launch has as many blocks as a large GPU has multiprocessors, at least. Dispatching is one by design."""
    cases = bench_gpu.all_cases()
    assert len({c.name for c in cases}) == len(cases) > 10
    for case in cases:
        if case.name.startswith("dispatch"):
            continue
        assert case.blocks >= 132 and case.nbytes > 1 << 20
