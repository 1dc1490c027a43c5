"""Opens an artifact on a GPU, with what may be used of the GPU's memory and of the machine's.

`open_on_gpu` gives a `CudaSession`. `memory` bounds the whole process: what the interpreter and the GPU's driver take
is measured when the driver is there, the rest may be pinned; weights for which neither that nor the GPU has room come
from the disk. Where a context is asked for whose keys and values do not fit the GPU beside the rest, a plan says of
which layers they lie in the host's memory (`stratum.host_kv_choice`). Raises DoesNotFit with the least budget that
would do, and what `CudaSession` raises.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stratum.process_account import DoesNotFit, mib, pinned_room
from stratum.process_room import TABLES_SHARE

if TYPE_CHECKING:
    from runtime.cuda.device import Device
    from runtime.cuda.session import CudaSession


def open_on_gpu(
    path: str | os.PathLike[str], *, memory: int | None = None, device_memory: int | None = None, **options: Any
) -> CudaSession:
    """`options` are those of `CudaSession`; sizes in bytes."""
    from runtime.cuda.device import open_device
    from runtime.cuda.driver import OutOfDeviceMemory
    from runtime.cuda.host_kv import HostCacheTooSmall
    from runtime.cuda.host_plan import PinnedMemoryTooSmall
    from runtime.cuda.interrupts import uninterrupted
    from runtime.cuda.session import CudaSession

    asked = options.get("max_context")
    if memory is None and (asked is None or "host_kv" in options or not _may_attend(path, asked)):
        return CudaSession(path, memory=device_memory, **options)
    with uninterrupted():
        device = open_device(limit_bytes=device_memory)
    room = None if memory is None else pinned_room(memory)
    try:
        if asked is not None and "host_kv" not in options and _may_attend(path, asked):
            options["host_kv"] = _host_layers(path, device, asked, options.get("num_slots", 1), room)
    except BaseException:
        device.close()
        raise
    if memory is None or room is None:
        return CudaSession(path, device=device, **options)
    try:
        return CudaSession(path, device=device, host_memory=max(0, room), **options)
    except PinnedMemoryTooSmall as refused:
        what = (
            "keys and values of the cache lie in" if isinstance(refused, HostCacheTooSmall) else "weights pass through"
        )
        raise DoesNotFit(
            f"{mib(memory)} are too few: {mib(memory - room)} of them are this process, {what} the rest",
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


def _may_attend(path: str | os.PathLike[str], context: int) -> bool:
    """Whether the CPU beside a GPU has attention for an artifact, and the context is one that it takes."""
    from runtime.artifact import open_artifact
    from runtime.cuda.host_attention import AttentionProgram

    artifact = open_artifact(path)
    return 1 <= context <= artifact.manifest.max_context and bool(AttentionProgram.of(artifact).layers)


def _host_layers(
    path: str | os.PathLike[str], device: Device, context: int, slots: int, room: int | None
) -> tuple[int, ...]:
    """The layers whose keys and values lie on the host, of whose memory `room` bytes may be used."""
    from runtime.artifact import open_artifact
    from stratum.host_kv_choice import layers_on_host

    host_bytes = None if room is None else max(0, room)
    return layers_on_host(open_artifact(path), device, context=context, slots=slots, host_bytes=host_bytes)


def _more(memory: int, nbytes: int) -> int:
    """The budget that leaves so many bytes more."""
    return memory + -(-nbytes * TABLES_SHARE // (TABLES_SHARE - 1)) + 1
