"""Weights that do not all fit a GPU's memory: what a plan keeps on the device, and the rest, which passes through it.

`HybridWeights` is a `WeightStore`. What stays is copied once. Dense pieces that pass through take the places of a
window in turn (`runtime.cuda.dense_window`), experts lie in slots and come to them behind the router
(`runtime.cuda.hybrid_experts`). Both come from pinned host memory, or from the disk through it where that may not hold
all of them (`runtime.cuda.host_tier`).

Where the host decides nothing within a step, a step is captured whole, copies included; else what lies between two
launches that the host acts at. A step takes at most `most_tokens` tokens, whose experts always fit. Raises
RuntimeDiagnostic and OutOfDeviceMemory.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

from runtime.artifact import Artifact
from runtime.cuda.dense_window import DenseWindow, StepCopies
from runtime.cuda.device import Device
from runtime.cuda.host_experts import ExpertCode
from runtime.cuda.host_plan import HostPlan, plan_host
from runtime.cuda.host_tier import HostTier
from runtime.cuda.hybrid_experts import HybridExperts
from runtime.cuda.hybrid_plan import HbmPlan, plan_hbm
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.missed_experts import FETCHED, ExpertPrices, Missed
from runtime.cuda.program import GpuLaunch, GpuStep, WeightArgument
from runtime.cuda.step_memory import scratch_bytes
from runtime.weight_reader import Pread

SPARE_BYTES = 256 << 20  # of the device's memory beside what is counted: modules, and the driver's own


class HybridWeights:
    """The store of an artifact by a plan of the device. What does not stay there is pinned on the host as far as the
    device's `host_limit_bytes` allow beside `others_pinned`. `stream` is that of the steps, `preadv` the seam where
    tests plant faults. `missed` says what is done about experts that are not on the device, `code` computes them on the
    CPU and is closed with this."""

    def __init__(
        self, device: Device, stream: Any, artifact: Artifact, plan: HbmPlan, *,
        others_pinned: int = 0, policy: str = "lrfu", preadv: Pread = os.preadv,
        missed: Missed = FETCHED, code: ExpertCode | None = None,
    ) -> None:  # fmt: skip
        self._device, self._stream, self.plan = device, stream, plan
        self._pieces = artifact.manifest.weights.pieces
        self.device_bytes = plan.device_bytes
        self._report = HybridReport(resident_bytes=plan.device_bytes, slots=tuple(count for _, count in plan.slots))
        self._step = _gpu(artifact)
        self._offsets = dict(plan.offsets)
        self._region = 0
        self._copies: Any = None
        self.host_plan: HostPlan | None = None
        self._host: HostTier | None = None
        self._experts: HybridExperts | None = None
        self._events: list[Any] = []
        self._loaded = HybridReport()  # what was read and looked up before the first step
        self._first = {id(program.launches[0]) for program in self._step.programs if program.launches}
        per_token = max(1, artifact.manifest.experts_per_token or 1)
        tight = [n for p, n in plan.slots if n < self._count(p)]
        self.most_tokens = min(tight) // per_token if tight else 0
        try:
            self._acquire(artifact, others_pinned, policy, preadv, missed, code)
        except BaseException:
            self.close()
            if self._experts is None and code is not None:
                code.close()
            raise

    def _count(self, piece: int) -> int:
        return self._pieces[piece].bytes // self._pieces[piece].unit

    def _acquire(
        self, artifact: Artifact, others_pinned: int, policy: str, preadv: Pread, missed: Missed,
        code: ExpertCode | None,
    ) -> None:  # fmt: skip
        """Memory, streams and events; then what stays is loaded."""
        device, plan = self._device, self.plan
        with uninterrupted():
            self._region = device.allocate(plan.device_bytes, "the weights that stay on the GPU")
        with uninterrupted():
            self._copies = device.new_stream()
        for _ in range(2 * len(plan.window_offsets) + 2):
            with uninterrupted():
                self._events.append(device.new_event())
        self._experts = HybridExperts(
            device, self._stream, self._step, self._pieces, plan,
            region=self._region, report=self._report, policy=policy,
            most_tokens=self.most_tokens, missed=missed, code=code,
        )  # fmt: skip
        limit = device.host_limit_bytes
        room = None if limit is None else limit - device.pinned_bytes() - others_pinned
        host_plan = self.host_plan = plan_host(self._pieces, plan, room)
        self.captured = not self.most_tokens and not host_plan.staged
        with uninterrupted():
            host = self._host = HostTier(device, artifact, host_plan, self._copies, policy=policy, preadv=preadv)
        host.copies_of_experts, self._experts.home = self._experts.copies, host
        self._report.host_bytes, self._report.host_slots = host_plan.host_bytes, host_plan.slots
        self._report.disk_bytes = sum(self._pieces[piece].bytes for piece in host_plan.from_disk)
        self._window = DenseWindow(
            device, self._stream, self._copies, self._pieces, plan,
            region=self._region, host=host, report=self._report, events=self._events,
        )  # fmt: skip
        whole = [p for p, count in plan.slots if count == self._count(p)]
        host.load([
            (self._pieces[piece].offset, self._pieces[piece].bytes, self._region + self._offsets[piece])
            for piece in (*plan.resident, *whole)
        ])  # fmt: skip
        self._experts.measure()
        self._loaded = replace(self.report)

    @property
    def report(self) -> HybridReport:
        """What happened so far; the same object each time."""
        report, host = self._report, self._host
        if host is not None:
            reads, before, (lookups, hits) = host.reads, self._loaded, host.lookups
            report.reads, report.read_bytes = reads.requests - before.reads, reads.bytes - before.read_bytes
            report.read_s, report.retries = reads.busy_s - before.read_s, reads.retries
            report.read_wait_s = host.stall_s - before.read_wait_s
            report.host_lookups, report.host_hits = lookups - before.host_lookups, hits - before.host_hits
        return report

    @property
    def prices(self) -> ExpertPrices | None:
        """By which missing experts are divided between link and CPU, while the store is open."""
        return self._experts.prices if self._experts is not None else None

    # -- as a store

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device."""
        assert self._experts is not None
        self._experts.attach(arena)

    def address(self, argument: WeightArgument) -> int:
        return self._place_of(argument)[0] + argument.offset - self._pieces[argument.piece].offset

    def extent(self, argument: WeightArgument) -> int:
        """Bytes behind the address that belong to it: of experts in slots fewer than of all."""
        base, nbytes = self._place_of(argument)
        return min(argument.bytes, base + nbytes - self.address(argument))

    def _place_of(self, argument: WeightArgument) -> tuple[int, int]:
        """Where the piece of an argument begins, always, and the bytes that are there."""
        piece = argument.piece
        slots = self._experts.place(piece) if self._experts is not None else None
        if slots is not None:
            return slots
        if self._window.passes(piece):
            return self._window.address(piece), self._pieces[piece].bytes
        return self._region + self._offsets[piece], self._pieces[piece].bytes

    def cuts(self, launch: GpuLaunch) -> bool:
        """Whether `before` does anything for a launch, so that no captured segment may have it inside."""
        assert self._experts is not None
        return (
            id(launch) in self._first
            or self._experts.acts(launch)
            or any(self._window.passes(piece) for wait in launch.waits for piece in (wait.piece, *wait.done))
        )

    def before(self, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        assert self._experts is not None
        if id(launch) in self._first:
            self._report.steps += 1
            self._window.begin_step()
            self._experts.forget()
        self._experts.finish(launch)
        for wait in launch.waits:
            for piece in wait.done:
                self._window.done(piece)
            if self._experts.passes(wait.piece):
                self._experts.bring(wait, launch, sizes)
            elif self._window.passes(wait.piece):
                self._window.wait_for(wait.piece)
        if not self.captured:
            self._window.follow()

    def given(self, launches: int, graphs: int) -> None:
        self._report.launches += launches
        self._report.graphs += graphs

    # -- captured steps

    @property
    def state(self) -> tuple[int, ...]:
        return self._window.state

    def settle(self) -> None:
        self._window.settle()

    def capturing(self) -> AbstractContextManager[list[StepCopies]]:
        return self._window.captured()

    def replayed(self, step: StepCopies | None) -> None:
        if step is None:
            self._window.forget()
        else:
            self._window.replayed(step)

    def close(self) -> None:
        device = self._device
        if device.lost:
            for part in (self._experts, self._host):
                if part is not None:
                    part.close()
            return
        with uninterrupted():
            if self._experts is not None:
                self._experts.close()
            if self._copies is not None:
                device.synchronize(self._copies)
                device.free_stream(self._copies)
            if self._host is not None:
                self._host.close()
            for event in self._events:
                device.free_event(event)
            if self._region:
                device.free(self._region)
            self._copies = self._experts = None
            self._events, self._region = [], 0


def plan_of(artifact: Artifact, budget_bytes: int) -> HbmPlan:
    """What of an artifact's weights lies in at most `budget_bytes` of device memory; see `plan_hbm`."""
    programs = [[wait.piece for x in p.launches for wait in x.waits] for p in _gpu(artifact).programs]
    order = [piece for piece in dict.fromkeys(programs[0]) if all(piece in waits for waits in programs)]
    manifest = artifact.manifest
    return plan_hbm(manifest.weights.pieces, budget_bytes, manifest.experts_per_token or 1, order)


def passing_plan(artifact: Artifact, free: int, kv_bytes: int) -> HbmPlan | None:
    """What of the weights stays on a device with `free` bytes where not all of them fit beside activations and a cache
    of `kv_bytes`; None where they do. Raises RuntimeDiagnostic where not even that helps."""
    scratch, weights = scratch_bytes(_gpu(artifact), artifact.manifest.vocab_size), artifact.manifest.weights
    if scratch + weights.bytes <= free:
        return None
    return plan_of(artifact, free - scratch - kv_bytes - min(SPARE_BYTES, free // 16))


def _gpu(artifact: Artifact) -> GpuStep:
    assert artifact.gpu is not None
    return artifact.gpu
