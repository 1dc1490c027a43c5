"""What the emulated driver is made of besides its functions: constants, statuses, images of code, work of a stream."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

from tests.runtime.cuda.emulated_streams import Ranges


class Status(IntEnum):
    """CUresult, as far as anything here gives it."""

    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_VALUE = 1
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_NO_BINARY_FOR_GPU = 209
    CUDA_ERROR_INVALID_PTX = 218
    CUDA_ERROR_JIT_COMPILER_NOT_FOUND = 221
    CUDA_ERROR_UNSUPPORTED_PTX_VERSION = 222
    CUDA_ERROR_NOT_FOUND = 500
    CUDA_ERROR_ILLEGAL_ADDRESS = 700
    CUDA_ERROR_LAUNCH_FAILED = 719
    CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED = 900
    CUDA_ERROR_STREAM_CAPTURE_INVALIDATED = 901
    CUDA_ERROR_STREAM_CAPTURE_UNJOINED = 904
    CUDA_ERROR_STREAM_CAPTURE_ISOLATION = 905


OK = Status.CUDA_SUCCESS
INVALID = Status.CUDA_ERROR_INVALID_VALUE
KERNEL_SECONDS, COPY_BYTES_PER_S = 4e-6, 1e10


class Constants:
    """The names that the wrapper looks up."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR=75, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR=76
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES=8)
    CUjit_option = SimpleNamespace(CU_JIT_ERROR_LOG_BUFFER=5, CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES=6)
    CUstreamCaptureMode = SimpleNamespace(CU_STREAM_CAPTURE_MODE_THREAD_LOCAL=1)
    CUmemAllocationType = SimpleNamespace(CU_MEM_ALLOCATION_TYPE_PINNED=1)
    CUmemLocationType = SimpleNamespace(CU_MEM_LOCATION_TYPE_DEVICE=1)
    CUmemAllocationGranularity_flags = SimpleNamespace(CU_MEM_ALLOC_GRANULARITY_MINIMUM=0)
    CUmemAccess_flags = SimpleNamespace(CU_MEM_ACCESS_FLAGS_PROT_READWRITE=3)
    CUmemAllocationProp = CUmemLocation = CUmemAccessDesc = SimpleNamespace


@dataclass
class Node:
    """What a stream was given: how to make the work of it, again at each replay of a graph."""

    name: str
    make: Callable[[], Callable[[], tuple[Ranges, Ranges]]]
    seconds: float


class Capture:
    """What streams are given while one of them is captured: `origin`, and those that events have brought in.

    Each entry is (node, stream, entries that it follows). `last`: of each stream the newest entry and what its next one
    follows beside it.
    """

    def __init__(self, origin: int) -> None:
        self.origin = origin
        self.entries: list[tuple[Node, int, tuple[int, ...]]] = []
        self.last: dict[int, tuple[int, ...]] = {origin: ()}

    def give(self, stream: int, node: Node) -> None:
        self.entries.append((node, stream, self.last[stream]))
        self.last[stream] = (len(self.entries) - 1,)

    def wait(self, stream: int, follows: tuple[int, ...]) -> None:
        """The stream's next entry follows these too; a stream that is new becomes part of the capture."""
        self.last[stream] = tuple(dict.fromkeys((*self.last.get(stream, ()), *follows)))

    def joined(self) -> bool:
        """Whether the end of the origin follows all that was given."""
        reached, look = set[int](), list(self.last[self.origin])
        while look:
            entry = look.pop()
            if entry not in reached:
                reached.add(entry)
                look += self.entries[entry][2]
        return len(reached) == len(self.entries)


@dataclass
class Planted:
    """`status` instead of the work, in the calls number `skip` to `skip + times - 1` from now on."""

    status: Status
    skip: int
    times: int


BEFORE_CONTEXT = frozenset(
    {"cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute",
     "cuDeviceTotalMem", "cuDevicePrimaryCtxRetain"}
)  # fmt: skip
RESULTS = {
    "cuMemGetInfo": 2,
    **dict.fromkeys(
        ("cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute",
         "cuDeviceTotalMem", "cuDevicePrimaryCtxRetain", "cuMemAlloc", "cuMemHostAlloc", "cuMemAddressReserve",
         "cuMemGetAllocationGranularity", "cuMemCreate", "cuStreamCreate", "cuEventCreate", "cuEventElapsedTime",
         "cuModuleLoadDataEx", "cuModuleGetFunction", "cuStreamEndCapture", "cuGraphInstantiate"), 1,
    ),
}  # fmt: skip


def load_image(image: int, capability: int, version: int, jit_log: str, values: list[Any]) -> tuple[Status, bytes]:
    """The content of PTX or of machine code ("\\x7fELF sm_90 LENGTH ..."); faults go into the log."""
    if ctypes.string_at(image, 4) == b"\x7fELF":
        if ctypes.string_at(image, 8) != b"\x7fELF sm_":  # for a real GPU
            return Status.CUDA_ERROR_NO_BINARY_FOR_GPU, b""
        head = ctypes.string_at(image, 64).split(b" ")
        made_for, length = int(head[1][3:]), int(head[2])
        if made_for // 10 != capability // 10 or made_for > capability:
            return Status.CUDA_ERROR_NO_BINARY_FOR_GPU, b""
        return OK, ctypes.string_at(image, length)
    content = ctypes.string_at(image)
    found = re.search(rb"\.version (\d+)\.(\d+)", content)
    assert found is not None
    needs = {7: 11000, 8: 12000}[int(found[1])] + 10 * int(found[2])  # the CUDA that a PTX version came with
    if needs > version:
        return Status.CUDA_ERROR_UNSUPPORTED_PTX_VERSION, b""
    if jit_log:
        log = jit_log.encode() + b"\0"
        assert isinstance(values[0], bytes) and len(log) <= values[1] == len(values[0])
        ctypes.memmove(ctypes.c_char_p(values[0]), log, len(log))
        return Status.CUDA_ERROR_INVALID_PTX, b""
    return OK, content
