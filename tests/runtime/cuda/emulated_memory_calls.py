"""Functions of the emulated driver that give memory, map it, and copy between its kinds.

The host may not change what a copy has still to read, and reads poison where it does not wait for a copy out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import numpy as np

from tests.runtime.cuda.emulated_calls import COPY_BYTES_PER_S, INVALID, OK, Node, Status
from tests.runtime.cuda.emulated_memory import POISON, EmulatedMemory, EmulationFault
from tests.runtime.cuda.emulated_streams import Ranges, Streams


class MemoryCalls(ABC):
    """`EmulatedDriver` without streams, events, kernels and graphs."""

    memory: EmulatedMemory
    streams: Streams
    _to_be_read: list[tuple[int, int]]  # memory of the host, by copies that wait

    @abstractmethod
    def _give(self, stream: int, node: Node) -> tuple[Status]:
        """Work for a stream, or for the graph that is captured from it."""

    # -- memory
    def cuMemGetInfo(self) -> tuple[Status, int, int]:  # noqa: N802
        return OK, self.memory.nbytes - self.memory.used(), self.memory.nbytes

    def cuMemAlloc(self, nbytes: int) -> tuple[Status, int]:  # noqa: N802
        if self.memory.used() + nbytes > self.memory.nbytes:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, 0
        return (OK, self.memory.make("device", nbytes).address) if nbytes > 0 else (INVALID, 0)

    def cuMemFree(self, address: int) -> tuple[Status]:  # noqa: N802
        self.streams.seen_all()  # as the driver does
        self.memory.drop(address, "device")
        return (OK,)

    def cuMemHostAlloc(self, nbytes: int, flags: int) -> tuple[Status, int]:  # noqa: N802
        return OK, self.memory.make("pinned", nbytes).address

    def cuMemFreeHost(self, address: int) -> tuple[Status]:  # noqa: N802
        self.memory.drop(address, "pinned")
        return (OK,)

    def cuMemGetAllocationGranularity(self, properties: Any, option: int) -> tuple[Status, int]:  # noqa: N802
        return OK, self.memory.granule if properties.location.type == 1 else 1

    def cuMemAddressReserve(self, nbytes: int, align: int, address: int, flags: int) -> tuple[Status, int]:  # noqa: N802
        if nbytes <= 0 or nbytes % self.memory.granule or align % self.memory.granule:
            return INVALID, 0
        return OK, self.memory.make("reserved", nbytes).address

    def cuMemAddressFree(self, address: int, nbytes: int) -> tuple[Status]:  # noqa: N802
        if self.memory.find(address, nbytes, "cuMemAddressFree")[0].nbytes != nbytes:
            return (INVALID,)
        self.memory.drop(address, "reserved")
        return (OK,)

    def cuMemCreate(self, nbytes: int, properties: Any, flags: int) -> tuple[Status, int]:  # noqa: N802
        if nbytes <= 0 or nbytes % self.memory.granule or properties.type != 1:
            return INVALID, 0
        if self.memory.used() + nbytes > self.memory.nbytes:
            return Status.CUDA_ERROR_OUT_OF_MEMORY, 0
        return OK, self.memory.create(nbytes)

    def cuMemRelease(self, handle: int) -> tuple[Status]:  # noqa: N802
        del self.memory.handles[handle]
        return (OK,)

    def cuMemMap(self, address: int, nbytes: int, offset: int, handle: int, flags: int) -> tuple[Status]:  # noqa: N802
        if address % self.memory.granule or nbytes % self.memory.granule or offset:
            return (INVALID,)
        self.memory.map(address, nbytes, handle)
        return (OK,)

    def cuMemSetAccess(self, address: int, nbytes: int, access: list[Any], count: int) -> tuple[Status]:  # noqa: N802
        allowed = count == len(access) == 1 and access[0].flags == 3 and access[0].location.type == 1
        self.memory.view(address, nbytes, "cuMemSetAccess", kinds=("reserved",))
        return (OK if allowed else INVALID,)

    def cuMemUnmap(self, address: int, nbytes: int) -> tuple[Status]:  # noqa: N802
        self.memory.unmap(address, nbytes)
        return (OK,)

    # -- copies

    def cuMemcpyHtoDAsync(self, target: int, host: int, nbytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        def make() -> Callable[[], tuple[Ranges, Ranges]]:
            before = self._host_view(host, nbytes).copy()
            self._to_be_read.append((host, host + nbytes))

            def work() -> tuple[Ranges, Ranges]:
                self._to_be_read.remove((host, host + nbytes))
                source = self._host_view(host, nbytes)
                if not np.array_equal(source, before):
                    raise EmulationFault("the host changed memory that a copy to the GPU had still to read")
                self._device_view(target, nbytes, "copy in")[:] = source
                return [(host, host + nbytes)], [(target, target + nbytes)]

            return work

        return self._give(stream, Node("copy in", make, nbytes / COPY_BYTES_PER_S))

    def cuMemcpyDtoHAsync(self, host: int, source: int, nbytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        def make() -> Callable[[], tuple[Ranges, Ranges]]:
            if not any(host < stop and start < host + nbytes for start, stop in self._to_be_read):
                self._host_view(host, nbytes)[:] = POISON  # who reads too early reads this

            def work() -> tuple[Ranges, Ranges]:
                self._host_view(host, nbytes)[:] = self._device_view(source, nbytes, "copy out")
                return [(source, source + nbytes)], [(host, host + nbytes)]

            return work

        return self._give(stream, Node("copy out", make, nbytes / COPY_BYTES_PER_S))

    def cuMemcpyDtoDAsync(self, target: int, source: int, nbytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        def work() -> tuple[Ranges, Ranges]:
            self._device_view(target, nbytes, "copy")[:] = self._device_view(source, nbytes, "copy")
            return [(source, source + nbytes)], [(target, target + nbytes)]

        return self._give(stream, Node("copy", lambda: work, nbytes / COPY_BYTES_PER_S))

    def cuMemsetD8Async(self, target: int, byte: int, nbytes: int, stream: int) -> tuple[Status]:  # noqa: N802
        def work() -> tuple[Ranges, Ranges]:
            self._device_view(target, nbytes, "fill")[:] = byte
            return [], [(target, target + nbytes)]

        return self._give(stream, Node("fill", lambda: work, nbytes / COPY_BYTES_PER_S))

    def _host_view(self, address: int, nbytes: int) -> np.ndarray:
        return self.memory.view(address, nbytes, "copy that goes on beside the host", kinds=("pinned",))

    def _device_view(self, address: int, nbytes: int, what: str) -> np.ndarray:
        return self.memory.view(address, nbytes, what, kinds=("device", "reserved"))
