"""The key/value cache on a GPU: addresses for every position of every slot, memory behind those that are written.

Takes the program's `KVPlan`; gives the address of each plane. `ensure` puts memory behind the positions of a slot,
granule by granule (2 MiB on today's GPUs), zeroed, so that what a masked read finds is a number; `release` takes away
what no other slot needs. Addresses never change, so captured steps stay valid. All or nothing: when memory ends, what
was there before is as it was.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.cuda.device import Device
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.program import KVPlan
from runtime.errors import RuntimeDiagnostic

TILE = 64  # positions that kernels read at once: memory is there to the end of the last tile
_WHAT = "the KV cache"
_MOST_BYTES = 1 << 46  # of addresses


def capacity_of(plan: KVPlan, max_context: int) -> int:
    """Positions that a slot has addresses for: whole tiles and blocks."""
    multiple = int(np.lcm(TILE, plan.block))
    return -(-max_context // multiple) * multiple


class GpuKV:
    """The cache of `slots` sequences of `max_context` positions; fills run on `stream`."""

    def __init__(self, device: Device, stream: Any, plan: KVPlan, slots: int, max_context: int) -> None:
        self.plan, self.slots, self.capacity = plan, slots, capacity_of(plan, max_context)
        self._device, self._stream = device, stream
        self._granule = device.granularity()
        nbytes = max(1, plan.nbytes(slots, self.capacity))
        if nbytes > _MOST_BYTES:
            raise RuntimeDiagnostic(
                f"the KV cache for {slots} sequences of {max_context} positions takes {nbytes} bytes",
                expected=f"at most {_MOST_BYTES} bytes of addresses",
                hint="ask for a smaller context or fewer sequences",
            )
        self.reserved_bytes = -(-nbytes // self._granule) * self._granule
        self._needed: dict[int, np.ndarray] = {}  # granules by slot
        self._positions = [0] * slots
        self._mapped: set[int] = set()
        self._base: int | None = device.reserve(self.reserved_bytes, _WHAT)

    def address(self, layer: int, plane: int) -> int:
        """Where a plane of a layer begins."""
        assert self._base is not None
        return self._base + self.plan.offset(layer, plane, self.slots, self.capacity)

    def plane_bytes(self, plane: int) -> int:
        """Of one plane of one layer."""
        return self.plan.plane_bytes(plane, self.slots, self.capacity)

    def committed_bytes(self) -> int:
        """Of memory that is there now."""
        return len(self._mapped) * self._granule

    def needed_bytes(self, positions: int) -> int:
        """What a sequence of so many positions takes when it is alone."""
        return len(self._granules(0, positions)) * self._granule

    def ensure(self, slot: int, positions: int) -> None:
        """Memory behind the first `positions` of the slot. Raises OutOfDeviceMemory, and has then changed nothing."""
        rounded = min(self.capacity, -(-positions // TILE) * TILE)
        if rounded <= self._positions[slot]:
            return
        needed = self._granules(slot, rounded)
        new = [granule for granule in needed.tolist() if granule not in self._mapped]
        with uninterrupted():
            try:
                for granule in new:
                    self._map(granule)
            except BaseException:
                if self._device.lost:
                    raise
                self._device.synchronize(self._stream)
                for granule in new:
                    if granule in self._mapped:
                        self._unmap(granule)
                raise
            self._needed[slot], self._positions[slot] = needed, rounded

    def release(self, slot: int) -> int:
        """Takes the memory of a slot away; no work may be under way. Returns the bytes that became free."""
        with uninterrupted():
            self._positions[slot] = 0
            gone = set(self._needed.pop(slot, np.empty(0, np.int64)).tolist())
            for other in self._needed.values():
                gone.difference_update(other.tolist())
            for granule in sorted(gone):
                self._unmap(granule)
        return len(gone) * self._granule

    def _granules(self, slot: int, positions: int) -> np.ndarray:
        """The granules that hold these positions, ascending."""
        plan, starts, ends = self.plan, [], []
        for layer in range(plan.layers):
            for number, plane in enumerate(plan.planes):
                first = plan.offset(layer, number, self.slots, self.capacity)
                room = plane.positions or self.capacity
                used = plane.positions or positions  # of a ring all
                rows = first + (slot * plane.heads + np.arange(plane.heads)) * room * plane.bytes
                starts.append(rows // self._granule)
                ends.append((rows + used * plane.bytes - 1) // self._granule)
        if not starts or positions == 0:
            return np.empty(0, np.int64)
        spans = zip(np.concatenate(starts).tolist(), np.concatenate(ends).tolist(), strict=True)
        return np.unique(np.concatenate([np.arange(start, end + 1) for start, end in spans]))

    def _map(self, granule: int) -> None:
        assert self._base is not None
        at = self._base + granule * self._granule
        self._device.map(at, self._granule, _WHAT)
        self._mapped.add(granule)
        self._device.fill(at, 0, self._granule, self._stream)

    def _unmap(self, granule: int) -> None:
        assert self._base is not None
        self._mapped.discard(granule)
        self._device.unmap(self._base + granule * self._granule, self._granule)

    def close(self) -> None:
        """Gives back memory and addresses; no work may be under way."""
        if self._base is None or self._device.lost:
            return
        for granule in sorted(self._mapped):
            self._unmap(granule)
        self._device.free_reservation(self._base, self.reserved_bytes)
        self._base = None
