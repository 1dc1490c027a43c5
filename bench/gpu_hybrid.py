"""A model twice as large as the device memory its weights may use: run on the GPU that is here, beside its simulation.

    python -m bench.gpu_hybrid model.stratum [--target h100-sxm] [--budget SIZE] [--host-memory SIZE] [--steps N]
                                             [--context N]

The artifact is one for GPUs (`compile-model build MODEL -o model.stratum --device cuda`). Half of its weights may lie
on the device unless `--budget` says otherwise; with `--host-memory` so much may be pinned of the host's memory, and
what it has no room for comes from the disk. Greedy decode steps of one sequence are timed behind a prompt; the same
steps are played by the simulator with the same plans, the hits that were found and the measured bandwidths of the link
and the disk. Where the device has room for all weights as well, the tokens of such a run must be the same. Prints one
table; 0 when tokens are the same, 1 when not, 2 without a GPU or without such a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import hw_targets
from hw_targets.memory import StoragePoint
from hw_targets.quantities import parse_quantity
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import CudaDevice, Device, open_device
from runtime.cuda.driver import NoDevice, OutOfDeviceMemory
from runtime.cuda.executor import pinned_bytes
from runtime.cuda.host_tier import READERS, REQUEST_BYTES
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.session import CudaSession, gpu_step
from runtime.cuda.weights import WeightStore
from runtime.errors import RuntimeDiagnostic
from runtime.memory import PAGE_BYTES, Reservation
from runtime.weight_reader import WeightReader
from stratum.compare_run import Compared, compared_text
from stratum.device_prediction import DeviceCase, DevicePrediction, predict_device
from stratum.plan_report import seconds_text

WARM_STEPS = 4
COPY_BYTES = 64 << 20


@dataclass(frozen=True)
class Comparison:
    """Figures of a decode step, predicted and measured; whether tokens are those of a device that has everything, None
    where it has no room; the prediction."""

    rows: tuple[Compared, ...]
    same: bool | None
    predicted: DevicePrediction


def hybrid_rows(
    path: Path,
    device_of: Callable[[], CudaDevice],
    target: Target,
    *,
    budget: int | None,
    steps: int,
    context: int,
    host: int | None = None,
) -> Comparison:
    """Runs and plays one model; `budget` is for weights on the device, `host` for all that is pinned."""
    artifact = open_artifact(path)
    step, manifest = gpu_step(artifact), artifact.manifest
    plan = plan_of(artifact, budget if budget is not None else manifest.weights.bytes // 2)

    stores: list[HybridWeights] = []

    def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
        others = pinned_bytes(step, manifest.vocab_size)
        stores.append(HybridWeights(device, stream, artifact, plan, others_pinned=others))
        return stores[0]

    device, positions = device_of(), context + WARM_STEPS + steps
    target = with_link(target, link_rate(device))
    if host is not None:
        target = with_disk(target, disk_rate(artifact))
    with CudaSession(path, device=device, weights=some, max_context=positions, host_memory=host) as session:
        tokens, seconds, before, after = _run(session, steps, context)
    try:
        with CudaSession(path, device=device_of(), max_context=positions) as session:
            same = None if session.hybrid is not None else _run(session, steps, context)[0] == tokens
    except OutOfDeviceMemory:
        same = None

    def share(hits: str, lookups: str) -> float | None:
        """Of the timed steps; None where nothing was asked for."""
        asked = getattr(after, lookups) - getattr(before, lookups)
        return (getattr(after, hits) - getattr(before, hits)) / asked if asked else None

    hit, host_hit = share("hits", "lookups"), share("host_hits", "host_lookups")
    case = DeviceCase(
        step, manifest.weights.pieces, plan, target, manifest.experts_per_token or 0, context + WARM_STEPS + steps // 2,
        1, 1.0 if hit is None else hit, stores[0].host_plan, 1.0 if host_hit is None else host_hit,
    )  # fmt: skip
    predicted = predict_device(case)
    rows = [
        Compared("decode", "decode", predicted.seconds, seconds),
        Compared("decode", "over the link", predicted.link_bytes / 1e6, _each(before, after, "link_bytes", steps) / 1e6,
                 "MB"),
    ]  # fmt: skip
    if after.disk_bytes:
        read = _each(before, after, "read_bytes", steps) / 1e6
        rows.append(Compared("decode", "from the disk", predicted.read_bytes / 1e6, read, "MB"))
    for what, name in (("kernels", "launches"), ("graphs", "graphs")):
        counted = _each(before, after, name, steps)
        rows.append(Compared("decode", what, float(getattr(predicted, name)), counted, "launches"))
    for what, found in (("experts found", hit), ("experts in pinned memory", host_hit)):
        if found is not None:
            rows.append(Compared("decode", what, 100 * found, 100 * found, "%"))
    return Comparison(tuple(rows), same, predicted)


def _each(before: HybridReport, after: HybridReport, name: str, steps: int) -> float:
    """What a counter went up by in a step."""
    return (getattr(after, name) - getattr(before, name)) / steps


def _run(session: CudaSession, steps: int, context: int) -> tuple[list[int], float, HybridReport, HybridReport]:
    """Greedy tokens behind a drawn prompt, seconds of a step, and what had passed before and after the timed ones."""
    prompt = np.random.default_rng(5).integers(0, session.vocab_size, context).tolist()
    logits = session.step(prompt, range(context), [0] * context, [context - 1])
    tokens: list[int] = []
    started, before = 0.0, HybridReport()
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS:
            started, before = time.perf_counter(), dataclasses.replace(session.hybrid or before)
        tokens.append(int(logits[0].argmax()))
        logits = session.step(tokens[-1:], [context + number], [0], [0])
    return tokens, (time.perf_counter() - started) / steps, before, session.hybrid or before


def link_rate(device: Device, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second of a copy from pinned memory to the device."""
    device.enter()
    stream, host, target = device.new_stream(), device.allocate_pinned(nbytes, "a copy"), device.allocate(nbytes, "one")
    start, end = device.new_event(timed=True), device.new_event(timed=True)
    try:
        device.copy_in(target, host, nbytes, stream)
        device.record(start, stream)
        device.copy_in(target, host, nbytes, stream)
        device.record(end, stream)
        device.synchronize(stream)
        return nbytes / max(device.seconds_between(start, end), 1e-9)
    finally:
        device.synchronize(stream)
        for event in (start, end):
            device.free_event(event)
        device.free(target)
        device.free_pinned(host)
        device.free_stream(stream)


def with_link(target: Target, rate: float) -> Target:
    """The target with another bandwidth to its GPU."""
    gpu = next((unit for unit in target.units if unit.kind == "gpu"), None)
    links = tuple(
        dataclasses.replace(link, bandwidth=rate) if gpu is not None and gpu.tier in (link.from_tier, link.to_tier)
        else link for link in target.links
    )  # fmt: skip
    return dataclasses.replace(target, links=links)


def disk_rate(artifact: Artifact, nbytes: int = COPY_BYTES) -> float:
    """Bytes a second of reads as `runtime.cuda.host_tier` makes them, past the page cache where the disk allows it."""
    weights = artifact.manifest.weights
    nbytes = min(nbytes, weights.bytes // PAGE_BYTES * PAGE_BYTES)
    memory = Reservation(nbytes, what="reading the disk")
    reader = WeightReader(
        str(artifact.path / weights.file), artifact.open_weights(), weights.bytes, memory.view(), threads=READERS,
        request_bytes=REQUEST_BYTES,
    )  # fmt: skip
    try:
        reader.submit([(0, nbytes)], "disk").wait()
        return reader.counters.bytes / max(reader.counters.busy_s, 1e-9)
    finally:
        reader.close()
        memory.close()


def with_disk(target: Target, rate: float) -> Target:
    """The target with a drive of another bandwidth beside its host's memory."""
    points = (StoragePoint(REQUEST_BYTES, READERS, rate),)
    return dataclasses.replace(
        target, storage=tuple(dataclasses.replace(store, points=points) for store in target.storage)
    )


def main(arguments: Sequence[str] | None = None, device_of: Callable[[], CudaDevice] = open_device) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_hybrid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--target", default="h100-sxm", help="the machine that is simulated")
    parser.add_argument("--budget", metavar="SIZE", help="device memory for weights; default: half of them")
    parser.add_argument("--host-memory", metavar="SIZE", help="pinned memory; the rest comes from the disk")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        budget, host = (
            int(parse_quantity(text, "bytes", where=name)) if text else None
            for text, name in ((options.budget, "--budget"), (options.host_memory, "--host-memory"))
        )
        found = hybrid_rows(
            options.artifact, device_of, hw_targets.load(options.target), budget=budget, steps=options.steps,
            context=options.context, host=host,
        )  # fmt: skip
    except (NoDevice, DiagnosticError, RuntimeDiagnostic) as refusal:
        print(f"bench.gpu_hybrid: {refusal}", file=sys.stderr)
        return 2
    print(compared_text(found.rows))
    predicted = found.predicted
    print(f"bound: {predicted.bound}; launches take {seconds_text(predicted.dispatch_seconds)} of the simulated step")
    words = {True: "the same as with all weights there", False: "DIFFERENT", None: "not compared"}
    print("tokens: " + words[found.same])
    return 1 if found.same is False else 0


if __name__ == "__main__":
    sys.exit(main())
