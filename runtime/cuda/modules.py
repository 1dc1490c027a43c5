"""Kernels onto a GPU: machine code that was made for it, else PTX that its driver assembles.

Takes the images of an artifact, each for one architecture. Machine code (a cubin) runs on GPUs of its major number with
at least its minor one, PTX on all from its architecture on; one for an "a" architecture (sm_90a) on exactly that GPU.
Refuses where no image fits, and shows what the driver's assembler objects to.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from runtime.cuda.driver import DeviceFault, Driver, NoDevice
from runtime.errors import RuntimeDiagnostic

_ARCHITECTURE = re.compile(r"sm_(\d+)(\d)(a?)")
_LOG_BYTES = 8192
_LOG_LINES = 6
_UNSUPPORTED_PTX = 222
_NO_BINARY = 209
_NO_ASSEMBLER = (221, 223)


@dataclass(frozen=True)
class Image:
    """Kernels for `architecture` (sm_90, sm_90a, ...): the text of PTX, or the bytes of a cubin."""

    architecture: str
    content: bytes
    is_ptx: bool


def fits(image: Image, capability: tuple[int, int]) -> bool:
    """Whether a GPU of this capability runs the image. Raises RuntimeDiagnostic for a name that is no architecture."""
    found = _ARCHITECTURE.fullmatch(image.architecture)
    if found is None:
        raise RuntimeDiagnostic(f"{image.architecture!r} is no GPU architecture", expected="a name like sm_90")
    made_for = int(found[1]), int(found[2])
    if found[3]:
        return made_for == capability
    if image.is_ptx:
        return made_for <= capability
    return made_for[0] == capability[0] and made_for[1] <= capability[1]


def in_order(images: Sequence[Image], capability: tuple[int, int]) -> list[Image]:
    """The images that fit, the best first: the newest architecture, "a" ones first, machine code before PTX."""

    def rank(image: Image) -> tuple[int, bool, bool]:
        found = _ARCHITECTURE.fullmatch(image.architecture)
        assert found is not None
        return int(found[1]) * 10 + int(found[2]), bool(found[3]), not image.is_ptx

    return sorted((image for image in images if fits(image, capability)), key=rank, reverse=True)


def load_module(driver: Driver, capability: tuple[int, int], images: Sequence[Image], where: str) -> Any:
    """The driver's handle of a loaded module. Raises NoDevice where no image is for this GPU or its driver is too old
    for them, RuntimeDiagnostic with the assembler's words where it refuses the PTX."""
    usable = in_order(images, capability)
    if not usable:
        have = ", ".join(sorted({image.architecture for image in images})) or "nothing"
        raise NoDevice(
            f"no kernels for this GPU (sm_{capability[0]}{capability[1]}); the artifact has them for {have}",
            where=where,
            hint="build it again for this GPU",
        )
    fault = None
    for image in usable:
        try:
            return _load(driver, image, where)
        except DeviceFault as one:
            if one.status != _NO_BINARY:
                raise
            fault = one
    assert fault is not None
    raise NoDevice(fault.message, where=where, hint="build the artifact again for this GPU")


def _load(driver: Driver, image: Image, where: str) -> Any:
    """One image; the driver keeps no pointer into it."""
    content = ctypes.create_string_buffer(image.content)  # ends in the zero that PTX must end in
    log = bytes(_LOG_BYTES)  # the package takes nothing else, and lets the driver write into it
    option = driver.module.CUjit_option
    options = [option.CU_JIT_ERROR_LOG_BUFFER, option.CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES]
    try:
        return driver.call("cuModuleLoadDataEx", ctypes.addressof(content), 2, options, [log, _LOG_BYTES])
    except DeviceFault as fault:
        if fault.status == _NO_BINARY or fault.lost:
            raise
        what = "PTX" if image.is_ptx else "machine code"
        if fault.status == _UNSUPPORTED_PTX:
            raise NoDevice(
                f"the NVIDIA driver is too old for the {what} ({image.architecture})", where=where,
                hint="update the driver",
            ) from None  # fmt: skip
        if fault.status in _NO_ASSEMBLER:
            raise NoDevice(
                "the NVIDIA driver here assembles no PTX, and the artifact has no machine code for this GPU",
                where=where,
                hint="build it with ptxas at hand: pip install 'stratum[cuda-tools]'",
            ) from None
        said = [line.strip() for line in log.split(b"\0")[0].decode("utf-8", "replace").splitlines() if line.strip()]
        words = "".join(f"\n  {line}" for line in said[:_LOG_LINES])
        message = f"the driver refused the {what} for {image.architecture}: {fault.message.split(' gave ')[-1]}{words}"
        raise RuntimeDiagnostic(message, where=where, hint="build the artifact again") from None
