"""One GPU through the package cuda-bindings (extra `cuda`): memory, kernels from PTX, launches, time between events.

`open_device` refuses in one line where the package, the driver or the GPU is missing or too old.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import numpy as np

from codegen.nvptx.builder import GridKernel
from codegen.nvptx.compile import ARCHITECTURES
from codegen.nvptx.lowering import dynamic_bytes

OLDEST_DRIVER = 11080  # the first that reads the PTX version that is written


class NoDeviceError(Exception):
    """Why there is no GPU to run on, in a line."""


@dataclass(frozen=True)
class DeviceArray:
    """Memory on the device."""

    address: int
    nbytes: int


Argument = DeviceArray | int


class CudaDevice:
    """The first GPU. `driver` is the module cuda.bindings.driver."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        try:
            self._call("cuInit", 0)
        except RuntimeError as error:  # also what the package raises when it finds no library
            raise NoDeviceError(f"no NVIDIA driver that works: {_first_line(error)}") from None
        version = int(self._call("cuDriverGetVersion"))
        if version < OLDEST_DRIVER:
            raise NoDeviceError(f"the NVIDIA driver knows CUDA {version // 1000}.{version % 1000 // 10}; expected 11.8")
        device = self._call("cuDeviceGet", 0)
        kinds, wanted = driver.CUdevice_attribute, "CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_"
        major, minor = (
            int(self._call("cuDeviceGetAttribute", getattr(kinds, wanted + part), device))
            for part in ("MAJOR", "MINOR")
        )
        self.name = bytes(self._call("cuDeviceGetName", 128, device)).rstrip(b"\0").decode()
        usable = [a for a in ARCHITECTURES if int(a[3:]) <= 10 * major + minor]
        if not usable:
            raise NoDeviceError(
                f"{self.name} is sm_{major}{minor}; kernels are for {', '.join(ARCHITECTURES)} and later"
            )
        self.architecture = usable[-1]
        self._call("cuCtxSetCurrent", self._call("cuDevicePrimaryCtxRetain", device))

    def _call(self, name: str, *arguments: Any) -> Any:
        """The result of a driver function. Raises RuntimeError with its name and the driver's words."""
        status, *results = getattr(self.driver, name)(*arguments)
        if int(status):
            raise RuntimeError(f"{name} gave {getattr(status, 'name', int(status))}")
        return results[0] if results else None

    # -- memory

    def allocate(self, nbytes: int) -> DeviceArray:
        return DeviceArray(int(self._call("cuMemAlloc", nbytes)), nbytes)

    def free(self, array: DeviceArray) -> None:
        self._call("cuMemFree", array.address)

    def upload(self, array: np.ndarray) -> DeviceArray:
        flat = np.ascontiguousarray(array)
        made = self.allocate(flat.nbytes)
        self._call("cuMemcpyHtoD", made.address, flat.ctypes.data, flat.nbytes)
        return made

    def download(self, array: DeviceArray, like: np.ndarray) -> np.ndarray:
        made = np.empty(like.shape, like.dtype)
        self._call("cuMemcpyDtoH", made.ctypes.data, array.address, made.nbytes)
        return made

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        self._call("cuMemcpyDtoD", target.address, source.address, source.nbytes)

    # -- kernels

    def load(self, ptx: str) -> Any:
        """A module; the driver assembles it for this GPU."""
        text = ctypes.create_string_buffer(ptx.encode())
        return self._call("cuModuleLoadData", ctypes.addressof(text))

    def launcher(
        self, module: Any, kernel: GridKernel, blocks: int, arguments: Sequence[Argument]
    ) -> Callable[[], None]:
        """A function that launches the kernel once on these arguments."""
        function = self._call("cuModuleGetFunction", module, kernel.name.encode())
        more = dynamic_bytes(kernel)
        if more:
            kind = self.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            self._call("cuFuncSetAttribute", function, kind, more)
        values = np.array([a.address if isinstance(a, DeviceArray) else a for a in arguments], np.int64)
        places = values.ctypes.data + 8 * np.arange(len(values), dtype=np.uint64)
        kept = (values, places)  # the driver reads both at every launch

        def launch() -> None:
            grid, block = (blocks, 1, 1), (kernel.threads, 1, 1)
            self._call("cuLaunchKernel", function, *grid, *block, more, 0, kept[1].ctypes.data, 0)

        return launch

    def wait(self) -> None:
        """Until all work is done; errors of kernels come out here."""
        self._call("cuCtxSynchronize")

    def seconds(self, actions: Sequence[Callable[[], None]], rounds: int = 20) -> float:
        """Median time of one action; they are taken in turns, so that no cache holds what one of them reads."""
        start, end = (self._call("cuEventCreate", 0) for _ in range(2))
        for action in actions:
            action()
        self.wait()
        times = []
        for _ in range(rounds):
            self._call("cuEventRecord", start, 0)
            for action in actions:
                action()
            self._call("cuEventRecord", end, 0)
            self._call("cuEventSynchronize", end)
            times.append(float(self._call("cuEventElapsedTime", start, end)) / 1000 / len(actions))
        return median(times)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


def open_device() -> CudaDevice:
    """The first GPU. Raises NoDeviceError."""
    try:
        driver = importlib.import_module("cuda.bindings.driver")
    except ImportError:
        raise NoDeviceError("the package cuda-bindings is not installed: pip install 'stratum[cuda]'") from None
    return CudaDevice(driver)
