"""Weights that do not all fit a GPU's memory: a pinned image of them on the host, and what a plan keeps on the device.

`HybridWeights` is a `WeightStore`. What stays is copied once. Dense pieces that pass through take two places in turn:
a stream of its own copies the next one while this one is used; events say when a copy is there and when a place is no
longer read. The last pieces of a step are followed by the first of the next.

Experts lie in slots. Behind the router the host waits for the tiles that the dispatching kernel has made (expert, first
row, rows, 0), decides with `runtime.expert_cache` what is there, copies what is missing into slots that were given up,
and writes the numbers of the slots over those of the experts: kernels find expert s at `base + s * stride` whether all
experts are there or some. So the bits are those of a device that has room for everything. Missing experts are never
computed by the CPU, whose kernels round sums in another order: that would change the bits.

A step takes at most `most_tokens` tokens, whose experts always fit. Raises RuntimeDiagnostic and OutOfDeviceMemory.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.artifact import Artifact
from runtime.cuda.device import Device, host_view
from runtime.cuda.hybrid_plan import HbmPlan, plan_hbm
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import ArenaArgument, GpuLaunch, GpuStep, SizeArgument, Wait, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import ExpertCache
from runtime.manifest_fields import REBUILD_HINT

TILE_WORDS = 4  # of a tile of experts: expert, first row, rows, 0
_READ_BYTES = 8 << 20


@dataclass
class HybridReport:
    """What went over the link since the store was made, beside what was found on the device."""

    steps: int = 0
    dense_bytes: int = 0
    expert_bytes: int = 0
    dense_copies: int = 0
    lookups: int = 0
    hits: int = 0
    router_wait_s: float = 0.0  # the host's, for the tiles of experts
    resident_bytes: int = 0
    host_bytes: int = 0
    slots: tuple[int, ...] = ()

    @property
    def link_bytes(self) -> int:
        return self.dense_bytes + self.expert_bytes

    def summary(self) -> str:
        """One line for the end of a run."""
        steps = max(1, self.steps)
        parts = [f"GPU: {self.resident_bytes / 2**20:.0f} MiB of weights stay there, {self.host_bytes / 2**20:.0f} MiB "
                 f"are in pinned host memory; {self.link_bytes / steps / 1e6:.1f} MB a step over the link"]  # fmt: skip
        if self.lookups:
            parts.append(
                f"{self.hits / self.lookups:.1%} of {self.lookups} experts were there, missing ones were fetched"
            )
        return ", ".join(parts)


@dataclass
class _Place:
    """A place of the window. `piece` is there or on its way; `used`: the step reads it, and has not said it is done."""

    address: int
    ready: Any
    free: Any
    piece: int = -1
    used: bool = False
    read: bool = False  # since it was filled: `free` tells when that is over


@dataclass
class _Slots:
    """Experts of a piece: which slot has which."""

    address: int
    unit: int
    count: int
    unused: list[int]
    slot_of: dict[int, int] = field(default_factory=dict)


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
        self._arena = 0
        self._region = self._image = self._host_tiles = 0
        self._copies: Any = None
        self._expert_copies: Any = None  # of its own: what is waited for is not behind what is only needed next
        self._events: list[Any] = []
        self._places: list[_Place] = []
        self._slots: dict[int, _Slots] = {}
        self._first = {id(program.launches[0]) for program in self._step.programs if program.launches}
        self._host = dict.fromkeys((*plan.streamed, *(p for p, n in plan.slots if n < self._experts(p))), 0)
        per_token = max(1, artifact.manifest.experts_per_token or 1)
        tight = [n for p, n in plan.slots if n < self._experts(p)]
        self.most_tokens = min(tight) // per_token if tight else 0
        try:
            self._acquire()
            self._load(artifact)
        except BaseException:
            self.close()
            raise
        self._caches = {
            piece: ExpertCache([self._pieces[piece].unit], count * self._pieces[piece].unit, policy=policy)
            for piece, count in plan.slots
            if count < self._experts(piece)
        }

    def _experts(self, piece: int) -> int:
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
        tiles = max([1, *(_most_tiles(launch) for p in self._step.programs for launch in p.launches)])
        with uninterrupted():
            self._host_tiles = device.allocate_pinned(tiles * TILE_WORDS * 4, "tiles of experts")
            self._copies = device.new_stream()
        with uninterrupted():
            self._expert_copies = device.new_stream()
        for offset in plan.window_offsets:
            with uninterrupted():
                events = [device.new_event() for _ in range(2)]
                self._events += events
            self._places.append(_Place(self._region + offset, *events))
        with uninterrupted():
            self._experts_there = device.new_event()
            self._events.append(self._experts_there)
        for piece, count in plan.slots:
            address = self._region + self._offsets[piece]
            self._slots[piece] = _Slots(address, self._pieces[piece].unit, count, list(range(count))[::-1])

    def _load(self, artifact: Artifact) -> None:
        """What stays goes to the device, the rest into the image."""
        where = str(artifact.path / artifact.manifest.weights.file)
        whole = [p for p, count in self.plan.slots if count == self._experts(p)]
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
        self._arena = arena

    def address(self, argument: WeightArgument) -> int:
        return self._place_of(argument)[0] + argument.offset - self._pieces[argument.piece].offset

    def extent(self, argument: WeightArgument) -> int:
        """Bytes behind the address that belong to it: of experts in slots fewer than of all."""
        base, nbytes = self._place_of(argument)
        return min(argument.bytes, base + nbytes - self.address(argument))

    def _place_of(self, argument: WeightArgument) -> tuple[int, int]:
        """Where the piece of an argument begins, always, and the bytes that are there."""
        piece = argument.piece
        if piece in self._slots:
            slots = self._slots[piece]
            return slots.address, slots.count * slots.unit
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
            if wait.piece in self._caches:
                self._bring_experts(wait, launch, sizes)
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

    # -- experts

    def _bring_experts(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        """What a layer's tiles ask for, into slots, and the tiles by slots instead of experts."""
        try:
            self._exchange_experts(wait, launch, sizes)
        except BaseException:
            self._forget_experts(wait.piece)  # what was admitted may not have come
            raise

    def _forget_experts(self, piece: int) -> None:
        """No expert of a piece is there."""
        slots = self._slots[piece]
        self._caches[piece] = ExpertCache([slots.unit], slots.count * slots.unit, policy=self._policy)
        slots.slot_of.clear()
        slots.unused = list(range(slots.count))[::-1]

    def _exchange_experts(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        device, slots, cache = self._device, self._slots[wait.piece], self._caches[wait.piece]
        offset, count = _tiles(launch, sizes)
        nbytes = 4 * TILE_WORDS * count
        device.copy_out(self._host_tiles, self._arena + offset, nbytes, self._stream)
        started = time.perf_counter()
        device.synchronize(self._stream)
        self.report.router_wait_s += time.perf_counter() - started
        tiles = host_view(self._host_tiles, nbytes).view(np.int32).reshape(-1, TILE_WORDS)
        filled = tiles[:, 2] > 0
        wanted = np.unique(tiles[filled, 0]).tolist()
        if any(not 0 <= expert < self._experts(wait.piece) for expert in wanted) or len(wanted) > slots.count:
            raise RuntimeDiagnostic(
                f"a step asks for the experts {wanted[:8]} of {self._pieces[wait.piece].origin}",
                expected=f"at most {slots.count} of {self._experts(wait.piece)}", hint=REBUILD_HINT,
            )  # fmt: skip
        hits, missing = cache.lookup(0, wanted)
        self.report.lookups += len(wanted)
        self.report.hits += len(hits)
        for _, expert in cache.admit(0, missing):  # all that read their slots is done: the stream was waited for
            slots.unused.append(slots.slot_of.pop(expert))
        for expert in missing:
            slot = slots.slot_of[expert] = slots.unused.pop()
            source = self._image + self._host[wait.piece] + expert * slots.unit
            device.copy_in(slots.address + slot * slots.unit, source, slots.unit, self._expert_copies)
        self.report.expert_bytes += len(missing) * slots.unit
        if missing:
            device.record(self._experts_there, self._expert_copies)
            device.wait(self._stream, self._experts_there)
        tiles[filled, 0] = [slots.slot_of[expert] for expert in tiles[filled, 0].tolist()]
        device.copy_in(self._arena + offset, self._host_tiles, nbytes, self._stream)

    def close(self) -> None:
        device = self._device
        if device.lost:
            return
        with uninterrupted():
            for stream in (self._copies, self._expert_copies):
                if stream is not None:
                    device.synchronize(stream)
                    device.free_stream(stream)
            for event in self._events:
                device.free_event(event)
            if self._region:
                device.free(self._region)
            for buffer in (self._image, self._host_tiles):
                if buffer:
                    device.free_pinned(buffer)
            self._copies = self._expert_copies = None
            self._events, self._region, self._image, self._host_tiles = [], 0, 0, 0


def plan_of(artifact: Artifact, budget_bytes: int) -> HbmPlan:
    """What of an artifact's weights lies in at most `budget_bytes` of device memory; see `plan_hbm`."""
    programs = [[wait.piece for x in p.launches for wait in x.waits] for p in _gpu(artifact).programs]
    order = [piece for piece in dict.fromkeys(programs[0]) if all(piece in waits for waits in programs)]
    manifest = artifact.manifest
    return plan_hbm(manifest.weights.pieces, budget_bytes, manifest.experts_per_token or 1, order)


def _gpu(artifact: Artifact) -> GpuStep:
    assert artifact.gpu is not None
    return artifact.gpu


def _tiles(launch: GpuLaunch, sizes: Mapping[str, int]) -> tuple[int, int]:
    """(offset in the arena, number) of the tiles that a product of experts goes by: its arguments are the matrices (one
    or two), x, order, tiles, y, and how many tiles there are at most."""
    weights = sum(isinstance(argument, WeightArgument) for argument in launch.arguments)
    found = launch.arguments[weights + 2 : weights + 3]
    most = launch.arguments[-1] if launch.arguments else None
    if not found or not isinstance(found[0], ArenaArgument) or not isinstance(most, SizeArgument):
        raise RuntimeDiagnostic(
            f"the launch {launch.kernel} waits for experts, but takes no tiles",
            expected="matrices, x, order, tiles, y, number of tiles", hint=REBUILD_HINT,
        )  # fmt: skip
    return found[0].offset, min(most.size.evaluate(sizes), found[0].bytes // (4 * TILE_WORDS))


def _most_tiles(launch: GpuLaunch) -> int:
    """Room for the tiles of a launch that waits for experts, 0 for others."""
    if not any(wait.ids >= 0 for wait in launch.waits):
        return 0
    found: Sequence[Any] = [a for a in launch.arguments if isinstance(a, ArenaArgument)]
    return max((a.bytes for a in found[2:3]), default=0) // (4 * TILE_WORDS)


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
