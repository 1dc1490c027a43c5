"""bench.gpu without a GPU: its refusals, and its whole way with a driver whose launches are interpreted."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest

import bench.gpu as bench_gpu
from bench.gpu import main
from bench.gpu_attention_cases import small_attention
from bench.gpu_cases import GpuCase, small_cases
from bench.gpu_device import MeasuringDevice
from bench.gpu_moe_cases import small_experts
from bench.gpu_product_cases import small_fp8, small_products, small_wgmma
from codegen.nvptx.builder import GridKernel
from runtime.cuda.device import open_device
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import GridRunner

PTX_HEAD = ".version 7.8\n"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is given holds the names of the kernels only."""

    def names(kernels: list[GridKernel], architecture: str) -> str:
        return PTX_HEAD + "".join(f".entry {k.name}(" for k in kernels)

    monkeypatch.setattr(bench_gpu, "compile_ptx", names)


def run(cases: list[GpuCase], *arguments: str, **named: Any) -> int:
    driver = EmulatedDriver(GridRunner([c.kernel for c in cases]), order="eager", **named)
    return main(arguments, lambda: cases, lambda: open_device(driver=driver))


@pytest.mark.usefixtures("no_compiler")
def test_every_small_case_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [*small_cases(), *small_products(), *small_wgmma(), *small_fp8(), *small_attention(), *small_experts()]
    assert run(cases, "--check") == 0
    said = capsys.readouterr().out
    assert "emulated GPU, PTX for sm_90" in said and "WRONG" not in said
    assert all(f"| {c.name} " in said for c in cases)


@pytest.mark.usefixtures("no_compiler")
def test_measured_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "BEHIND_CACHES", 0)  # one set of arguments
    monkeypatch.setattr(bench_gpu, "copy_bandwidth", lambda device: 1e6)
    monkeypatch.setattr(bench_gpu, "torch_seconds", lambda: {"gemm": 1e-3})
    monkeypatch.setattr(MeasuringDevice.seconds, "__defaults__", (1,))
    cases = [c for c in small_cases() if c.name in ("rms_norm", "gemm")]
    assert run(cases) == 0
    said = capsys.readouterr().out
    norm = next(c for c in cases if c.name == "rms_norm")
    row = next(line for line in said.splitlines() if "rms_norm" in line)
    assert "4.0" in row and f"{100 * norm.nbytes / 4e-6 / 1e6:.0f} %" in row
    assert "25000 %" in next(line for line in said.splitlines() if "| gemm" in line)


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
    assert "no kernel begins with 'nothing'" in capsys.readouterr().err


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
