"""A model twice as large as the device memory its weights may use: run on the GPU that is here, beside its simulation.

    python -m bench.gpu_hybrid model.stratum [--target h100-sxm] [--budget SIZE] [--steps N] [--context N]

The artifact is one for GPUs (`compile-model build MODEL -o model.stratum --device cuda`). Half of its weights may lie
on the device unless `--budget` says otherwise. Greedy decode steps of one sequence are timed behind a prompt; the same
steps are played by the simulator with the same plan, the hits that were found and the link's measured bandwidth. Where
the device has room for all weights as well, the tokens of such a run must be the same. Prints one table; 0 when tokens
are the same, 1 when not, 2 without a GPU or without such a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import hw_targets
from hw_targets.quantities import parse_quantity
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import CudaDevice, Device, open_device
from runtime.cuda.driver import NoDevice, OutOfDeviceMemory
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.session import CudaSession, gpu_step
from runtime.cuda.weights import WeightStore
from runtime.errors import RuntimeDiagnostic
from stratum.compare_run import Compared, compared_text
from stratum.device_prediction import DeviceCase, predict_device

WARM_STEPS = 4
COPY_BYTES = 64 << 20


def hybrid_rows(
    path: Path, device_of: Callable[[], CudaDevice], target: Target, *, budget: int | None, steps: int, context: int
) -> tuple[tuple[Compared, ...], bool | None]:
    """(figures of a decode step, predicted and measured; whether tokens are those of a device that has everything, None
    where it has no room)."""
    artifact = open_artifact(path)
    step, manifest = gpu_step(artifact), artifact.manifest
    plan = plan_of(artifact, budget if budget is not None else manifest.weights.bytes // 2)

    def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
        return HybridWeights(device, stream, artifact, plan)

    device = device_of()
    rate = link_rate(device)
    with CudaSession(path, device=device, weights=some, max_context=context + WARM_STEPS + steps) as session:
        tokens, seconds, before, after = _run(session, steps, context)
    try:
        with CudaSession(path, device=device_of(), max_context=context + WARM_STEPS + steps) as session:
            same = None if session.hybrid is not None else _run(session, steps, context)[0] == tokens
    except OutOfDeviceMemory:
        same = None
    assert before is not None and after is not None
    lookups, hits = after.lookups - before.lookups, after.hits - before.hits
    hit = hits / lookups if lookups else 1.0
    case = DeviceCase(
        step, manifest.weights.pieces, plan, with_link(target, rate), manifest.experts_per_token or 0,
        context + WARM_STEPS + steps // 2, 1, hit,
    )  # fmt: skip
    predicted = predict_device(case)
    moved = (after.link_bytes - before.link_bytes) / steps
    rows = [
        Compared("decode", "decode", predicted.seconds, seconds),
        Compared("decode", "over the link", predicted.link_bytes / 1e6, moved / 1e6, "MB"),
    ]
    if lookups:
        rows.append(Compared("decode", "experts found", 100 * hit, 100 * hit, "%"))
    return tuple(rows), same


def _run(
    session: CudaSession, steps: int, context: int
) -> tuple[list[int], float, HybridReport | None, HybridReport | None]:
    """Greedy tokens behind a drawn prompt, seconds of a step, and what had passed before and after the timed ones."""
    prompt = np.random.default_rng(5).integers(0, session.vocab_size, context).tolist()
    logits = session.step(prompt, range(context), [0] * context, [context - 1])
    tokens: list[int] = []
    started, before = 0.0, None
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS:
            started, before = time.perf_counter(), session.hybrid and dataclasses.replace(session.hybrid)
        tokens.append(int(logits[0].argmax()))
        logits = session.step(tokens[-1:], [context + number], [0], [0])
    return tokens, (time.perf_counter() - started) / steps, before, session.hybrid


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


def main(arguments: Sequence[str] | None = None, device_of: Callable[[], CudaDevice] = open_device) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_hybrid", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--target", default="h100-sxm", help="the machine that is simulated")
    parser.add_argument("--budget", metavar="SIZE", help="device memory for weights; default: half of them")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    options = parser.parse_args(arguments)
    try:
        budget = int(parse_quantity(options.budget, "bytes", where="--budget")) if options.budget else None
        rows, same = hybrid_rows(
            options.artifact, device_of, hw_targets.load(options.target), budget=budget, steps=options.steps,
            context=options.context,
        )  # fmt: skip
    except (NoDevice, DiagnosticError, RuntimeDiagnostic) as refusal:
        print(f"bench.gpu_hybrid: {refusal}", file=sys.stderr)
        return 2
    print(compared_text(rows))
    print("tokens: " + {True: "the same as with all weights there", False: "DIFFERENT", None: "not compared"}[same])
    return 1 if same is False else 0


if __name__ == "__main__":
    sys.exit(main())
