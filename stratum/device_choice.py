"""Which device runs a model: the CPU, a GPU, or whichever can.

`choose_device` turns what was asked for (`cpu`, `cuda`, `auto`) into `cpu` or `cuda` and says why. `auto` takes what an
artifact was built for; a directory goes to a GPU when one is there and plans foretell more tokens a second there, with
all weights in its memory or with weights that pass through it, than on the CPU (`stratum.device_prices`). Options that
only one of the two has decide too, and are refused with the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ir.diagnostics import DiagnosticError
from runtime.cuda.driver import NoDevice, OutOfDeviceMemory
from runtime.cuda.missed_experts import MODES

if TYPE_CHECKING:
    from stratum.device_prices import Gpu

DEVICES = ("cpu", "cuda", "auto")
GPU_TARGET = "cuda"  # any NVIDIA GPU that kernels are made for
GPU_TARGETS = {"sm_90": "cuda-sm90a"}  # by architecture: with instructions that no other has


@dataclass(frozen=True)
class DeviceChoice:
    """`device` is cpu or cuda; `why` is a line where the choice was ours, else empty; `target` is what a directory is
    built for on the GPU that was found."""

    device: str
    why: str = ""
    target: str = GPU_TARGET


def choose_device(
    model: Path,
    asked: str,
    *,
    device_memory: int | None = None,
    dtype: str = "bf16",
    recipe: str | None = None,
    target: str | None = None,
    **only_cpu: object,
) -> DeviceChoice:
    """Where `model`, an artifact or a directory, runs. `only_cpu`: options, by name, that GPUs do not have; None where
    not given. Raises DiagnosticError for options that go with another device than the one asked for."""
    from runtime.artifact import is_artifact

    if asked not in DEVICES:
        raise DiagnosticError(f"unknown device {asked!r}", expected=", ".join(DEVICES))
    if asked == "cuda":
        refuse_cpu_options(**only_cpu)
        if not is_artifact(model):
            return DeviceChoice(asked, target=_find_gpu(device_memory).target)  # before anything is built for it
    if asked == "cpu" and device_memory is not None:
        raise DiagnosticError("--device-memory goes with --device cuda or auto", hint="--memory bounds the CPU's")
    if asked != "auto":
        return DeviceChoice(asked)
    if is_artifact(model):
        return _as_built(model)
    given = _given(only_cpu)
    if given:
        return DeviceChoice("cpu", f"{', '.join(given)} {'is' if len(given) == 1 else 'are'} not for GPUs")
    if target is not None:
        return DeviceChoice("cuda" if is_gpu_target(target) else "cpu", f"built for {target}")
    return _as_it_is_cheaper(model, device_memory, dtype, recipe)


def _as_built(model: Path) -> DeviceChoice:
    from runtime.artifact import open_artifact

    name = open_artifact(model).manifest.target
    return DeviceChoice("cuda" if name.is_gpu else "cpu", f"the artifact was built for {name.name}")


def _as_it_is_cheaper(model: Path, device_memory: int | None, dtype: str, recipe: str | None) -> DeviceChoice:
    """By asking the GPU what it has free, and the cost model what a token takes there and on the CPU."""
    from stratum.device_prices import device_offers

    try:
        gpu = _find_gpu(device_memory)
    except (NoDevice, OutOfDeviceMemory) as fault:
        return DeviceChoice("cpu", fault.message)
    offers = device_offers(model, gpu, recipe=recipe, dtype=dtype)
    return DeviceChoice("cuda" if offers.best == "gpu" else "cpu", offers.line(), gpu.target)


def _find_gpu(device_memory: int | None) -> Gpu:
    """The GPU, and how many bytes may be used of it. Raises NoDevice."""
    from runtime.cuda.device import open_device
    from stratum.device_prices import Gpu

    device = open_device(limit_bytes=device_memory)
    try:
        return Gpu(device.name, device.free_bytes(), GPU_TARGETS.get(device.architecture, GPU_TARGET))
    finally:
        device.close()


def is_gpu_target(target: str) -> bool:
    """Whether code for that target is for GPUs. Raises DiagnosticError for an unknown name."""
    import hw_targets
    from codegen.nvptx.gpu_code import gpu_architectures

    return bool(gpu_architectures(hw_targets.load(target)))


def check_missed_experts(mode: str | None, device: object) -> None:
    """Raises DiagnosticError for a mode that there is not, or one that is given (not None) for the CPU."""
    if mode is not None and device == "cpu":
        raise DiagnosticError("--missed-experts goes with --device cuda or auto", hint="the CPU computes all experts")
    if mode is not None and mode not in MODES:
        raise DiagnosticError(f"missed experts: {mode!r}", expected=f"one of {', '.join(MODES)}")


def refuse_cpu_options(**options: object) -> None:
    """Raises DiagnosticError for the options given (not None) that GPUs do not have."""
    given = _given(options)
    if given:
        raise refused_on_gpus(given)


def refused_on_gpus(names: list[str]) -> DiagnosticError:
    """For options that GPUs do not have."""
    verb = "is" if len(names) == 1 else "are"
    return DiagnosticError(
        f"{', '.join(names)} {verb} not for GPUs", hint="run on the CPU (--device cpu), or leave it out"
    )


def _given(options: dict[str, object]) -> list[str]:
    return [f"--{name.replace('_', '-')}" for name, value in options.items() if value is not None]
