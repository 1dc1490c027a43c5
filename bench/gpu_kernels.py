"""Kernels on a GPU, each compiled, loaded, compared with numpy and timed by itself, so that none spoils another.

    for row in kernel_rows(device, cases, timed=True): ...

A kernel that cannot be compiled, loaded or has no room gives a row that says so. A fault that ends the GPU's context
is raised: whoever called has to go on in another process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from bench.gpu_cases import GpuCase
from bench.gpu_device import DeviceArray, MeasuringDevice
from bench.gpu_rows import BARS, BESIDE, COPY, DENSE, DENSE_OF, OF_HOPPER, TORCH, Row
from bench.measure import median
from codegen.nvptx.compile import compile_ptx
from codegen.nvptx.lowering import HOPPER
from ir.diagnostics import DiagnosticError
from runtime.errors import RuntimeDiagnostic

BEHIND_CACHES = 256 << 20  # bytes of argument sets that are taken in turns: several times a second-level cache
MOST_SETS = 32
COMPILERS = 8


def architecture_of(device: MeasuringDevice) -> str:
    """What kernels are compiled for: on an H100 or H200 with its own instructions."""
    return HOPPER if device.architecture == "sm_90" else device.architecture


def upload(device: MeasuringDevice, arguments: Sequence[Any]) -> list[DeviceArray | int]:
    return [device.upload(a) if isinstance(a, np.ndarray) else a for a in arguments]


def kernel_rows(
    device: MeasuringDevice, cases: Sequence[GpuCase], *, timed: bool, copy: float, begin: Callable[[str], None]
) -> Iterator[Row]:
    """A row for each case, in order; `begin` is told of each before anything of it runs."""
    architecture, beside = architecture_of(device), _Beside()
    speeds: dict[str, float] = {}  # of cases that others are compared with, in FLOP/s
    with ThreadPoolExecutor(COMPILERS) as pool:
        compiled: dict[str, Future[str]] = {}
        waiting = list(cases)
        for case in cases:
            while waiting and len(compiled) < 2 * COMPILERS:  # not all at once: texts and their processes take memory
                ahead = waiting.pop(0)
                compiled[ahead.name] = pool.submit(compile_ptx, [ahead.kernel], architecture)
            begin(case.name)
            try:
                row = _measure(device, compiled.pop(case.name).result(), case, timed=timed)
            except (DiagnosticError, RuntimeDiagnostic, MemoryError) as fault:
                if device.device.lost:
                    raise
                yield Row(case.name, fault=" ".join(str(fault).removeprefix("error: ").split())[:200])
                continue
            speeds[case.name] = row.flops / row.seconds if timed else 0.0
            yield _compared(row, architecture, copy, beside, speeds) if timed else row


def _measure(device: MeasuringDevice, ptx: str, case: GpuCase, *, timed: bool) -> Row:
    """Runs a case once on fresh numbers and compares; then, `timed`, in turns on several copies of its arguments."""
    module = device.load(ptx)
    sets: list[list[DeviceArray | int]] = []
    try:
        arguments = case.make(np.random.default_rng(7))
        sets.append(upload(device, arguments))
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
    finally:
        if not device.device.lost:
            for argument in (a for one in sets for a in one if isinstance(a, DeviceArray)):
                device.free(argument)
            device.device.free_module(module)
    return Row(case.name, seconds, error=error, nbytes=case.nbytes, flops=case.flops)


def _compared(row: Row, architecture: str, copy: float, beside: _Beside, speeds: dict[str, float]) -> Row:
    """With its share of what it is compared with, and its bar."""
    bar = None if architecture == HOPPER and row.name in OF_HOPPER else BARS.get(row.name)
    what = BESIDE.get(row.name, COPY)
    share, said = row.nbytes / row.seconds / copy, ""
    if what == TORCH:
        other, said = beside.seconds(row.name)
        share = None if other is None else other / row.seconds
    elif what == DENSE:
        other = speeds.get(DENSE_OF[row.name])
        share, said = (row.flops / row.seconds / other, "") if other else (None, "the dense product was not measured")
    made = vars(row) | {"share": share, "beside": what, "bar": bar, "said": said}
    return Row(**made)


class _Beside:
    """The same work by torch, each once; says why where there is none."""

    def __init__(self) -> None:
        self._torch: Any = None
        self._why = ""
        self._known: dict[str, tuple[float | None, str]] = {}

    def seconds(self, name: str) -> tuple[float | None, str]:
        """(seconds, "") or (None, why not)."""
        if self._torch is None and not self._why:
            self._torch, self._why = torch_with_cuda()
        if self._torch is None:
            return None, self._why
        key = "gemm" if name == "wgmma" else name
        if key not in self._known:
            try:
                self._known[key] = torch_seconds(self._torch, key), ""
            except (RuntimeError, TypeError) as fault:  # no memory; an argument that this torch does not know
                self._known[key] = None, f"torch: {str(fault).splitlines()[0][:120]}"
            self._torch.cuda.empty_cache()
        return self._known[key]


def torch_with_cuda() -> tuple[Any, str]:
    """torch, or why it is not to be had."""
    try:
        import torch
    except (ImportError, OSError) as fault:  # OSError: a library of CUDA's that is not there
        return None, f"torch is not there ({' '.join(str(fault).split())[:80]})"
    return (torch, "") if torch.cuda.is_available() else (None, "torch has no CUDA here")


def torch_seconds(torch: Any, name: str) -> float:
    """Of the same work: a product in bf16 of 4096 cubed, of 16 rows with 14336 x 4096, or a causal prompt of 8192."""

    def numbers(*shape: int) -> Any:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    if name == "prefill":
        q, keys, values = numbers(1, 32, 8192, 128), numbers(1, 8, 8192, 128), numbers(1, 8, 8192, 128)
        attention = torch.nn.functional.scaled_dot_product_attention
        return _median_seconds(torch.cuda, [lambda: attention(q, keys, values, is_causal=True, enable_gqa=True)])
    m, n = (4096, 4096) if name == "gemm" else (16, 14336)
    x = numbers(m, 4096)
    weights = [numbers(n, 4096) for _ in range(max(1, BEHIND_CACHES // (2 * n * 4096)))]  # as for the kernels
    return _median_seconds(torch.cuda, [lambda w=w: x @ w.T for w in weights])


def _median_seconds(cuda: Any, actions: Sequence[Callable[[], object]], rounds: int = 20) -> float:
    start, end = (cuda.Event(enable_timing=True) for _ in range(2))
    for action in actions:
        action()
    cuda.synchronize()
    times = []
    for _ in range(rounds):
        start.record()
        for action in actions:
            action()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / len(actions))
    return median(times)
