"""What a decode step of a model costs on the GPU that was found and on the CPU beside it, by plans of both.

    offers = device_offers(model, Gpu("NVIDIA H100 80GB HBM3", free_bytes), recipe="w4a16-g32")
    offers.best, offers.line()      # "gpu"; "NVIDIA H100 80GB HBM3 would make 165 tokens/s with ..."

Plans are those of `stratum.planning`, solved over the cost model. The GPU's has its free memory, the host's memory for
what passes through, and the prices of the machine among `hw_targets` whose name the driver's fits best (else of the
slowest that runs the kernels); all that is computed is pinned to the GPU. The CPU's is that of this machine, which is
measured once where it never was. Where a device has no plan its place is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import hw_targets
from hw_targets.target import Target
from passes.place.parallel import device_unit
from passes.place.solve import NoFit
from stratum.planning import PlanRequest, make_plan
from stratum.progress import format_bytes

OLDEST = 80  # of the architectures that kernels run on
_WORD = re.compile(r"[a-z]*\d+[a-z]*")


@dataclass(frozen=True)
class Gpu:
    """A GPU by the name that its driver gives; `free_bytes` may be used; `target` is what code is built for it."""

    name: str
    free_bytes: int
    target: str = "cuda"


@dataclass(frozen=True)
class Offer:
    """A plan's decode step for one sequence, and whether all weights lie in the device's memory."""

    seconds: float
    resident: bool = True

    @property
    def rate(self) -> str:
        """Tokens a second, as a text."""
        tokens = 1 / self.seconds
        return f"{tokens:.0f}" if tokens >= 10 else f"{tokens:.2g}"


@dataclass(frozen=True)
class Offers:
    """What each device makes of a model; None where it does not fit."""

    gpu: Gpu
    machine: str  # whose prices the GPU has
    on_gpu: Offer | None
    on_cpu: Offer | None

    @property
    def best(self) -> str:
        """`gpu` or `cpu`: the one with more tokens a second."""
        if self.on_gpu is None:
            return "cpu"
        return "cpu" if self.on_cpu is not None and self.on_cpu.seconds < self.on_gpu.seconds else "gpu"

    def line(self) -> str:
        """Why it is the best, in one line."""
        name, free = self.gpu.name, format_bytes(self.gpu.free_bytes)
        if self.on_gpu is None:
            return f"the model does not fit into {free} of {name}, even when its weights pass through"
        how = "all weights in" if self.on_gpu.resident else "weights that pass through"
        other = f"the CPU {self.on_cpu.rate}" if self.on_cpu is not None else "the CPU has no room for them"
        made = f"{name} would make {self.on_gpu.rate} tokens/s with {how} its {free}"
        return f"{made}, {other}, by the prices of {self.machine}"


def device_offers(model: Path, gpu: Gpu, *, recipe: str | None, dtype: str) -> Offers:
    """Both plans. Raises DiagnosticError for a model or a recipe that cannot be read."""
    machine = machine_like(gpu)
    host = hw_targets.load("host").tier()
    tiers = {unit.kind: unit.tier for unit in machine.units}
    budgets = [(tiers["gpu"], f"{gpu.free_bytes}B")]
    if host is not None and host.capacity_bytes:
        budgets.append((tiers["cpu"], f"{host.capacity_bytes}B"))
    asked = PlanRequest(str(model), recipe=recipe, dtype=dtype, what_if=False, simulate=False)
    there = replace(asked, target=machine.name, budgets=tuple(budgets))
    whole = _seconds(replace(there, pins=(f"weights={tiers['gpu']}", "kv=gpu")))
    seconds = whole if whole is not None else _seconds(replace(there, pins=("weights=gpu", "kv=gpu")))
    on_gpu = None if seconds is None else Offer(seconds, whole is not None)
    on_cpu = _seconds(asked)
    return Offers(gpu, machine.name, on_gpu, None if on_cpu is None else Offer(on_cpu))


def _seconds(request: PlanRequest) -> float | None:
    """Of a decode step; None where nothing fits."""
    try:
        return make_plan(request).placement.decode.seconds
    except NoFit:
        return None


def machine_like(gpu: Gpu) -> Target:
    """The machine with one such GPU and a CPU whose prices stand for it."""
    known = [m for m in map(hw_targets.load, hw_targets.names()) if _has_one_gpu(m)]
    words = set(_WORD.findall(gpu.name.lower()))
    named = [m for m in known if words & set(_WORD.findall(m.name)[:1])]
    if named:
        return max(named, key=lambda m: (len(words & set(_WORD.findall(m.name))), -len(m.name)))
    able = [m for m in known if _architecture(m) >= OLDEST]
    return min(able, key=_bandwidth)


def _has_one_gpu(machine: Target) -> bool:
    units = machine.units
    pair = [unit.kind for unit in units] == ["gpu", "cpu"] and units[0].arch.startswith("sm_")
    return pair and device_unit(machine) is None and machine.link_between(units[1].tier, units[0].tier) is not None


def _architecture(machine: Target) -> int:
    return int(machine.units[0].arch.removeprefix("sm_").rstrip("af"))


def _bandwidth(machine: Target) -> float:
    tier = machine.tier(machine.units[0].tier)
    return (tier.read_bandwidth if tier is not None else None) or 0.0
