"""The memory of an emulated GPU: allocations, pinned host memory, reserved addresses that have memory in parts.

Addresses are those of numpy arrays, so that what the wrapper hands over is what is read. Every access names its bytes
and is refused where they are not inside of one piece of memory that is there.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

POISON = 0xFB  # memory that nobody has written: as bf16 and f32 a large negative number


class EmulationFault(AssertionError):
    """What a real GPU would do silently, or die of. Not an error that the wrapper may catch."""


@dataclass
class Region:
    """Bytes from `address` on. `kind` is device, pinned or reserved; the last has memory where `mapped` says so."""

    kind: str
    storage: np.ndarray
    address: int
    nbytes: int
    granule: int = 0
    mapped: dict[int, tuple[int, int]] = field(default_factory=dict)  # offset -> bytes, handle

    def backed(self, start: int, stop: int) -> bool:
        """Whether memory is behind bytes start..stop of the region."""
        if self.kind != "reserved":
            return True
        at = start
        while at < stop:
            found = next((o + n for o, (n, _) in self.mapped.items() if o <= at < o + n), None)
            if found is None:
                return False
            at = found
        return True


class EmulatedMemory:
    """All memory of one GPU of `nbytes` bytes, and what is pinned of the host's."""

    def __init__(self, nbytes: int, granule: int) -> None:
        self.nbytes, self.granule = nbytes, granule
        self.regions: dict[int, Region] = {}
        self.handles: dict[int, int] = {}  # physical memory: handle -> bytes
        self._next_handle = 1

    def used(self) -> int:
        """Bytes of the GPU that are taken."""
        held = sum(r.nbytes for r in self.regions.values() if r.kind == "device")
        return held + sum(self.handles.values())

    def make(self, kind: str, nbytes: int) -> Region:
        """New memory, aligned as the driver's."""
        align = self.granule if kind == "reserved" else 4096 if kind == "pinned" else 256
        storage = np.empty(nbytes + align, np.uint8)
        address = -(-storage.ctypes.data // align) * align
        region = Region(kind, storage[address - storage.ctypes.data :][:nbytes], address, nbytes, self.granule)
        if kind != "reserved":
            region.storage[:] = POISON
        self.regions[address] = region
        return region

    def drop(self, address: int, kind: str) -> None:
        region = self.regions.get(address)
        if region is None or region.kind != kind:
            raise EmulationFault(f"{address:#x} is no {kind} memory that could be freed")
        if region.mapped:
            raise EmulationFault("reserved addresses are freed with memory still behind them")
        region.storage[:] = POISON if kind != "reserved" else region.storage
        del self.regions[address]

    def find(self, address: int, nbytes: int, what: str) -> tuple[Region, int]:
        """The region that has these bytes, and where in it they begin."""
        for region in self.regions.values():
            offset = address - region.address
            if 0 <= offset < region.nbytes:
                if offset + nbytes > region.nbytes:
                    raise EmulationFault(
                        f"{what}: bytes {offset}..{offset + nbytes} of {region.nbytes} ({region.kind})"
                    )
                return region, offset
        raise EmulationFault(f"{what}: nothing is at {address:#x}")

    def view(self, address: int, nbytes: int, what: str, *, kinds: tuple[str, ...], backed: bool = True) -> np.ndarray:
        """u8 [nbytes], of memory of one of these kinds; `backed`: all of it is there."""
        region, offset = self.find(address, nbytes, what)
        if region.kind not in kinds:
            raise EmulationFault(f"{what}: {region.kind} memory, expected {' or '.join(kinds)}")
        if backed and not region.backed(offset, offset + nbytes):
            raise EmulationFault(f"{what}: no memory behind bytes {offset}..{offset + nbytes} of a reservation")
        return region.storage[offset : offset + nbytes]

    # -- physical memory

    def create(self, nbytes: int) -> int:
        handle, self._next_handle = self._next_handle, self._next_handle + 1
        self.handles[handle] = nbytes
        return handle

    def map(self, address: int, nbytes: int, handle: int) -> None:
        region, offset = self.find(address, nbytes, "cuMemMap")
        if self.handles.get(handle) != nbytes:
            raise EmulationFault("memory is mapped that is not there, or of another size")
        if any(o < offset + nbytes and offset < o + n for o, (n, _) in region.mapped.items()):
            raise EmulationFault("memory is mapped where some is already")
        region.mapped[offset] = (nbytes, handle)
        region.storage[offset : offset + nbytes] = POISON

    def unmap(self, address: int, nbytes: int) -> None:
        region, offset = self.find(address, nbytes, "cuMemUnmap")
        if region.mapped.get(offset, (0, 0))[0] != nbytes:
            raise EmulationFault("memory is taken away that was not put there as a whole")
        del region.mapped[offset]
