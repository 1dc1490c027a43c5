"""Ctrl-C between two steps of work, not within them.

`uninterrupted()` around what must not stop half-way (memory is allocated but not noted, work is given to a stream but
not waited for): a SIGINT that comes inside is raised at its end, as the handler that is in force would have. It bounds
how long Ctrl-C waits, so it is put around milliseconds, never around a whole generation. What may take longer inside of
it (a read from a disk) calls `let_interrupts_through` where stopping is safe.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
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
    _held.append((came, before))
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        _held.pop()
        if came:
            before(*came[0])


def let_interrupts_through() -> None:
    """Within `uninterrupted`: a SIGINT that has come is raised now, from the innermost block outwards."""
    if threading.current_thread() is threading.main_thread():
        for came, before in reversed(_held):
            while came:
                before(*came.pop(0))


# Of the main thread's blocks, outermost first: what has come, and the handler that is to have it.
_held: list[tuple[list[tuple[int, FrameType | None]], Callable[[int, FrameType | None], object]]] = []
