"""One GPU: its memory, streams, events, copies, launches and captured graphs.

`Device` is what the executor asks for; `CudaDevice` does it through the driver (`runtime.cuda.driver`). Addresses are
ints; streams, events, functions and graphs are the driver's own handles. Everything that is made is given back by its
`free_...` function. `limit_bytes` bounds what may be held of the device's memory at once, `host_limit_bytes` what may
be pinned of the host's. Raises OutOfDeviceMemory beyond them or where there is no more, DeviceFault for whatever else
the driver refuses.

A device serves the thread that called `enter` last in it: the driver keeps a current context for each thread.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from runtime.cuda.driver import Driver, NoDevice, OutOfDeviceMemory, load_driver
from runtime.cuda.interrupts import uninterrupted
from runtime.cuda.modules import Image, load_module

OLDEST_CAPABILITY = (8, 0)  # A100; kernels use its asynchronous copies and bf16 products
_NON_BLOCKING = 1  # of streams: no hidden order with the driver's default stream
_NO_TIMING = 2  # of events
_GLOBAL_CAPTURE = "CU_STREAM_CAPTURE_MODE_THREAD_LOCAL"


class Arguments:
    """The arguments of one launch, kept where the driver reads them: addresses and whole numbers, floats as f32.

    `extents`: how many bytes the kernel may touch behind each address, 0 for numbers; for who checks launches.
    """

    def __init__(self, values: Sequence[int | float], extents: Sequence[int] = ()) -> None:
        self.extents = tuple(extents)
        self.values = np.zeros(max(1, len(values)), np.int64)
        for i, value in enumerate(values):
            if isinstance(value, float):
                self.values[i : i + 1].view(np.float32)[0] = value
            else:
                self.values[i] = value
        self.places = self.values.ctypes.data + 8 * np.arange(len(self.values), dtype=np.uint64)

    @property
    def address(self) -> int:
        """Of the array of pointers that a launch takes."""
        return self.places.ctypes.data


class Device(Protocol):
    """What the executor needs of a GPU; each function as in `CudaDevice`."""

    name: str
    capability: tuple[int, int]
    total_bytes: int
    host_limit_bytes: int | None

    @property
    def lost(self) -> bool: ...
    def enter(self) -> None: ...
    def close(self) -> None: ...
    def free_bytes(self) -> int: ...
    def used_bytes(self) -> int: ...
    def allocate(self, nbytes: int, what: str) -> int: ...
    def free(self, address: int) -> None: ...
    def allocate_pinned(self, nbytes: int, what: str) -> int: ...
    def free_pinned(self, address: int) -> None: ...
    def pinned_bytes(self) -> int: ...
    def new_stream(self) -> Any: ...
    def free_stream(self, stream: Any) -> None: ...
    def synchronize(self, stream: Any) -> None: ...
    def new_event(self, *, timed: bool = False) -> Any: ...
    def free_event(self, event: Any) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None: ...
    def synchronize_event(self, event: Any) -> None: ...
    def seconds_between(self, start: Any, end: Any) -> float: ...
    def copy_in(self, target: int, host: int, nbytes: int, stream: Any) -> None: ...
    def copy_out(self, host: int, source: int, nbytes: int, stream: Any) -> None: ...
    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None: ...
    def fill(self, target: int, byte: int, nbytes: int, stream: Any) -> None: ...
    def load(self, images: Sequence[Image], where: str) -> Any: ...
    def free_module(self, module: Any) -> None: ...
    def function(self, module: Any, name: str, dynamic_bytes: int = 0) -> Any: ...
    def launch(
        self, function: Any, blocks: int, threads: int, dynamic_bytes: int, arguments: Arguments, stream: Any
    ) -> None: ...
    def begin_capture(self, stream: Any) -> None: ...
    def end_capture(self, stream: Any) -> Any: ...
    def abandon_capture(self, stream: Any) -> None: ...
    def launch_graph(self, graph: Any, stream: Any) -> None: ...
    def free_graph(self, graph: Any) -> None: ...
    def granularity(self) -> int: ...
    def reserve(self, nbytes: int, what: str) -> int: ...
    def free_reservation(self, address: int, nbytes: int) -> None: ...
    def map(self, address: int, nbytes: int, what: str) -> None: ...
    def unmap(self, address: int, nbytes: int) -> None: ...


class CudaDevice:
    """GPU number `ordinal` of this process. Raises NoDevice where it is too old for the kernels."""

    def __init__(self, driver: Driver, ordinal: int = 0, *, limit_bytes: int | None = None) -> None:
        self._driver, self._call = driver, driver.call
        self._module = driver.module
        self._device = self._call("cuDeviceGet", ordinal)
        kinds, wanted = self._module.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
        major, minor = (
            int(self._call("cuDeviceGetAttribute", getattr(kinds, wanted + part), self._device))
            for part in ("MAJOR", "MINOR")
        )
        self.capability = (major, minor)
        name: bytes = self._call("cuDeviceGetName", 128, self._device)
        self.name = bytes(name).rstrip(b"\0").decode("utf-8", "replace").strip()
        if self.capability < OLDEST_CAPABILITY:
            raise NoDevice(
                f"{self.name} is sm_{major}{minor}", expected="sm_80 (A100) or later, which the kernels are for"
            )
        self.total_bytes = int(self._call("cuDeviceTotalMem", self._device))
        self.limit_bytes = limit_bytes
        self.host_limit_bytes: int | None = None
        self._pinned: dict[int, int] = {}  # bytes by address
        self._held: dict[int, int] = {}  # bytes by address: allocations and what is mapped
        self._handles: dict[int, Any] = {}  # of physical memory, by the address where it is mapped
        self._property: Any = None
        self._granularity = 0
        self._context: Any = None
        try:
            with uninterrupted():
                self._context = self._call("cuDevicePrimaryCtxRetain", self._device)
                self.enter()
        except BaseException:
            self.close()
            raise

    @property
    def architecture(self) -> str:
        """`sm_90`."""
        return f"sm_{self.capability[0]}{self.capability[1]}"

    def enter(self) -> None:
        """Makes the device this thread's."""
        self._call("cuCtxSetCurrent", self._context)

    def close(self) -> None:
        """Lets the context go; all that was made must have been freed. Closing twice is fine."""
        if self._context is not None:
            self._context = None
            self._call("cuDevicePrimaryCtxRelease", self._device)

    @property
    def lost(self) -> bool:
        """Whether a fault ended the context, so that nothing can be freed in it any more."""
        return self._driver.lost

    # -- memory

    def free_bytes(self) -> int:
        """What could still be allocated: of the GPU, and of the limit."""
        free, _ = self._call("cuMemGetInfo")
        return int(free) if self.limit_bytes is None else min(int(free), self.limit_bytes - self.used_bytes())

    def used_bytes(self) -> int:
        """What this device object holds."""
        return sum(self._held.values())

    def allocate(self, nbytes: int, what: str) -> int:
        """Device memory for `what`, a word for diagnostics. Its content is undefined."""
        nbytes = max(1, nbytes)
        self._check_room(nbytes, what)
        try:
            address = int(self._call("cuMemAlloc", nbytes))
        except OutOfDeviceMemory as fault:
            raise self._full(nbytes, what, fault) from None
        self._held[address] = nbytes
        return address

    def free(self, address: int) -> None:
        self._held.pop(address)
        self._call("cuMemFree", address)

    def _check_room(self, nbytes: int, what: str) -> None:
        if self.limit_bytes is not None and self.used_bytes() + nbytes > self.limit_bytes:
            raise self._full(nbytes, what, None)

    def _full(self, nbytes: int, what: str, fault: OutOfDeviceMemory | None) -> OutOfDeviceMemory:
        """With what is free now: of the limit where that is what was met."""
        limited = fault is None
        of = f"the {self.limit_bytes} bytes that may be used" if limited else f"the {self.total_bytes} bytes"
        return OutOfDeviceMemory(
            f"no room for {what}: {nbytes} bytes beside the {self.used_bytes()} in use",
            fault.status if fault else 2,
            where=self.name,
            expected=f"at most {self.free_bytes()} bytes, the rest of {of} of this GPU",
            hint="ask for less context or fewer sequences, quantize the weights"
            + (", or allow more memory" if limited else ", or end other programs on the GPU"),
        )

    def allocate_pinned(self, nbytes: int, what: str) -> int:
        """Host memory that copies reach without a detour."""
        nbytes, limit = max(1, nbytes), self.host_limit_bytes
        message = f"no room for {what}: {nbytes} bytes of pinned host memory"
        if limit is not None and self.pinned_bytes() + nbytes > limit:
            raise OutOfDeviceMemory(
                message, 2, where=self.name, expected=f"at most {max(0, limit - self.pinned_bytes())} bytes, the rest "
                f"of the {limit} that may be pinned", hint="allow more memory (--memory)",
            )  # fmt: skip
        try:
            address = int(self._call("cuMemHostAlloc", nbytes, 0))
        except OutOfDeviceMemory as fault:
            hint = "free host memory, or raise its limits (ulimit -l)"
            raise OutOfDeviceMemory(message, fault.status, where=self.name, hint=hint) from None
        self._pinned[address] = nbytes
        return address

    def free_pinned(self, address: int) -> None:
        self._pinned.pop(address)
        self._call("cuMemFreeHost", address)

    def pinned_bytes(self) -> int:
        """What this device object has pinned."""
        return sum(self._pinned.values())

    # -- virtual memory

    def _properties(self) -> Any:
        """What physical memory is asked for: on this GPU, not shared."""
        if self._property is None:
            made = self._module.CUmemAllocationProp()
            made.type = self._module.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
            made.location = self._location()
            self._property = made
        return self._property

    def _location(self) -> Any:
        location = self._module.CUmemLocation()
        location.type = self._module.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        location.id = int(self._device)
        return location

    def granularity(self) -> int:
        """Bytes that are mapped at once; what `reserve`, `map` and `unmap` take are multiples."""
        if not self._granularity:
            least = self._module.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
            self._granularity = int(self._call("cuMemGetAllocationGranularity", self._properties(), least))
        return self._granularity

    def reserve(self, nbytes: int, what: str) -> int:
        """Addresses without memory behind them."""
        try:
            return int(self._call("cuMemAddressReserve", nbytes, self.granularity(), 0, 0))
        except OutOfDeviceMemory as fault:
            message = f"no addresses for {what}: {nbytes} bytes"
            raise OutOfDeviceMemory(message, fault.status, where=self.name, hint="ask for less context") from None

    def free_reservation(self, address: int, nbytes: int) -> None:
        self._call("cuMemAddressFree", address, nbytes)

    def map(self, address: int, nbytes: int, what: str) -> None:
        """Puts memory behind reserved addresses. Its content is undefined. All or nothing."""
        self._check_room(nbytes, what)
        try:
            handle = self._call("cuMemCreate", nbytes, self._properties(), 0)
        except OutOfDeviceMemory as fault:
            raise self._full(nbytes, what, fault) from None
        mapped = False
        try:
            self._call("cuMemMap", address, nbytes, 0, handle, 0)
            mapped = True
            access = self._module.CUmemAccessDesc()
            access.location = self._location()
            access.flags = self._module.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
            self._call("cuMemSetAccess", address, nbytes, [access], 1)
        except BaseException:
            if mapped:
                self._call("cuMemUnmap", address, nbytes)
            self._call("cuMemRelease", handle)
            raise
        self._handles[address], self._held[address] = handle, nbytes

    def unmap(self, address: int, nbytes: int) -> None:
        """Takes the memory away that `map` put there with the same arguments; nothing may be using it."""
        self._held.pop(address)
        handle = self._handles.pop(address)
        self._call("cuMemUnmap", address, nbytes)
        self._call("cuMemRelease", handle)

    # -- streams and events

    def new_stream(self) -> Any:
        """A queue whose work is done in order; between streams only events give an order."""
        return self._call("cuStreamCreate", _NON_BLOCKING)

    def free_stream(self, stream: Any) -> None:
        self._call("cuStreamDestroy", stream)

    def synchronize(self, stream: Any) -> None:
        """Until all work of the stream is done; faults of kernels come out here."""
        self._call("cuStreamSynchronize", stream)

    def new_event(self, *, timed: bool = False) -> Any:
        return self._call("cuEventCreate", 0 if timed else _NO_TIMING)

    def free_event(self, event: Any) -> None:
        self._call("cuEventDestroy", event)

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when what the stream holds now is done."""
        self._call("cuEventRecord", event, stream)

    def wait(self, stream: Any, event: Any) -> None:
        """Later work of the stream begins after the event."""
        self._call("cuStreamWaitEvent", stream, event, 0)

    def synchronize_event(self, event: Any) -> None:
        """Until the event has happened."""
        self._call("cuEventSynchronize", event)

    def seconds_between(self, start: Any, end: Any) -> float:
        """Between two timed events that have happened."""
        return float(self._call("cuEventElapsedTime", start, end)) / 1000

    # -- work

    def copy_in(self, target: int, host: int, nbytes: int, stream: Any) -> None:
        """From pinned host memory."""
        self._call("cuMemcpyHtoDAsync", target, host, nbytes, stream)

    def copy_out(self, host: int, source: int, nbytes: int, stream: Any) -> None:
        """To pinned host memory."""
        self._call("cuMemcpyDtoHAsync", host, source, nbytes, stream)

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """Within the device."""
        self._call("cuMemcpyDtoDAsync", target, source, nbytes, stream)

    def fill(self, target: int, byte: int, nbytes: int, stream: Any) -> None:
        """Every byte of the range becomes `byte`."""
        self._call("cuMemsetD8Async", target, byte, nbytes, stream)

    def load(self, images: Sequence[Image], where: str) -> Any:
        """A module of the image that fits this GPU best: see `runtime.cuda.modules`."""
        return load_module(self._driver, self.capability, images, where)

    def free_module(self, module: Any) -> None:
        self._call("cuModuleUnload", module)

    def function(self, module: Any, name: str, dynamic_bytes: int = 0) -> Any:
        """A kernel of a module, allowed to ask for so much shared memory at its launch."""
        found = self._call("cuModuleGetFunction", module, name.encode())
        if dynamic_bytes:
            kind = self._module.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", found, kind, dynamic_bytes)
        return found

    def launch(
        self, function: Any, blocks: int, threads: int, dynamic_bytes: int, arguments: Arguments, stream: Any
    ) -> None:
        """`blocks` blocks in one row; the arguments are read before this returns."""
        self._call(
            "cuLaunchKernel", function, blocks, 1, 1, threads, 1, 1, dynamic_bytes, stream, arguments.address, 0
        )  # fmt: skip

    # -- graphs

    def begin_capture(self, stream: Any) -> None:
        """What the stream is given from now on is noted, not done."""
        self._call("cuStreamBeginCapture", stream, getattr(self._module.CUstreamCaptureMode, _GLOBAL_CAPTURE))

    def end_capture(self, stream: Any) -> Any:
        """What was noted, ready to be launched as a whole."""
        graph = self._call("cuStreamEndCapture", stream)
        try:
            return self._call("cuGraphInstantiate", graph, 0)
        finally:
            self._call("cuGraphDestroy", graph)

    def abandon_capture(self, stream: Any) -> None:
        """Forgets what was noted, also where the driver has given the capture up."""
        status, graph = self._module.cuStreamEndCapture(stream)
        if int(status) == 0:
            self._call("cuGraphDestroy", graph)

    def launch_graph(self, graph: Any, stream: Any) -> None:
        self._call("cuGraphLaunch", graph, stream)

    def free_graph(self, graph: Any) -> None:
        self._call("cuGraphExecDestroy", graph)


def open_device(ordinal: int = 0, *, limit_bytes: int | None = None, driver: Any = None) -> CudaDevice:
    """A GPU of this machine, through `driver` in place of cuda.bindings.driver where given. Raises NoDevice."""
    return CudaDevice(load_driver(driver), ordinal, limit_bytes=limit_bytes)


def host_view(address: int, nbytes: int) -> np.ndarray:
    """Host memory as u8 [nbytes]; whoever holds the memory keeps it while the view is used."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * nbytes).from_address(address))
