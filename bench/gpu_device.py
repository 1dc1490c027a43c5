"""A GPU to measure kernels on: numpy arrays there and back, launches of one kernel, time between events.

Stands on `runtime.cuda.device`, which refuses where the package, the driver or the GPU is missing or too old.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from codegen.nvptx.builder import GridKernel
from codegen.nvptx.compile import ARCHITECTURES
from codegen.nvptx.lowering import dynamic_bytes
from runtime.cuda.device import Arguments, CudaDevice, host_view
from runtime.cuda.modules import Image, fits


@dataclass(frozen=True)
class DeviceArray:
    """Memory on the device."""

    address: int
    nbytes: int


Argument = DeviceArray | int


class MeasuringDevice:
    """One stream of a GPU. `architecture` is the newest that kernels are compiled for and that it runs."""

    def __init__(self, device: CudaDevice) -> None:
        self.device, self.name = device, device.name
        self.architecture = [a for a in ARCHITECTURES if fits(Image(a, b"", is_ptx=True), device.capability)][-1]
        self._stream = device.new_stream()

    def close(self) -> None:
        """Gives the device back; everything that was loaded or allocated must be free."""
        self.device.free_stream(self._stream)
        self.device.close()

    # -- memory

    def allocate(self, nbytes: int) -> DeviceArray:
        return DeviceArray(self.device.allocate(nbytes, "an array"), nbytes)

    def free(self, array: DeviceArray) -> None:
        self.device.free(array.address)

    def upload(self, array: np.ndarray) -> DeviceArray:
        flat = np.ascontiguousarray(array)
        made = self.allocate(flat.nbytes)
        staging = self.device.allocate_pinned(flat.nbytes, "an array")
        host_view(staging, flat.nbytes)[:] = flat.reshape(-1).view(np.uint8)
        self.device.copy_in(made.address, staging, flat.nbytes, self._stream)
        self.wait()
        self.device.free_pinned(staging)
        return made

    def download(self, array: DeviceArray, like: np.ndarray) -> np.ndarray:
        made = np.empty(like.shape, like.dtype)
        staging = self.device.allocate_pinned(made.nbytes, "an array")
        self.device.copy_out(staging, array.address, made.nbytes, self._stream)
        self.wait()
        made.reshape(-1).view(np.uint8)[:] = host_view(staging, made.nbytes)
        self.device.free_pinned(staging)
        return made

    # -- kernels

    def load(self, ptx: str) -> Any:
        """A module; the driver assembles it for this GPU."""
        return self.device.load([Image(self.architecture, ptx.encode(), is_ptx=True)], "the kernels")

    def launcher(
        self, module: Any, kernel: GridKernel, blocks: int, arguments: Sequence[Argument]
    ) -> Callable[[], None]:
        """A function that launches the kernel once on these arguments."""
        more = dynamic_bytes(kernel)
        function = self.device.function(module, kernel.name, more)
        packed = Arguments([a.address if isinstance(a, DeviceArray) else a for a in arguments])
        return lambda: self.device.launch(function, blocks, kernel.threads, more, packed, self._stream)

    def wait(self) -> None:
        """Until all work is done; errors of kernels come out here."""
        self.device.synchronize(self._stream)

    def seconds(self, actions: Sequence[Callable[[], None]], rounds: int = 20) -> float:
        """Median time of one action; they are taken in turns, so that no cache holds what one of them reads."""
        start, end = (self.device.new_event(timed=True) for _ in range(2))
        for action in actions:
            action()
        self.wait()
        times = []
        for _ in range(rounds):
            self.device.record(start, self._stream)
            for action in actions:
                action()
            self.device.record(end, self._stream)
            self.device.synchronize_event(end)
            times.append(self.device.seconds_between(start, end) / len(actions))
        for event in (start, end):
            self.device.free_event(event)
        return median(times)
