"""Ctrl-C between two steps of work, not within them.

`uninterrupted()` around what must not stop half-way (memory is allocated but not noted, work is given to a stream but
not waited for): a SIGINT that comes inside is raised at its end, as the handler that is in force would have. It bounds
how long Ctrl-C waits, so it is put around milliseconds, never around a whole generation.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Holds SIGINT back until the end of the block. In other threads than the main one it never comes anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.getsignal(signal.SIGINT)
    if not callable(before):  # ignored, or left to the system: nothing of ours runs
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            before(*came[0])
