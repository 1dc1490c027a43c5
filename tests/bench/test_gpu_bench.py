"""bench.gpu without a GPU: its refusals, and its whole way with a driver whose launches are interpreted."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import bench.gpu as bench_gpu
from bench.gpu import main
from bench.gpu_attention_cases import small_attention
from bench.gpu_cases import GpuCase, small_cases
from bench.gpu_device import CudaDevice, NoDeviceError, open_device
from bench.gpu_product_cases import small_products
from ir.grid_interpreter import interpret_grid
from ir.ops.tile_types import element_of
from ir.types import BufferType, ScalarType


class InterpretedDriver:
    """What cuda.bindings.driver offers, with host memory for device memory and the interpreter for a GPU."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)

    def __init__(self, cases: list[GpuCase], capability: int = 90, version: int = 12080) -> None:
        self.kernels = {c.kernel.name.encode(): c.kernel for c in cases}
        self.capability, self.version = capability, version
        self.memory: dict[int, np.ndarray] = {}
        self.time = 0.0
        self.ptx = b""

    def __getattr__(self, name: str) -> Any:
        """Functions that give nothing, or nothing that matters."""
        known = ("cuInit", "cuDeviceGet", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent", "cuCtxSynchronize")
        if name in (*known, "cuFuncSetAttribute", "cuEventCreate", "cuEventRecord", "cuEventSynchronize"):
            return lambda *arguments: (0, 1)
        raise AttributeError(name)

    def cuDriverGetVersion(self) -> tuple[int, int]:  # noqa: N802 - names of the driver
        return 0, self.version

    def cuDeviceGetAttribute(self, kind: int, device: int) -> tuple[int, int]:  # noqa: N802
        return 0, divmod(self.capability, 10)[kind - 75]

    def cuDeviceGetName(self, size: int, device: int) -> tuple[int, bytes]:  # noqa: N802
        return 0, b"interpreter\0\0"

    def cuMemAlloc(self, nbytes: int) -> tuple[int, int]:  # noqa: N802
        made = np.zeros(nbytes, np.uint8)
        self.memory[made.ctypes.data] = made
        return 0, made.ctypes.data

    def cuMemFree(self, address: int) -> tuple[int]:  # noqa: N802
        del self.memory[address]
        return (0,)

    def cuMemcpyHtoD(self, target: int, source: int, nbytes: int) -> tuple[int]:  # noqa: N802
        ctypes.memmove(target, source, nbytes)
        return (0,)

    cuMemcpyDtoH = cuMemcpyDtoD = cuMemcpyHtoD  # noqa: N815

    def cuModuleLoadData(self, text: int) -> tuple[int, str]:  # noqa: N802
        self.ptx = ctypes.string_at(text)
        return 0, "module"

    def cuModuleGetFunction(self, module: str, name: bytes) -> tuple[int, bytes]:  # noqa: N802
        assert b".entry " + name + b"(" in self.ptx
        return 0, name

    def cuLaunchKernel(self, name: bytes, *rest: int) -> tuple[int]:  # noqa: N802
        blocks, threads, places = rest[0], rest[3], rest[8]
        kernel = self.kernels[name]
        arguments: list[Any] = []
        for i, parameter in enumerate(kernel.func.arguments):
            value = ctypes.c_int64.from_address(ctypes.c_int64.from_address(places + 8 * i).value).value
            if isinstance(parameter.type, BufferType):
                arguments.append(self.memory[value].view(element_of(ScalarType(parameter.type.element)).dtype))
            else:
                arguments.append(value)
        interpret_grid(kernel.func, arguments, blocks=blocks, threads=threads)
        self.time += 1.0
        return (0,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[int, float]:  # noqa: N802
        return 0, 2.0


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the driver is given holds the names of the kernels only."""
    monkeypatch.setattr(bench_gpu, "compile_ptx", lambda kernels, _: "".join(f".entry {k.name}(" for k in kernels))


def run(cases: list[GpuCase], *arguments: str, **named: Any) -> int:
    return main(arguments, lambda: cases, lambda: CudaDevice(InterpretedDriver(cases, **named)))


def test_every_small_case_is_right(capsys: pytest.CaptureFixture[str]) -> None:
    cases = [*small_cases(), *small_products(), *small_attention()]
    assert run(cases, "--check") == 0
    said = capsys.readouterr().out
    assert "interpreter, PTX for sm_90" in said and "WRONG" not in said
    assert all(f"| {c.name} " in said for c in cases)


@pytest.mark.usefixtures("no_compiler")
def test_measured_rates(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_gpu, "BEHIND_CACHES", 0)  # one set of arguments
    monkeypatch.setattr(bench_gpu, "copy_bandwidth", lambda device: 1e6)
    monkeypatch.setattr(bench_gpu, "torch_seconds", lambda: {"gemm": 1e-3})
    monkeypatch.setattr(CudaDevice.seconds, "__defaults__", (1,))
    cases = [c for c in small_cases() if c.name in ("rms_norm", "gemm")]
    assert run(cases) == 0
    said = capsys.readouterr().out
    norm = next(c for c in cases if c.name == "rms_norm")
    row = next(line for line in said.splitlines() if "rms_norm" in line)
    assert "2000.0" in row and f"{100 * norm.nbytes / 2e-3 / 1e6:.0f} %" in row
    assert "50 %" in next(line for line in said.splitlines() if "| gemm" in line)


@pytest.mark.usefixtures("no_compiler")
def test_a_wrong_kernel_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    norm = next(c for c in small_cases() if c.name == "rms_norm")
    wrong = GpuCase(**{**vars(norm), "meant": lambda a: [m.astype(np.float32) + 1 for m in norm.meant(a)]})
    assert run([wrong], "--check") == 1
    assert "WRONG" in capsys.readouterr().out


def test_a_copy_is_measured() -> None:
    assert bench_gpu.copy_bandwidth(CudaDevice(InterpretedDriver([])), 1000) == pytest.approx(2 * 1000 / 2e-3)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"capability": 75}, "interpreter is sm_75; kernels are for sm_80, sm_89, sm_90 and later"),
        ({"version": 11040}, "the NVIDIA driver knows CUDA 11.4; expected 11.8"),
    ],
)
def test_gpus_that_are_too_old(named: dict[str, int], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small_cases()[:1], **named) == 2
    assert capsys.readouterr().err == f"bench.gpu: {message}\n"


def test_no_kernel_of_that_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(small_cases()[:1], "--only", "nothing") == 2
    assert "no kernel begins with 'nothing'" in capsys.readouterr().err


def test_without_package_or_driver(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr("bench.gpu_device.importlib.import_module", missing)
    assert main([]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    with pytest.raises(NoDeviceError, match="cuda-bindings is not installed: pip install"):
        open_device()

    def no_library(flags: int) -> None:
        raise RuntimeError("libcuda.so not found\nsearched: everywhere")

    driver = SimpleNamespace(cuInit=no_library)
    with pytest.raises(NoDeviceError, match=r"no NVIDIA driver that works: libcuda\.so not found$"):
        CudaDevice(driver)
    with pytest.raises(NoDeviceError, match="no NVIDIA driver that works: cuInit gave 100"):
        CudaDevice(SimpleNamespace(cuInit=lambda flags: (100,)))


def test_real_cases_fill_a_gpu() -> None:
    """Every launch has as many blocks as a large GPU has multiprocessors, at least."""
    cases = bench_gpu.all_cases()
    assert len({c.name for c in cases}) == len(cases) > 10
    for case in cases:
        assert case.blocks >= 132 and case.nbytes > 1 << 20
