"""Of which layers keys and values lie in the host's memory when a GPU has no room for all of them beside the weights.

    layers_on_host(artifact, device, context=65536, slots=1, host_bytes=None)      # (0, 2, 4, ...)

The decision is that of plans: the placement of the model over the GPU's free memory and the host's, with everything
computed by the GPU but attention, which takes place where keys and values lie (pins `weights=gpu`, `kv=near`). What a
plan calls a byte of the GPU and what a run takes differ by padding, so a plan that does not fit byte by byte is made
again for as much less. Where everything fits nothing is planned and nothing lies on the host; nor where the artifact
has no attention for this CPU.
"""

from __future__ import annotations

from dataclasses import replace

import hw_targets
from passes.place.placement import layer_numbers
from passes.place.solve import NoFit
from runtime.artifact import Artifact
from runtime.cuda.device import Device
from runtime.cuda.host_attention import AttentionProgram
from runtime.cuda.hybrid_weights import SPARE_BYTES, passing_plan
from runtime.cuda.kv import capacity_of
from runtime.cuda.session import gpu_step
from runtime.cuda.step_memory import scratch_bytes
from runtime.errors import RuntimeDiagnostic
from stratum.device_prices import Gpu, machine_like
from stratum.plan_request import PlanRequest
from stratum.planning import make_plan


def layers_on_host(
    artifact: Artifact, device: Device, *, context: int, slots: int = 1, host_bytes: int | None = None
) -> tuple[int, ...]:
    """Ascending; () where all keys and values lie on the device. Sizes are for `slots` sequences of `context`
    positions; `host_bytes` bound the host's memory. Raises DiagnosticError for a model that cannot be planned."""
    free, count = device.free_bytes(), gpu_step(artifact).kv.layers
    lacking = _lacking(artifact, free, 0, context, slots)
    program = AttentionProgram.of(artifact)
    if not lacking or len(program.layers) < count or not program.code.file_here():
        return ()
    spare = min(SPARE_BYTES, free // 16)
    budget = free - scratch_bytes(gpu_step(artifact), artifact.manifest.vocab_size) - spare
    while budget > 0:
        chosen = _planned(artifact, Gpu(device.name, budget), context, slots, host_bytes)
        if chosen is None:
            break
        lacking = _lacking(artifact, free, len(chosen), context, slots)
        if not lacking:
            return chosen
        budget -= max(lacking, _layer_bytes(artifact, context, slots))
    # Not even plans have room for more: what is too much is refused with its numbers when the session is opened.
    return tuple(range(count))


def _lacking(artifact: Artifact, free: int, elsewhere: int, context: int, slots: int) -> int:
    """Bytes of device memory that are lacking, 0 for none, with keys and values of `elsewhere` layers on the host."""
    step, manifest = gpu_step(artifact), artifact.manifest
    cache = replace(step.kv, layers=step.kv.layers - elsewhere)
    cache_bytes = cache.nbytes(slots, capacity_of(cache, context))
    try:
        passes = passing_plan(artifact, free, cache_bytes)
    except RuntimeDiagnostic:
        return _layer_bytes(artifact, context, slots)
    if passes is not None:
        return 0
    scratch = scratch_bytes(step, manifest.vocab_size)
    return max(0, scratch + manifest.weights.bytes + cache_bytes + min(SPARE_BYTES, free // 16) - free)


def _layer_bytes(artifact: Artifact, context: int, slots: int) -> int:
    """Of keys and values of a layer on the device."""
    kv = gpu_step(artifact).kv
    return max(1, kv.nbytes(slots, capacity_of(kv, context)) // max(1, kv.layers))


def _planned(artifact: Artifact, gpu: Gpu, context: int, slots: int, host_bytes: int | None) -> tuple[int, ...] | None:
    """The layers that a plan has in the host's memory; None where nothing fits."""
    machine = machine_like(gpu)
    tiers = {unit.kind: unit.tier for unit in machine.units}
    host = hw_targets.load("host").tier()
    if host_bytes is None and host is not None and host.capacity_bytes:
        host_bytes = int(host.capacity_bytes)
    budgets = [(tiers["gpu"], f"{gpu.free_bytes}B")]
    if host_bytes is not None:
        budgets.append((tiers["cpu"], f"{max(1, host_bytes)}B"))
    asked = PlanRequest(
        str(artifact.path), target=machine.name, context=context, batch=slots, budgets=tuple(budgets),
        pins=("weights=gpu", f"embedding={tiers['gpu']}", "kv=near"), what_if=False, simulate=False,
    )  # fmt: skip
    try:
        placed = make_plan(asked).placement.kv
    except NoFit:
        return None
    all_layers = sorted(layer for entry in placed for layer in layer_numbers(entry.layers))
    number = {layer: i for i, layer in enumerate(all_layers)}  # among those that have keys and values
    here = [entry for entry in placed if entry.tier != tiers["gpu"]]
    return tuple(sorted(number[layer] for entry in here for layer in layer_numbers(entry.layers)))
