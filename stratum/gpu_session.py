"""Opens an artifact on a GPU, with what may be used of the GPU's memory and of the machine's.

`open_on_gpu` gives a `CudaSession`. `memory` bounds the whole process: what the interpreter and the GPU's driver take
is measured when the driver is there, the rest may be pinned; weights for which neither that nor the GPU has room come
from the disk. Raises DoesNotFit with the least budget that would do, and what `CudaSession` raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum.process_account import DoesNotFit, mib, pinned_room
from stratum.process_room import TABLES_SHARE

if TYPE_CHECKING:
    from runtime.cuda.session import CudaSession


def open_on_gpu(
    path: str | os.PathLike[str], *, memory: int | None = None, device_memory: int | None = None, **options: Any
) -> CudaSession:
    """`options` are those of `CudaSession`; sizes in bytes."""
    from runtime.cuda.device import open_device
    from runtime.cuda.driver import OutOfDeviceMemory
    from runtime.cuda.host_plan import PinnedMemoryTooSmall
    from runtime.cuda.interrupts import uninterrupted
    from runtime.cuda.session import CudaSession

    if memory is None:
        return CudaSession(path, memory=device_memory, **options)
    with uninterrupted():
        device = open_device(limit_bytes=device_memory)
    room = pinned_room(memory)
    try:
        return CudaSession(path, device=device, host_memory=max(0, room), **options)
    except PinnedMemoryTooSmall as refused:
        raise DoesNotFit(
            f"{mib(memory)} are too few: {mib(memory - room)} of them are this process, weights pass through the rest",
            _more(memory, refused.lacking - min(0, room)), where=str(Path(path)),
            hint="allow more memory, or more of the GPU's (--device-memory)",
        ) from None  # fmt: skip
    except OutOfDeviceMemory as refused:
        if room > 0 or "pinned" not in refused.message:
            raise
        raise DoesNotFit(
            f"{mib(memory)} are too few: this process takes {mib(memory - room)} before it has a model",
            _more(memory, (1 << 20) - room), where=str(Path(path)), hint="allow more memory",
        ) from None  # fmt: skip


def _more(memory: int, nbytes: int) -> int:
    """The budget that leaves so many bytes more."""
    return memory + -(-nbytes * TABLES_SHARE // (TABLES_SHARE - 1)) + 1
