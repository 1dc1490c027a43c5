"""The surface of cuda.bindings.driver that `runtime.cuda` uses, over memory and streams that are emulated.

driver = EmulatedDriver(GridRunner(kernels), order="lazy")
device = open_device(driver=driver)

Names, arguments, results and types of arguments are those of cuda-bindings 12.8 to 13.5. What a GPU would do silently
wrong raises an EmulationFault. `plant` makes a function fail; `leaks` says what has not been given back.
"""

from __future__ import annotations

import ctypes
import signal
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from tests.runtime.cuda.emulated_calls import (
    BEFORE_CONTEXT,
    INVALID,
    KERNEL_SECONDS,
    OK,
    RESULTS,
    Capture,
    Constants,
    Node,
    Planted,
    Status,
    load_image,
)
from tests.runtime.cuda.emulated_kernels import Runner
from tests.runtime.cuda.emulated_memory import EmulatedMemory, EmulationFault
from tests.runtime.cuda.emulated_memory_calls import MemoryCalls
from tests.runtime.cuda.emulated_streams import Operation, Ranges, Streams


class EmulatedDriver(MemoryCalls, Constants):
    """One GPU. `order` as in `emulated_streams.Streams`; `memory_bytes` is all that it has."""

    def __init__(
        self,
        runner: Runner | None = None,
        *,
        order: str = "lazy",
        seed: int = 0,
        capability: int = 90,
        version: int = 13000,
        devices: int = 1,
        memory_bytes: int = 1 << 30,
        granule: int = 1 << 16,
        jit_log: str = "",
    ) -> None:
        self.runner, self.capability, self.version, self.devices = runner, capability, version, devices
        self.memory, self.streams, self.jit_log = EmulatedMemory(memory_bytes, granule), Streams(order, seed), jit_log
        self.contexts = 0
        self.calls: Counter[str] = Counter()
        self.extents: tuple[int, ...] = ()  # of the next launch's arguments, where somebody knows them
        # The calls, counted over all functions, before and behind whose work Ctrl-C is pressed.
        self.interrupt_at = self.interrupt_behind = -1
        self._planted: dict[str, Planted] = {}
        self._lost = OK
        self._objects: dict[int, tuple[str, Any]] = {}  # handle -> kind, what it is
        self._capturing: dict[int, Capture] = {}
        self._spoilt: set[int] = set()
        self._to_be_read = []
        self._next = 1000

    # -- for tests

    def plant(self, name: str, status: Status, *, skip: int = 0, times: int = 1) -> None:
        """The function (or "kernel": the work of a launch) fails so often, after `skip` calls that do not."""
        self._planted[name] = Planted(status, skip, times)

    def leaks(self) -> list[str]:
        """What is still held; empty when everything was given back."""
        found = [f"{r.kind} memory of {r.nbytes} bytes" for r in self.memory.regions.values()]
        found += [f"physical memory of {n} bytes" for n in self.memory.handles.values()]
        found += [kind for kind, _ in self._objects.values()] + ["stream"] * len(self.streams.last)
        return found + ["context"] * self.contexts

    # -- calls

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        return self._watched(name, found) if name.startswith("cu") else found

    def _watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function with what may go wrong before it does anything."""

        def call(*arguments: Any) -> Any:
            self.calls[name] += 1
            if self.interrupt_at == sum(self.calls.values()):
                signal.raise_signal(signal.SIGINT)
            width = RESULTS.get(name, 0)
            failed = self._fails(name) or self._lost
            if failed and name != "cuGetErrorName":
                return (failed, *([None] * width))
            if name not in BEFORE_CONTEXT and not self.contexts:
                raise EmulationFault(f"{name} without a context")
            result = function(*arguments)
            if self.interrupt_behind == sum(self.calls.values()):
                signal.raise_signal(signal.SIGINT)
            return result

        return call

    def _fails(self, name: str) -> Status:
        planted = self._planted.get(name)
        if planted is None:
            return OK
        planted.skip -= 1
        if planted.skip >= 0 or planted.times <= 0:
            return OK
        planted.times -= 1
        return planted.status

    def _keep(self, kind: str, what: Any) -> int:
        self._next += 1
        self._objects[self._next] = kind, what
        return self._next

    def _drop(self, kind: str, handle: int) -> None:
        if self._objects.get(handle, ("", None))[0] != kind:
            raise EmulationFault(f"{handle} is no {kind} that could be given back")
        del self._objects[handle]

    def _object(self, kind: str, handle: int) -> Any:
        found, what = self._objects.get(handle, ("nothing", None))
        if found != kind:
            raise EmulationFault(f"{handle} is {found}, expected a {kind}")
        return what

    # -- the device

    def cuInit(self, flags: int) -> tuple[Status]:  # noqa: N802 - names of the driver
        return (OK if flags == 0 else INVALID,)

    def cuDriverGetVersion(self) -> tuple[Status, int]:  # noqa: N802
        return OK, self.version

    def cuDeviceGetCount(self) -> tuple[Status, int]:  # noqa: N802
        return OK, self.devices

    def cuDeviceGet(self, ordinal: int) -> tuple[Status, int]:  # noqa: N802
        return OK, ordinal

    def cuDeviceGetName(self, size: int, device: int) -> tuple[Status, bytes]:  # noqa: N802
        return OK, b"emulated GPU".ljust(size, b"\0")

    def cuDeviceGetAttribute(self, kind: int, device: int) -> tuple[Status, int]:  # noqa: N802
        return OK, divmod(self.capability, 10)[kind - 75]

    def cuDeviceTotalMem(self, device: int) -> tuple[Status, int]:  # noqa: N802
        return OK, self.memory.nbytes

    def cuDevicePrimaryCtxRetain(self, device: int) -> tuple[Status, int]:  # noqa: N802
        self.contexts += 1
        return OK, 77

    def cuDevicePrimaryCtxRelease(self, device: int) -> tuple[Status]:  # noqa: N802
        self.contexts -= 1
        return (OK,)

    def cuCtxSetCurrent(self, context: int) -> tuple[Status]:  # noqa: N802
        assert context == 77
        return (OK,)

    # -- streams and events

    def cuStreamCreate(self, flags: int) -> tuple[Status, int]:  # noqa: N802
        if flags != 1:
            raise EmulationFault("a stream that the driver orders with its own by stealth")
        return OK, self.streams.make()

    def cuStreamDestroy(self, stream: int) -> tuple[Status]:  # noqa: N802
        self.streams.drop(stream)
        return (OK,)

    def cuStreamSynchronize(self, stream: int) -> tuple[Status]:  # noqa: N802
        if stream in self._capturing:
            return self._spoil(stream, Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        last = self.streams.last[stream]
        if last is not None:
            self.streams.seen(last)
        return (self._lost,)

    def cuEventCreate(self, flags: int) -> tuple[Status, int]:  # noqa: N802
        return OK, self._keep("event", SimpleNamespace(at=None, timed=flags == 0))

    def cuEventDestroy(self, event: int) -> tuple[Status]:  # noqa: N802
        self._drop("event", event)
        return (OK,)

    def cuEventRecord(self, event: int, stream: int) -> tuple[Status]:  # noqa: N802
        if capture := self._capturing.get(stream):
            if self._object("event", event).timed:
                return self._spoil(stream, Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
            self._object("event", event).at = (capture, capture.last[stream])
        else:
            self._object("event", event).at = self.streams.give(stream, "event", None)
        return (OK,)

    def _spoil(self, stream: int, status: Status) -> tuple[Status]:
        self._spoilt.add(self._capturing[stream].origin)
        return (status,)

    def cuStreamWaitEvent(self, stream: int, event: int, flags: int) -> tuple[Status]:  # noqa: N802
        at: Operation | tuple[Capture, tuple[int, ...]] | None = self._object("event", event).at
        capture = self._capturing.get(stream)
        if isinstance(at, tuple):
            if at[0] not in self._capturing.values() or capture not in (None, at[0]):
                raise EmulationFault("a wait for an event of a capture that is over, or of another one")
            at[0].wait(stream, at[1])
            self._capturing[stream] = at[0]
        elif at is not None and capture is not None:
            return self._spoil(stream, Status.CUDA_ERROR_STREAM_CAPTURE_ISOLATION)
        elif at is not None:
            self.streams.wait(stream, at)
        return (OK,)

    def cuEventSynchronize(self, event: int) -> tuple[Status]:  # noqa: N802
        at: Operation | tuple[Capture, tuple[int, ...]] | None = self._object("event", event).at
        if isinstance(at, tuple):
            raise EmulationFault("the host waits for an event of a capture")
        if at is not None:
            self.streams.seen(at)
        return (self._lost,)

    def cuEventElapsedTime(self, start: int, end: int) -> tuple[Status, float]:  # noqa: N802
        events = [self._object("event", one) for one in (start, end)]
        if not all(one.timed and one.at is not None and one.at.done for one in events):
            raise EmulationFault("the time between events that have none")
        return OK, 1000 * (events[1].at.ended - events[0].at.ended)

    # -- work

    def _give(self, stream: int, node: Node) -> tuple[Status]:
        if stream in self._capturing:
            self._capturing[stream].give(stream, node)
        else:
            self.streams.give(stream, node.name, self._guarded(node.make()), node.seconds)
        return (OK,)

    def _guarded(self, work: Callable[[], tuple[Ranges, Ranges]]) -> Callable[[], tuple[Ranges, Ranges]]:
        """Work that is not done any more once the context is lost."""
        return lambda: ([], []) if self._lost else work()

    # -- kernels

    def cuModuleLoadDataEx(  # noqa: N802
        self, image: int, count: int, options: list[int], values: list[Any]
    ) -> tuple[Status, Any]:
        assert count == len(options) == len(values)
        status, content = load_image(image, self.capability, self.version, self.jit_log, values)
        return status, self._keep("module", content) if status == OK else None

    def cuModuleUnload(self, module: int) -> tuple[Status]:  # noqa: N802
        self._drop("module", module)
        return (OK,)

    def cuModuleGetFunction(self, module: int, name: bytes) -> tuple[Status, Any]:  # noqa: N802
        if b".entry " + name + b"(" not in self._object("module", module):
            return Status.CUDA_ERROR_NOT_FOUND, None
        return OK, SimpleNamespace(name=name.decode(), dynamic_bytes=48 << 10)

    def cuFuncSetAttribute(self, function: Any, kind: int, value: int) -> tuple[Status]:  # noqa: N802
        assert kind == 8
        function.dynamic_bytes = value
        return (OK if value <= 227 << 10 else INVALID,)

    def cuLaunchKernel(  # noqa: N802
        self, function: Any, gx: int, gy: int, gz: int, bx: int, by: int, bz: int, shared: int, stream: int,
        places: int, extra: int,
    ) -> tuple[Status]:  # fmt: skip
        assert self.runner is not None
        shape_fits = (
            gy == gz == by == bz == 1 and 0 < gx < 1 << 31 and 0 < bx <= 1024 and shared <= function.dynamic_bytes
        )
        if not shape_fits:
            return (INVALID,)
        count = self.runner.parameters(function.name)
        pointers = (ctypes.c_uint64 * count).from_address(places)
        arguments = [ctypes.c_int64.from_address(pointer).value for pointer in pointers]
        extents = self.extents or (0,) * count
        self.extents = ()

        def work() -> tuple[Ranges, Ranges]:
            if failed := self._fails("kernel"):
                self._lost = failed
                return [], []
            assert self.runner is not None
            touched = self.runner.run(function.name, gx, bx, arguments, extents, self._reach)
            for start, stop in (*touched[0], *touched[1]):
                self._device_view(start, stop - start, f"kernel {function.name}")
            return touched

        return self._give(stream, Node(f"kernel {function.name}", lambda: work, KERNEL_SECONDS))

    def _reach(self, address: int, nbytes: int) -> np.ndarray:
        """Memory of a kernel's argument; what of it is not there may not be touched."""
        if nbytes == 0:
            region, offset = self.memory.find(address, 0, "a kernel's argument")
            nbytes = region.nbytes - offset
        return self.memory.view(
            address, nbytes, "a kernel's argument", kinds=("device", "reserved"), backed=False
        )  # fmt: skip

    # -- graphs

    def cuStreamBeginCapture(self, stream: int, mode: int) -> tuple[Status]:  # noqa: N802
        assert stream not in self._capturing and mode == 1
        self._capturing[stream] = Capture(stream)
        return (OK,)

    def cuStreamEndCapture(self, stream: int) -> tuple[Status, Any]:  # noqa: N802
        capture = self._capturing.get(stream)
        if capture is None or capture.origin != stream:
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        self._capturing = {s: other for s, other in self._capturing.items() if other is not capture}
        if stream in self._spoilt:
            self._spoilt.discard(stream)
            return Status.CUDA_ERROR_STREAM_CAPTURE_INVALIDATED, None
        if not capture.joined():
            return Status.CUDA_ERROR_STREAM_CAPTURE_UNJOINED, None
        return OK, self._keep("graph", capture)

    def cuGraphInstantiate(self, graph: int, flags: int) -> tuple[Status, Any]:  # noqa: N802
        return OK, self._keep("executable graph", self._object("graph", graph))

    def cuGraphDestroy(self, graph: int) -> tuple[Status]:  # noqa: N802
        self._drop("graph", graph)
        return (OK,)

    def cuGraphLaunch(self, graph: int, stream: int) -> tuple[Status]:  # noqa: N802
        if stream in self._capturing:
            return self._spoil(stream, Status.CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED)
        capture: Capture = self._object("executable graph", graph)
        begin = self.streams.give(stream, "graph", None)
        others = {
            s: self.streams.make() for s in dict.fromkeys(s for _, s, _ in capture.entries) if s != capture.origin
        }
        given: list[Operation] = []
        for node, of, follows in capture.entries:
            goal = others.get(of, stream)
            for before in follows:
                self.streams.wait(goal, given[before])
            if goal != stream and not follows:
                self.streams.wait(goal, begin)
            given.append(self.streams.give(goal, node.name, self._guarded(node.make()), node.seconds))
        for entry in capture.last[capture.origin]:
            self.streams.wait(stream, given[entry])
        self.streams.give(stream, "end of a graph", None)
        for other in others.values():
            self.streams.drop(other)
        return (OK,)

    def cuGraphExecDestroy(self, graph: int) -> tuple[Status]:  # noqa: N802
        self._drop("executable graph", graph)
        return (OK,)
