"""What a decode step of a built model takes on a GPU that has no room for all of its weights, before it is run.

    found = forecast_of(session)                                    # what `run --device cuda` says
    found = forecast_for(artifact, device_bytes, target, positions=4096)      # and `plan ARTIFACT --target ...`
    found.line(), found.prediction.seconds

Both go the same way: the plan of the device's memory is the one that a session carries out
(`runtime.cuda.hybrid_weights.passing_plan`), and so are the rules behind it; the prices are the target's. Shares of
experts that are found are those of the policy `lrfu` for a steady popularity, as in plans. Raises DiagnosticError for
targets without a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hw_targets.target import Target
from passes.place.routing_model import fading_hit_rate
from runtime.artifact import Artifact, is_artifact, open_artifact
from runtime.cuda.host_experts import HostProgram
from runtime.cuda.host_plan import HostPlan
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_weights import passing_plan
from runtime.cuda.kv import capacity_of
from runtime.cuda.missed_experts import AUTO
from stratum.device_case import DeviceCase
from stratum.device_prediction import DevicePrediction, predict_device
from stratum.device_prices import Gpu, machine_like
from stratum.plan_report import seconds_text
from stratum.progress import format_bytes

if TYPE_CHECKING:
    from runtime.cuda.session import CudaSession

CONTEXT = 512  # positions that the step looks back on, where the cache has so many


@dataclass(frozen=True)
class Forecast:
    """A step of one sequence on a machine; `hit` is the share of experts that are expected on the device."""

    prediction: DevicePrediction
    machine: str
    hit: float

    def line(self) -> str:
        """For people, in one line."""
        found, experts = self.prediction, f", {self.hit:.0%} of experts there" if self.hit < 1 else ""
        by_cpu = f" and {found.computed:.1f} of them by the CPU" if found.computed else ""
        return (
            f"forecast: {seconds_text(found.seconds)} a token ({1 / found.seconds:.3g} tokens/s), "
            f"{format_bytes(round(found.link_bytes))} over the link{experts}{by_cpu}; bound by {found.bound}, "
            f"by the prices of {self.machine}"
        )


def forecast(
    artifact: Artifact,
    plan: HbmPlan,
    target: Target,
    *,
    host: HostPlan | None = None,
    missed: str = AUTO,
    positions: int | None = None,
) -> Forecast:
    """Of an artifact for GPUs by a plan of the device's memory. `host`: what of the rest is pinned (None: all);
    `positions`: those of the cache."""
    assert artifact.gpu is not None
    manifest = artifact.manifest
    pieces, top_k = manifest.weights.pieces, max(1, manifest.experts_per_token or 1)
    hit, host_hit = _hits(artifact, plan, host, top_k)
    case = DeviceCase(
        artifact.gpu, pieces, plan, target, top_k, min(CONTEXT, positions or manifest.max_context), 1, hit, host,
        host_hit, missed, tuple(HostProgram.of(artifact).layers.values()),
    )  # fmt: skip
    return Forecast(predict_device(case), target.name, hit)


def forecast_of(session: CudaSession) -> Forecast | None:
    """Of the session's own plan, by the prices of the machine with such a GPU; None where all weights are on the GPU,
    and where the CPU attends to positions that it keeps."""
    found = session.passing
    if found is None or session.host_kv is not None:
        return None
    target = machine_like(Gpu(session.device_name, 0))
    plan, host = found
    return forecast(
        session.artifact, plan, target, host=host, missed=session.missed, positions=session.max_context
    )  # fmt: skip


def forecast_for(
    artifact: Artifact, device_bytes: int, target: Target, *, positions: int, missed: str = AUTO
) -> Forecast | None:
    """Of the plan that a session would have on a device with so many bytes free, with a cache of so many positions for
    one sequence; None where all weights fit. Raises RuntimeDiagnostic where not even what passes through does."""
    step = artifact.gpu
    assert step is not None
    plan = passing_plan(artifact, device_bytes, step.kv.nbytes(1, capacity_of(step.kv, positions)))
    return None if plan is None else forecast(artifact, plan, target, missed=missed, positions=positions)


def forecast_of_plan(model: Path, target: Target, budgets: Mapping[str, int], positions: int) -> Forecast | None:
    """What `run --device cuda` would say of an artifact for GPUs under such budgets of tiers; None for another model or
    target, and where all weights fit. Raises RuntimeDiagnostic where not even what passes through does."""
    gpu = next((unit for unit in target.units if unit.kind == "gpu"), None)
    if gpu is None or not is_artifact(model):
        return None
    artifact, tier = open_artifact(model), target.tier(gpu.tier)
    free = budgets.get(gpu.tier, tier.usable_bytes if tier is not None else None)
    if artifact.gpu is None or free is None:
        return None
    return forecast_for(artifact, free, target, positions=positions)


def _hits(artifact: Artifact, plan: HbmPlan, host: HostPlan | None, top_k: int) -> tuple[float, float]:
    """(share of experts in the slots of the device, share of the others in those of pinned memory), on average over
    layers; the slots that layers share are dealt out evenly."""
    pieces = artifact.manifest.weights.pieces
    counts = [(pieces[piece].bytes // pieces[piece].unit, slots) for piece, slots in plan.slots]
    if not counts:
        return 1.0, 1.0
    hit = sum(_hit(experts, top_k, slots) for experts, slots in counts) / len(counts)
    if host is None or not host.cached or hit >= 1.0:
        return hit, 1.0
    more = host.slots // max(1, len(host.cached))
    both = sum(_hit(experts, top_k, min(experts, slots + more)) for experts, slots in counts) / len(counts)
    return hit, min(1.0, max(0.0, (both - hit) / (1.0 - hit)))


def _hit(experts: int, top_k: int, slots: int) -> float:
    return 1.0 if slots >= experts else fading_hit_rate(experts, min(top_k, experts), slots)
