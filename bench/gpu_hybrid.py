"""A model twice as large as the device memory its weights may use: run on the GPU that is here, beside its simulation.

    python -m bench.gpu_hybrid model.stratum [--budget SIZE] [--host-memory SIZE] [--missed-experts auto|fetch|cpu]
                                             [--steps N] [--context N] [--target h100-sxm]

The artifact is one for GPUs (`compile-model build MODEL -o model.stratum --device cuda`). Half of its weights may lie
on the device unless `--budget` says otherwise; with `--host-memory` so much may be pinned of the host's memory, and
what it has no room for comes from the disk. Greedy decode steps of one sequence are timed behind a prompt, where
experts are missing once for each way of handling them; the same steps are played by the simulator with the same plans,
the hits that were found, and the bandwidths of link, disk and CPU and the host's time to decide as measured. Where the
device has room for all weights as well, the tokens of such a run must be the same (with `fetch`, to the bit). Prints
one table; 0 when tokens are the same, 1 when not, 2 without a GPU or without such a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

import hw_targets
from bench.measure import table
from hw_targets.memory import StoragePoint
from hw_targets.quantities import parse_quantity
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import CudaDevice, Device, open_device
from runtime.cuda.driver import NoDevice, OutOfDeviceMemory
from runtime.cuda.host_experts import ExpertCode, HostLayer, open_host
from runtime.cuda.host_tier import READERS, REQUEST_BYTES
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.missed_experts import FETCH, MODES, Missed
from runtime.cuda.session import CudaSession, gpu_step
from runtime.cuda.step_memory import pinned_bytes
from runtime.cuda.weights import WeightStore
from runtime.errors import RuntimeDiagnostic
from runtime.memory import PAGE_BYTES, Reservation
from runtime.weight_reader import WeightReader
from stratum.compare_run import Compared
from stratum.device_case import DECIDE_S, DeviceCase
from stratum.device_prediction import DevicePrediction, predict_device
from stratum.device_prices import Gpu, machine_like
from stratum.plan_report import seconds_text

WARM_STEPS = 4
COPY_BYTES = 64 << 20
MOST_ERROR = 0.15  # of a step's seconds, that a simulation may be off
DENSE = "dense"  # the mode of a model of which no expert is missing
CodeOf = Callable[[Artifact], ExpertCode | None]


@dataclass(frozen=True)
class Comparison:
    """Figures of a decode step in one mode, predicted and measured; whether tokens are those of a device that has
    everything, None where it has no room; the prediction."""

    mode: str
    rows: tuple[Compared, ...]
    same: bool | None
    predicted: DevicePrediction

    @property
    def error(self) -> float:
        """Of the foretold seconds of a step, as a share of the measured ones."""
        return self.rows[0].error


@dataclass(frozen=True)
class Rates:
    """Of this machine: bytes a second over the link and from the disk (0: not asked for), seconds until a small copy is
    known to be over."""

    link: float
    latency_s: float
    disk: float = 0.0

    def on(self, target: Target) -> Target:
        """The target with them."""
        target = with_link(target, self.link, self.latency_s)
        return with_disk(target, self.disk) if self.disk else target


def hybrid_rows(
    path: Path,
    device_of: Callable[[], CudaDevice],
    target: Target | None,
    *,
    budget: int | None,
    steps: int,
    context: int,
    host: int | None = None,
    modes: Sequence[str] = (FETCH,),
    code_of: CodeOf = open_host,
) -> list[Comparison]:
    """Runs and plays one model, missing experts handled in each of `modes` where some are missing; `budget` is for
    weights on the device, `host` for all that is pinned. Without `target` it is the machine with such a GPU."""
    artifact = open_artifact(path)
    manifest = artifact.manifest
    plan = plan_of(artifact, budget if budget is not None else manifest.weights.bytes // 2)
    pieces = manifest.weights.pieces
    if not any(count * pieces[piece].unit < pieces[piece].bytes for piece, count in plan.slots):
        modes = (DENSE,)
    device, positions = device_of(), context + WARM_STEPS + steps
    try:
        target = target or machine_like(Gpu(device.name, 0))
        rates = Rates(link_rate(device), link_latency(device), disk_rate(artifact) if host is not None else 0.0)
    finally:
        device.close()
    run = _Run(path, device_of, artifact, plan, rates.on(target), steps, context, host, code_of)
    expected: list[int] | None = None
    try:
        with CudaSession(path, device=device_of(), max_context=positions) as session:
            expected = None if session.hybrid is not None else _run(session, steps, context).tokens
    except OutOfDeviceMemory:
        pass
    return [run.comparison(mode, expected) for mode in modes]


@dataclass(frozen=True)
class _Run:
    """One model by one plan, to be run and played in some modes."""

    path: Path
    device_of: Callable[[], CudaDevice]
    artifact: Artifact
    plan: HbmPlan
    target: Target
    steps: int
    context: int
    host: int | None
    code_of: CodeOf

    def comparison(self, mode: str, expected: list[int] | None) -> Comparison:
        step, manifest, stores = gpu_step(self.artifact), self.artifact.manifest, list[HybridWeights]()
        missed = Missed(FETCH if mode == DENSE else mode)
        layers: list[HostLayer | None] = []

        def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
            others = pinned_bytes(step, manifest.vocab_size)
            code = self.code_of(artifact) if missed.mode != FETCH else None
            layers.extend(code.layer(piece) for piece, _ in self.plan.slots if code is not None)
            stores.append(HybridWeights(device, stream, artifact, self.plan, others_pinned=others, missed=missed,
                                        code=code))  # fmt: skip
            return stores[0]

        positions = self.context + WARM_STEPS + self.steps
        with CudaSession(
            self.path, device=self.device_of(), weights=some, max_context=positions, host_memory=self.host
        ) as session:
            prices = stores[0].prices
            made = _run(session, self.steps, self.context)
        hit, host_hit = made.share("hits", "lookups"), made.share("host_hits", "host_lookups")
        decisions = made.each("decisions")
        case = DeviceCase(
            step, manifest.weights.pieces, self.plan, self.target, manifest.experts_per_token or 0,
            self.context + WARM_STEPS + self.steps // 2, 1, 1.0 if hit is None else hit, stores[0].host_plan,
            1.0 if host_hit is None else host_hit, missed.mode, tuple(x for x in layers if x is not None), prices,
            made.each("decide_s") / decisions if decisions else DECIDE_S,
        )  # fmt: skip
        predicted = predict_device(case)
        rows = [
            Compared(mode, "decode", predicted.seconds, made.seconds),
            Compared(mode, "over the link", predicted.link_bytes / 1e6, made.each("link_bytes") / 1e6, "MB"),
        ]
        if made.after.disk_bytes:
            rows.append(
                Compared(mode, "from the disk", predicted.read_bytes / 1e6, made.each("read_bytes") / 1e6, "MB")
            )
        for what, name in (("kernels", "launches"), ("graphs", "graphs")):
            rows.append(Compared(mode, what, float(getattr(predicted, name)), made.each(name), "launches"))
        if missed.mode != FETCH:
            rows.append(Compared(mode, "by the CPU", predicted.computed, made.each("computed"), "experts"))
        for what, found in (("experts found", hit), ("experts in pinned memory", host_hit)):
            if found is not None:
                rows.append(Compared(mode, what, 100 * found, 100 * found, "%"))
        same = None if expected is None else expected == made.tokens
        return Comparison(mode, tuple(rows), same, predicted)


@dataclass(frozen=True)
class _Made:
    """Greedy tokens, seconds of a step, and what had passed before and after the timed ones."""

    tokens: list[int]
    seconds: float
    before: HybridReport
    after: HybridReport
    steps: int

    def each(self, name: str) -> float:
        """What a counter went up by in a step."""
        return (getattr(self.after, name) - getattr(self.before, name)) / self.steps

    def share(self, hits: str, lookups: str) -> float | None:
        """Of the timed steps; None where nothing was asked for."""
        asked = self.each(lookups)
        return self.each(hits) / asked if asked else None


def _run(session: CudaSession, steps: int, context: int) -> _Made:
    """Greedy steps behind a drawn prompt."""
    prompt = np.random.default_rng(5).integers(0, session.vocab_size, context).tolist()
    logits = session.step(prompt, range(context), [0] * context, [context - 1])
    tokens: list[int] = []
    started, before = 0.0, HybridReport()
    for number in range(WARM_STEPS + steps):
        if number == WARM_STEPS:
            started, before = time.perf_counter(), dataclasses.replace(session.hybrid or before)
        tokens.append(int(logits[0].argmax()))
        logits = session.step(tokens[-1:], [context + number], [0], [0])
    seconds = (time.perf_counter() - started) / steps
    return _Made(tokens, seconds, before, dataclasses.replace(session.hybrid or before), steps)


def link_latency(device: Device, rounds: int = 20) -> float:
    """Seconds until the host knows that a copy of a few bytes is over, at the median."""
    device.enter()
    stream, host, target = device.new_stream(), device.allocate_pinned(64, "a copy"), device.allocate(64, "one")
    times = []
    try:
        for _ in range(rounds):
            started = time.perf_counter()
            device.copy_in(target, host, 64, stream)
            device.synchronize(stream)
            times.append(time.perf_counter() - started)
        return median(times)
    finally:
        device.synchronize(stream)
        device.free(target)
        device.free_pinned(host)
        device.free_stream(stream)


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


def with_link(target: Target, rate: float, latency_s: float | None = None) -> Target:
    """The target with another bandwidth to its GPU, which a copy reaches, and another latency."""
    gpu = next((unit for unit in target.units if unit.kind == "gpu"), None)
    links = tuple(
        dataclasses.replace(
            link, bandwidth=rate, back_bandwidth=None, efficiency=None,
            latency_seconds=link.latency_seconds if latency_s is None else latency_s,
        ) if gpu is not None and gpu.tier in (link.from_tier, link.to_tier)
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
    parser.add_argument("--target", help="the machine that is simulated; default: the one with such a GPU")
    parser.add_argument("--budget", metavar="SIZE", help="device memory for weights; default: half of them")
    parser.add_argument("--host-memory", metavar="SIZE", help="pinned memory; the rest comes from the disk")
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--context", type=int, default=64)
    parser.add_argument("--missed-experts", choices=MODES, help="one of the three ways; default: each in turn")
    options = parser.parse_args(arguments)
    try:
        budget, host = (
            int(parse_quantity(text, "bytes", where=name)) if text else None
            for text, name in ((options.budget, "--budget"), (options.host_memory, "--host-memory"))
        )
        target = hw_targets.load(options.target) if options.target else None
        found = hybrid_rows(
            options.artifact, device_of, target, budget=budget, steps=options.steps, context=options.context, host=host,
            modes=(options.missed_experts,) if options.missed_experts else MODES,
        )  # fmt: skip
    except (NoDevice, DiagnosticError, RuntimeDiagnostic) as refusal:
        print(f"bench.gpu_hybrid: {refusal}", file=sys.stderr)
        return 2
    print(report(found))
    for comparison in found:
        print(said_of(comparison))
    return 1 if any(wrong(comparison) for comparison in found) else 0


def report(found: Sequence[Comparison]) -> str:
    """The table: a step's figures in each mode."""
    cells = []
    for comparison in found:
        for row in comparison.rows:
            error = f"{100 * row.error:+.0f} %" if row.measured and row.predicted else "-"
            name = "a decode step" if row.what == "decode" else row.what
            cells.append(
                (comparison.mode, name, _shown(row.predicted, row.unit), _shown(row.measured, row.unit), error)
            )
    return table(["missing experts", "what", "foretold", "measured", "error"], cells)


def _shown(value: float, unit: str) -> str:
    return seconds_text(value) if unit == "s" else f"{value:.4g} {unit}"


def wrong(comparison: Comparison) -> bool:
    """Whether tokens differ though nothing was computed by the CPU."""
    return comparison.same is False and comparison.mode in (DENSE, FETCH)


def said_of(comparison: Comparison) -> str:
    """What bounds the step, how far the simulation is off, and whether tokens are the same, in one line."""
    words = {True: "the same as with all weights there", False: "DIFFERENT", None: "not compared"}
    tokens = words[comparison.same]
    if comparison.same is False and not wrong(comparison):
        tokens = "others than with all weights there (the CPU rounds in another order)"
    predicted = comparison.predicted
    return (
        f"{comparison.mode}: foretold {100 * comparison.error:+.0f} % (within {100 * MOST_ERROR:.0f} %: "
        f"{'yes' if abs(comparison.error) <= MOST_ERROR else 'NO'}), bound by {predicted.bound}, launches take "
        f"{seconds_text(predicted.dispatch_seconds)} of the simulated step; tokens: {tokens}"
    )


if __name__ == "__main__":
    sys.exit(main())
