"""Experts of a GPU that has no room for all of them: slots, and what is brought to them behind a router.

The host waits for the tiles that the dispatching kernel has made (expert, first row, rows, 0), decides with
`runtime.expert_cache` what is there, copies what is missing into slots that were given up, and writes the numbers of
the slots over those of the experts: kernels find expert s at `base + s * stride` whether all experts are there or some.
So the bits are those of a device that has room for everything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from runtime.cuda.device import Device, host_view
from runtime.cuda.hybrid_plan import HbmPlan
from runtime.cuda.hybrid_report import HybridReport
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import ArenaArgument, GpuLaunch, GpuStep, SizeArgument, Wait, WeightArgument
from runtime.errors import RuntimeDiagnostic
from runtime.expert_cache import ExpertCache
from runtime.manifest import PieceInfo
from runtime.manifest_fields import REBUILD_HINT

TILE_WORDS = 4  # of a tile of experts: expert, first row, rows, 0
Source = Callable[[int, Sequence[int]], Iterable[tuple[int, int]]]  # piece, experts -> (expert, pinned address)


@dataclass
class Slots:
    """Experts of a piece: which slot has which."""

    address: int
    unit: int
    count: int
    unused: list[int]
    slot_of: dict[int, int] = field(default_factory=dict)


class HybridExperts:
    """The slots of a plan, from `region` on. `stream` is that of the steps, `source` says where experts lie in pinned
    memory, each as soon as it is there."""

    def __init__(
        self, device: Device, stream: Any, step: GpuStep, pieces: Sequence[PieceInfo], plan: HbmPlan, *,
        region: int, source: Source, report: HybridReport, policy: str = "lrfu",
    ) -> None:  # fmt: skip
        self._device, self._stream, self._pieces, self._policy = device, stream, pieces, policy
        self._source, self._report = source, report
        self._arena = self._host_tiles = 0
        self.copies: Any = None  # of its own: what is waited for is not behind what is only needed next
        self._there: Any = None
        offsets = dict(plan.offsets)
        self._slots = {
            piece: Slots(region + offsets[piece], pieces[piece].unit, count, list(range(count))[::-1])
            for piece, count in plan.slots
        }
        self._caches = {
            piece: ExpertCache([slots.unit], slots.count * slots.unit, policy=policy)
            for piece, slots in self._slots.items()
            if slots.count < self._experts(piece)
        }
        tiles = max([1, *(_most_tiles(launch) for p in step.programs for launch in p.launches)])
        try:
            with uninterrupted():
                self._host_tiles = device.allocate_pinned(tiles * TILE_WORDS * 4, "tiles of experts")
            with uninterrupted():
                self.copies = device.new_stream()
            with uninterrupted():
                self._there = device.new_event()
        except BaseException:
            self.close()
            raise

    def _experts(self, piece: int) -> int:
        return self._pieces[piece].bytes // self._pieces[piece].unit

    def attach(self, arena: int) -> None:
        """Where the step's memory begins on the device."""
        self._arena = arena

    def place(self, piece: int) -> tuple[int, int] | None:
        """Where the slots of a piece begin, and their bytes; None for a piece that has none."""
        slots = self._slots.get(piece)
        return None if slots is None else (slots.address, slots.count * slots.unit)

    def passes(self, piece: int) -> bool:
        """Whether only some experts of a piece are there."""
        return piece in self._caches

    def bring(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        """What a layer's tiles ask for, into slots, and the tiles by slots instead of experts."""
        try:
            self._exchange(wait, launch, sizes)
        except BaseException:
            self._forget(wait.piece)  # what was admitted may not have come
            raise

    def _forget(self, piece: int) -> None:
        """No expert of a piece is there."""
        slots = self._slots[piece]
        self._caches[piece] = ExpertCache([slots.unit], slots.count * slots.unit, policy=self._policy)
        slots.slot_of.clear()
        slots.unused = list(range(slots.count))[::-1]

    def _exchange(self, wait: Wait, launch: GpuLaunch, sizes: Mapping[str, int]) -> None:
        device, slots, cache = self._device, self._slots[wait.piece], self._caches[wait.piece]
        offset, count = _tiles(launch, sizes)
        nbytes = 4 * TILE_WORDS * count
        device.copy_out(self._host_tiles, self._arena + offset, nbytes, self._stream)
        started = time.perf_counter()
        device.synchronize(self._stream)
        self._report.router_wait_s += time.perf_counter() - started
        tiles = host_view(self._host_tiles, nbytes).view(np.int32).reshape(-1, TILE_WORDS)
        filled = tiles[:, 2] > 0
        wanted = np.unique(tiles[filled, 0]).tolist()
        if any(not 0 <= expert < self._experts(wait.piece) for expert in wanted) or len(wanted) > slots.count:
            raise RuntimeDiagnostic(
                f"a step asks for the experts {wanted[:8]} of {self._pieces[wait.piece].origin}",
                expected=f"at most {slots.count} of {self._experts(wait.piece)}", hint=REBUILD_HINT,
            )  # fmt: skip
        hits, missing = cache.lookup(0, wanted)
        self._report.lookups += len(wanted)
        self._report.hits += len(hits)
        for _, expert in cache.admit(0, missing):  # all that read their slots is done: the stream was waited for
            slots.unused.append(slots.slot_of.pop(expert))
        for expert, address in self._source(wait.piece, missing):
            slot = slots.slot_of[expert] = slots.unused.pop()
            device.copy_in(slots.address + slot * slots.unit, address, slots.unit, self.copies)
        self._report.expert_bytes += len(missing) * slots.unit
        if missing:
            device.record(self._there, self.copies)
            device.wait(self._stream, self._there)
        tiles[filled, 0] = [slots.slot_of[expert] for expert in tiles[filled, 0].tolist()]
        device.copy_in(self._arena + offset, self._host_tiles, nbytes, self._stream)

    def close(self) -> None:
        """Gives back its stream, event and pinned memory; the slots belong to the region."""
        device = self._device
        if device.lost:
            return
        with uninterrupted():
            if self.copies is not None:
                device.synchronize(self.copies)
                device.free_stream(self.copies)
            if self._there is not None:
                device.free_event(self._there)
            if self._host_tiles:
                device.free_pinned(self._host_tiles)
            self.copies, self._there, self._host_tiles = None, None, 0


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
