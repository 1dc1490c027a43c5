"""Every kernel on the GPU that is here: right (against numpy) and how fast, beside a copy and torch. Prints markdown.

python -m bench.gpu            # all kernels; --check only compares, --only NAME takes those that begin so

Bytes and operations are what a kernel must move and compute; the share is of the bandwidth of a device-to-device copy
(bytes read and written); for products and attention of many rows, of torch's speed where it is installed with CUDA.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bench.gpu_attention_cases import real_attention
from bench.gpu_cases import GpuCase, real_cases
from bench.gpu_device import DeviceArray, MeasuringDevice
from bench.gpu_moe_cases import real_experts
from bench.gpu_product_cases import real_fp8, real_products, real_wgmma
from bench.measure import median, table
from codegen.nvptx.compile import compile_ptx, runs_on
from codegen.nvptx.lowering import HOPPER
from runtime.cuda.device import CudaDevice, open_device
from runtime.cuda.driver import NoDevice
from runtime.cuda.measure import copy_bandwidth

BEHIND_CACHES = 256 << 20  # bytes of argument sets that are taken in turns: several times a second-level cache
MOST_SETS = 32
BESIDE_TORCH = ("gemm", "wgmma", "prefill")  # what computing bounds, not memory


@dataclass(frozen=True)
class Measured:
    """One row. `share` is of the copy or of torch, None without either."""

    name: str
    error: float
    seconds: float
    gigabytes: float
    teraflops: float
    share: float | None


def upload(device: MeasuringDevice, arguments: Sequence[Any]) -> list[DeviceArray | int]:
    return [device.upload(a) if isinstance(a, np.ndarray) else a for a in arguments]


def measure(
    device: MeasuringDevice, module: Any, case: GpuCase, *, timed: bool, copy: float, torch: dict[str, float]
) -> Measured:
    """Runs a case once on fresh numbers and compares; then, `timed`, in turns on several copies of its arguments."""
    arguments = case.make(np.random.default_rng(7))
    sets = [upload(device, arguments)]
    device.launcher(module, case.kernel, case.blocks, sets[0])()
    device.wait()
    outputs = [sets[0][i] for i in case.outputs]
    results = [
        device.download(out, arguments[i])
        for out, i in zip(outputs, case.outputs, strict=True)
        if isinstance(out, DeviceArray)
    ]
    error, seconds = case.error(arguments, results), float("nan")
    if timed:
        count = max(1, min(MOST_SETS, BEHIND_CACHES // case.nbytes))
        sets += [upload(device, arguments) for _ in range(count - 1)]
        seconds = device.seconds([device.launcher(module, case.kernel, case.blocks, s) for s in sets])
    for one in sets:
        for argument in one:
            if isinstance(argument, DeviceArray):
                device.free(argument)
    rate, work = case.nbytes / seconds, case.flops / seconds
    share = rate / copy
    if case.name in BESIDE_TORCH:
        share = torch[case.name] / seconds if case.name in torch else None
    return Measured(case.name, error, seconds, rate / 1e9, work / 1e12, share)


def torch_seconds() -> dict[str, float]:
    """Case -> seconds of the same work by torch; empty without torch or without CUDA in it."""
    try:
        import torch
    except ImportError:
        return {}
    if not torch.cuda.is_available():
        return {}

    def numbers(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    x, w = numbers(4096, 4096), numbers(4096, 4096)
    q, keys, values = numbers(1, 32, 8192, 128), numbers(1, 8, 8192, 128), numbers(1, 8, 8192, 128)
    attention = torch.nn.functional.scaled_dot_product_attention
    work = {
        "gemm": lambda: x @ w.T,
        "wgmma": lambda: x @ w.T,
        "prefill": lambda: attention(q, keys, values, is_causal=True, enable_gqa=True),
    }
    return {name: _median_seconds(torch.cuda, action) for name, action in work.items()}


def _median_seconds(cuda: Any, action: Callable[[], object], rounds: int = 20) -> float:
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(rounds):
        start.record()
        action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return median(times)


def report(device: MeasuringDevice, rows: Sequence[Measured], copy: float) -> str:
    """The table, with what the device reached."""
    head = ["kernel", "error, of what is allowed", "us", "GB/s", "TFLOP/s", "share"]
    cells = [
        (
            r.name, f"{r.error:.2g}" + ("" if r.error <= 1 else " WRONG"), f"{r.seconds * 1e6:.1f}",
            f"{r.gigabytes:.0f}", f"{r.teraflops:.1f}", f"{100 * r.share:.0f} %" if r.share is not None else "-",
        )
        for r in rows
    ]  # fmt: skip
    return f"{device.name}, PTX for {device.architecture}; a copy: {copy / 1e9:.0f} GB/s\n\n{table(head, cells)}"


def all_cases() -> list[GpuCase]:
    """Every kernel at sizes of a real model."""
    return [*real_cases(), *real_products(), *real_wgmma(), *real_fp8(), *real_attention(), *real_experts()]


def main(
    arguments: Sequence[str] | None = None,
    cases: Callable[[], list[GpuCase]] = all_cases,
    device_of: Callable[[], CudaDevice] = open_device,
) -> int:
    """0 when every kernel is right, 1 when one is not, 2 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Checks and measures the GPU kernels.")
    parser.add_argument("--check", action="store_true", help="compare only, measure nothing")
    parser.add_argument("--only", default="", metavar="NAME", help="kernels whose name begins so")
    options = parser.parse_args(arguments)
    try:
        device = MeasuringDevice(device_of())
    except NoDevice as refusal:
        print(f"bench.gpu: {refusal}", file=sys.stderr)
        return 2
    architecture = HOPPER if device.architecture == "sm_90" else device.architecture
    chosen = [c for c in cases() if c.name.startswith(options.only) and runs_on(c.kernel, architecture)]
    if not chosen:
        print(f"bench.gpu: no kernel begins with {options.only!r}", file=sys.stderr)
        return 2
    module = device.load(compile_ptx([c.kernel for c in chosen], architecture))
    timed = not options.check
    copy = copy_bandwidth(device.device) if timed else float("nan")
    torch = torch_seconds() if timed else {}
    rows = [measure(device, module, c, timed=timed, copy=copy, torch=torch) for c in chosen]
    print(report(device, rows, copy))
    return 0 if all(r.error <= 1 for r in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
