"""What is simulated of a step on a GPU whose weights partly pass through its memory: model, plan, machine and prices.

Refuses targets without a GPU and a link to it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hw_targets.cost_model import tier_rate
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError
from passes.place.routing_model import distinct_experts
from runtime.cuda.host_experts import HostLayer
from runtime.cuda.host_plan import HostPlan
from runtime.cuda.host_tier import REQUEST_BYTES
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.missed_experts import FETCH, ExpertPrices
from runtime.cuda.program import GpuStep
from runtime.manifest import PieceInfo

TICK_S = 1e-6  # of a core: what the host's time is written in
# Of Python on the host, orders of magnitude: what `HybridReport.decide_s` counts for a layer's experts, and inputs,
# logits and sampling of a step. `bench.gpu_hybrid` measures the first.
DECIDE_S = 150e-6
BETWEEN_STEPS_S = 150e-6
# What one thread multiplies of experts in 4 bits on a Zen 5 core: docs/gpu.md.
THREAD_BYTES_PER_S = 9e9


@dataclass(frozen=True)
class DeviceCase:
    """A step of `tokens` sequences, each behind `context` positions; `hit` is the share of experts in the slots of the
    device, `host_hit` that of the others in those of pinned memory. Without `host` all of these are there.

    Missing experts of pieces in `computing` are handled as `missed` says (auto, fetch, cpu), by `prices` (None: those
    of the target); `decide_s` is what the host takes to decide about a layer's, `between_s` what it takes for a step.
    """

    step: GpuStep
    pieces: Sequence[PieceInfo]
    plan: HbmPlan
    target: Target
    experts_per_token: int = 0
    context: int = 512
    tokens: int = 1
    hit: float = 1.0
    host: HostPlan | None = None
    host_hit: float = 1.0
    missed: str = FETCH
    computing: tuple[HostLayer, ...] = ()
    prices: ExpertPrices | None = None
    decide_s: float = DECIDE_S
    between_s: float = BETWEEN_STEPS_S

    @cached_property
    def gpu(self) -> ComputeUnit:
        return self._units[0]

    @cached_property
    def cpu(self) -> ComputeUnit:
        return self._units[1]

    @cached_property
    def _units(self) -> tuple[ComputeUnit, ComputeUnit, str]:
        target = self.target
        gpu = next((u for u in target.units if u.kind == "gpu"), None)
        cpu = next((u for u in target.units if u.kind == "cpu"), None)
        link = target.link_between(cpu.tier, gpu.tier) if gpu and cpu else None
        if gpu is None or cpu is None or link is None:
            raise DiagnosticError(
                f"target {target.name} has no GPU with a link to the host's memory",
                expected="such as h100-sxm, gh200, rtx-4090",
            )
        return gpu, cpu, link.name

    @property
    def link(self) -> str:
        return self._units[2]

    @cached_property
    def machine(self) -> Target:
        """The target that plans of this file are for: launches of the host's cores take a tick."""
        cores = dataclasses.replace(self.cpu, launch_seconds=TICK_S, barrier_seconds=None)
        units = tuple(cores if unit.name == cores.name else unit for unit in self.target.units)
        return dataclasses.replace(self.target, units=units)

    @cached_property
    def price(self) -> ExpertPrices:
        """What was measured, or what the target says."""
        if self.prices is not None:
            return self.prices
        link = self.target.link_between(self.cpu.tier, self.gpu.tier)
        store = next((s for s in self.target.storage if s.tier == self.cpu.tier), None)
        cores = max(1, (self.cpu.cores or 1) - 1)
        read = store.read_rate(REQUEST_BYTES) if store is not None else None
        return ExpertPrices(
            (link.rate(self.gpu.tier) if link is not None else None) or 1.0,
            min(tier_rate(self.target, self.cpu.tier, self.cpu), cores * THREAD_BYTES_PER_S),
            1.0, 2 * (link.latency_seconds or 0.0) if link is not None else 0.0, read or 0.0,
        )  # fmt: skip

    def experts(self, piece: int) -> int:
        """How many a piece has."""
        return self.pieces[piece].bytes // self.pieces[piece].unit

    def needed(self, piece: int) -> float:
        """How many of them a step uses."""
        count, top_k = self.experts(piece), max(1, self.experts_per_token)
        return min(distinct_experts(count, top_k, self.tokens), top_k * self.tokens)

    def computes(self, piece: int) -> HostLayer | None:
        """How the CPU computes missing experts of a piece, where it may."""
        layers = (layer for layer in self.computing if layer.piece == piece and self.missed != FETCH)
        return next(layers, None)
