"""What a GPU's memory does: the speed of a copy within it, which nothing that reads every weight once can beat."""

from __future__ import annotations

from statistics import median
from typing import Any

from runtime.cuda.device import Device

COPY_BYTES = 1 << 30
ROUNDS = 10


def copy_bandwidth(device: Device, nbytes: int = COPY_BYTES) -> float:
    """Bytes read and written in a second by a copy of `nbytes` bytes; the median of some, after one to warm up. Takes
    twice that memory meanwhile. Raises OutOfDeviceMemory."""
    stream = device.new_stream()
    memory: list[int] = []
    events: list[Any] = []
    try:
        for _ in range(2):
            memory.append(device.allocate(nbytes, "measuring copies"))
            events.append(device.new_event(timed=True))
        start, end = events
        seconds = []
        for _ in range(ROUNDS + 1):
            device.record(start, stream)
            device.copy(memory[0], memory[1], nbytes, stream)
            device.record(end, stream)
            device.synchronize_event(end)
            seconds.append(device.seconds_between(start, end))
        return 2 * nbytes / median(seconds[1:])
    finally:
        for address in memory:
            device.free(address)
        for event in events:
            device.free_event(event)
        device.free_stream(stream)
