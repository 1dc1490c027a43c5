"""NVIDIA's driver through the package cuda-bindings (extra `cuda`): found when first asked for, every call checked.

`load_driver` gives a `Driver`, or refuses with `NoDevice`, which says what is missing: the package, the library, a GPU,
or a driver that is new enough. `Driver.call` gives what a function returns and turns a status that is not success into
a `DeviceFault`; out of memory into `OutOfDeviceMemory`.
"""

from __future__ import annotations

import importlib
from typing import Any

from runtime.errors import RuntimeDiagnostic

OLDEST_DRIVER = 11080  # CUDA 11.8, the first that reads the PTX that is written
PACKAGE = "cuda.bindings.driver"
OUT_OF_MEMORY = 2
# After these the context is of no use any more: every later call gives the same (CUDA driver API, CUresult).
_LOST = frozenset({214, 700, 702, 710, 714, 715, 716, 717, 718, 719, 220})


class NoDevice(RuntimeDiagnostic):
    """Why there is no GPU to run on."""


class DeviceFault(RuntimeDiagnostic):
    """A call of the driver failed. `status` is its number, `lost` whether the context went with it."""

    def __init__(self, message: str, status: int, *, where: str = "", expected: str = "", hint: str = "") -> None:
        super().__init__(message, where=where, expected=expected, hint=hint)
        self.status = status

    @property
    def lost(self) -> bool:
        return self.status in _LOST


class OutOfDeviceMemory(DeviceFault):
    """The device, or the part of its memory that may be used, is full."""


class Driver:
    """The functions of `module`, cuda.bindings.driver or what has its surface. `lost`: after a fault that ends all."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.lost = False

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function gives beside its status: nothing, one value or a tuple. Raises DeviceFault."""
        try:
            status, *results = getattr(self.module, name)(*arguments)
        except (RuntimeError, AttributeError) as fault:  # a function that this driver, or this package, has not
            raise DeviceFault(f"{name}: {first_line(fault)}", 0, hint="update the NVIDIA driver") from None
        if int(status):
            raise self._fault(name, status)
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)

    def _fault(self, name: str, status: Any) -> DeviceFault:
        number, word = int(status), getattr(status, "name", str(int(status)))
        if number == OUT_OF_MEMORY:
            return OutOfDeviceMemory(f"{name} gave {word}", number)
        fault = DeviceFault(f"the GPU failed: {name} gave {word}", number, hint="open a new session")
        self.lost |= fault.lost
        return fault


def first_line(error: BaseException) -> str:
    """What an exception says, in a line."""
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def import_driver() -> Any:
    """The module cuda.bindings.driver. Raises NoDevice where the package is missing or cannot be loaded."""
    try:
        return importlib.import_module(PACKAGE)
    except ImportError as fault:
        missing = isinstance(fault, ModuleNotFoundError)
        message = "is not installed" if missing else f"cannot be loaded ({first_line(fault)})"
        raise NoDevice(
            f"the package cuda-bindings {message}", expected="version 12.8 or later", hint="pip install 'stratum[cuda]'"
        ) from None


def load_driver(module: Any = None) -> Driver:
    """A driver that is ready. Raises NoDevice."""
    driver = Driver(import_driver() if module is None else module)
    try:
        driver.call("cuInit", 0)
        version = int(driver.call("cuDriverGetVersion"))
        count = int(driver.call("cuDeviceGetCount"))
    except DeviceFault as fault:  # the package says so, too, where there is no library
        raise NoDevice(f"no NVIDIA driver that works: {fault.message.removeprefix('the GPU failed: ')}") from None
    if version < OLDEST_DRIVER:
        raise NoDevice(
            f"the NVIDIA driver knows CUDA {version_text(version)}",
            expected=f"CUDA {version_text(OLDEST_DRIVER)} or later",
            hint="update the driver",
        )
    if count == 0:
        raise NoDevice("the NVIDIA driver finds no GPU", hint="CUDA_VISIBLE_DEVICES may hide it")
    return driver


def version_text(version: int) -> str:
    """`12.8` of 12080."""
    return f"{version // 1000}.{version % 1000 // 10}"
