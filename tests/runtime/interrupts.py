"""Ctrl-C at a chosen moment: wherever the interpreter looks for signals.

    if interrupted(1000, lambda: session.step(...)):   # at the 1000th such moment in code of the runtime
        ...

It looks where a call returns, a function begins or a loop goes round, in the code of the runtime and in what of the
standard library that calls. Other moments do not exist: between taking a lock and the block that it guards, say.
"""

from __future__ import annotations

import dis
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import runtime

_FOLDERS = (runtime.__path__[0], threading.__file__.rpartition("/")[0])
_LOOKS = [name.startswith(("CALL", "JUMP_BACKWARD", "POP_JUMP_BACKWARD", "RESUME")) for name in dis.opname]


def interrupted(at: int, call: Callable[[], object]) -> bool:
    """Calls `call`, with KeyboardInterrupt raised at moment `at`, counted from 1; whether it got there and ended so."""
    last: dict[FrameType, int] = {}
    left = at

    def instruction(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if event == "opcode":
            before = last.get(frame)
            last[frame] = frame.f_code.co_code[frame.f_lasti]
            left -= before is not None and _LOOKS[before]
            if not left:
                left = -1
                sys.settrace(None)
                raise KeyboardInterrupt
        return instruction

    def function(frame: FrameType, event: str, argument: Any) -> Any:
        if left < 0 or not frame.f_code.co_filename.startswith(_FOLDERS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return instruction

    traced = sys.gettrace()
    sys.settrace(function)
    try:
        call()
        return False
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(traced)
