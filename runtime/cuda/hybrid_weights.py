"""Weights that do not all fit a GPU's memory: a pinned image of them on the host, and what a plan keeps on the device.

`HybridWeights` is a `WeightStore`. What stays is copied once. Dense pieces that pass through take two places in turn:
a stream of its own copies the next one while this one is used; events say when a copy is there and when a place is no
longer read. The last pieces of a step are followed by the first of the next.

Experts lie in slots (`runtime.cuda.hybrid_experts`), and come to them behind the router.

A step takes at most `most_tokens` tokens, whose experts always fit. Raises RuntimeDiagnostic and OutOfDeviceMemory.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.artifact import Artifact
from runtime.cuda.device import Device, host_view
from runtime.cuda.hybrid_experts import HybridExperts
from runtime.cuda.hybrid_plan import HbmPlan, plan_hbm
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import GpuLaunch, GpuStep, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.manifest_fields import REBUILD_HINT

_READ_BYTES = 8 << 20


@dataclass
class _Place:
    """A place of the window. `piece` is there or on its way; `used`: the step reads it, and has not said it is done."""

    address: int
    ready: Any
    free: Any
    piece: int = -1
    used: bool = False
    read: bool = False  # since it was filled: `free` tells when that is over


class HybridWeights:
    """The store of an artifact by a plan. `stream` is that of the steps."""

    captured = False

    def __init__(self, device: Device, stream: Any, artifact: Artifact, plan: HbmPlan, *, policy: str = "lrfu") -> None:
        self._device, self._stream, self.plan, self._policy = device, stream, plan, policy
        self._pieces = artifact.manifest.weights.pieces
        self.device_bytes = plan.device_bytes
        self.report = HybridReport(resident_bytes=plan.device_bytes, slots=tuple(count for _, count in plan.slots))
        self._step = _gpu(artifact)
        self._offsets = dict(plan.offsets)
        self._region = self._image = 0
        self._copies: Any = None
        self._experts: HybridExperts | None = None
        self._events: list[Any] = []
        self._places: list[_Place] = []
        self._first = {id(program.launches[0]) for program in self._step.programs if program.launches}
        self._host = dict.fromkeys((*plan.streamed, *(p for p, n in plan.slots if n < self._count(p))), 0)
        per_token = max(1, artifact.manifest.experts_per_token or 1)
        tight = [n for p, n in plan.slots if n < self._count(p)]
        self.most_tokens = min(tight) // per_token if tight else 0
        try:
            self._acquire()
            self._load(artifact)
        except BaseException:
            self.close()
            raise

    def _count(self, piece: int) -> int:
        return self._pieces[piece].bytes // self._pieces[piece].unit

    def _acquire(self) -> None:
        """Memory, stream and events."""
        device, plan = self._device, self.plan
        with uninterrupted():
            self._region = device.allocate(plan.device_bytes, "the weights that stay on the GPU")
        at = 0
        for piece in self._host:
            self._host[piece] = at
            at += self._pieces[piece].bytes
        self.report.host_bytes = at
        with uninterrupted():
            self._image = device.allocate_pinned(max(1, at), "the weights that stay on the host")
        with uninterrupted():
            self._copies = device.new_stream()
        for offset in plan.window_offsets:
            with uninterrupted():
                events = [device.new_event() for _ in range(2)]
                self._events += events
            self._places.append(_Place(self._region + offset, *events))
        self._experts = HybridExperts(
            device, self._stream, self._step, self._pieces, plan,
            region=self._region, source=self._expert_addresses, report=self.report, policy=self._policy,
        )  # fmt: skip

    def _expert_addresses(self, piece: int, experts: Sequence[int]) -> Iterator[tuple[int, int]]:
        """Where experts lie in pinned memory."""
        base, unit = self._image + self._host[piece], self._pieces[piece].unit
        yield from ((expert, base + expert * unit) for expert in experts)

    def _load(self, artifact: Artifact) -> None:
        """What stays goes to the device, the rest into the image."""
        where = str(artifact.path / artifact.manifest.weights.file)
        whole = [p for p, count in self.plan.slots if count == self._count(p)]
        descriptor = artifact.open_weights()
        buffer = 0
        try:
            for piece, at in self._host.items():
                info = self._pieces[piece]
                _read(descriptor, host_view(self._image + at, info.bytes), info.offset, where)
            with uninterrupted():
                buffer = self._device.allocate_pinned(_READ_BYTES, "the copying of weights")
            for piece in (*self.plan.resident, *whole):
                info = self._pieces[piece]
                for start in range(0, info.bytes, _READ_BYTES):
                    nbytes = min(_READ_BYTES, info.bytes - start)
                    _read(descriptor, host_view(buffer, nbytes), info.offset + start, where)
                    with uninterrupted():
                        target = self._region + self._offsets[piece] + start
                        self._device.copy_in(target, buffer, nbytes, self._copies)
                        self._device.synchronize(self._copies)
        finally:
            os.close(descriptor)
            if buffer and not self._device.lost:
                self._device.free_pinned(buffer)

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
        if piece in self.plan.streamed:
            return self._places[self.plan.streamed.index(piece) % len(self._places)].address, self._pieces[piece].bytes
        return self._region + self._offsets[piece], self._pieces[piece].bytes

    def before(self, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        if id(launch) in self._first:
            self.report.steps += 1
            self._forget_used()
        for wait in launch.waits:
            for piece in wait.done:
                self._give_up(piece)
            if self._experts is not None and self._experts.passes(wait.piece):
                self._experts.bring(wait, launch, sizes)
            elif wait.piece in self.plan.streamed:
                self._await(wait.piece)

    # -- dense pieces

    def _await(self, piece: int) -> None:
        """The step's stream waits for a piece; the next one begins to come as soon as its place is free."""
        number = self.plan.streamed.index(piece)
        place = self._places[number % len(self._places)]
        if place.piece != piece:
            self._fill(number)
        self._device.wait(self._stream, place.ready)
        place.used = place.read = True
        following = (number + 1) % len(self.plan.streamed)
        if not self._places[following % len(self._places)].used:
            self._fill(following)

    def _fill(self, number: int) -> None:
        """Starts to copy a piece to its place, behind what still reads there."""
        piece, device = self.plan.streamed[number], self._device
        place = self._places[number % len(self._places)]
        if place.piece == piece:
            return
        if place.used:
            origin = self._pieces[place.piece].origin
            raise RuntimeDiagnostic(
                f"the weights of {origin} are still used when those of {self._pieces[piece].origin} need their place",
                expected="programs that are done with a piece two pieces later", hint=REBUILD_HINT,
            )  # fmt: skip
        if place.read:
            device.wait(self._copies, place.free)
        nbytes = self._pieces[piece].bytes
        place.piece = -1  # until all of it is under way
        device.copy_in(place.address, self._image + self._host[piece], nbytes, self._copies)
        device.record(place.ready, self._copies)
        place.piece, place.used, place.read = piece, False, False
        self.report.dense_bytes += nbytes
        self.report.dense_copies += 1

    def _give_up(self, piece: int) -> None:
        """No later launch of this step reads a piece."""
        for place in self._places:
            if place.piece == piece and place.used:
                self._mark_free(place)

    def _mark_free(self, place: _Place) -> None:
        """Work that was given to the step's stream until now is all that reads a place."""
        self._device.record(place.free, self._stream)
        place.used = False

    def _forget_used(self) -> None:
        """A step begins: the one before has been given to the stream whole."""
        for place in self._places:
            if place.used:
                self._mark_free(place)

    def close(self) -> None:
        device = self._device
        if device.lost:
            return
        with uninterrupted():
            if self._experts is not None:
                self._experts.close()
            if self._copies is not None:
                device.synchronize(self._copies)
                device.free_stream(self._copies)
            for event in self._events:
                device.free_event(event)
            if self._region:
                device.free(self._region)
            if self._image:
                device.free_pinned(self._image)
            self._copies = self._experts = None
            self._events, self._region, self._image = [], 0, 0


def plan_of(artifact: Artifact, budget_bytes: int) -> HbmPlan:
    """What of an artifact's weights lies in at most `budget_bytes` of device memory; see `plan_hbm`."""
    programs = [[wait.piece for x in p.launches for wait in x.waits] for p in _gpu(artifact).programs]
    order = [piece for piece in dict.fromkeys(programs[0]) if all(piece in waits for waits in programs)]
    manifest = artifact.manifest
    return plan_hbm(manifest.weights.pieces, budget_bytes, manifest.experts_per_token or 1, order)


def _gpu(artifact: Artifact) -> GpuStep:
    assert artifact.gpu is not None
    return artifact.gpu


def _read(descriptor: int, view: np.ndarray, offset: int, where: str) -> None:
    """Fills `view` from the file."""
    done = 0
    while done < len(view):
        try:
            got = os.preadv(descriptor, [view[done : done + _READ_BYTES].data], offset + done)
        except OSError as fault:
            raise RuntimeDiagnostic(f"cannot read the weights: {fault.strerror}", where=where) from None
        if got == 0:
            raise RuntimeDiagnostic(f"the weights end at byte {offset + done}", where=where, hint=REBUILD_HINT)
        done += got
