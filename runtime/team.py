"""The threads that run a step: thread 0 is the caller, the others wait inside native code between steps.

Takes loaded code and a thread count, gives `run`. The threads live from construction to `close`; `close` (also called
when the session is dropped, and at interpreter exit) tells them to return and joins them. A thread that does not come
back (native code hung) is left behind, and `close` says so: its memory must then stay mapped.

Not fork-safe, like every thread pool: a child of `os.fork` has no workers. `Session` refuses to step there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Iterator

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.memory import Reservation
from runtime.native import NativeCode

TEAM_BYTES = 4096
MAX_THREADS = 256
_JOIN_SECONDS = 5.0


class WorkerTeam:
    """`threads` threads that execute step functions together (one of them is whoever calls `run`)."""

    def __init__(self, native: NativeCode, threads: int) -> None:
        if not 1 <= threads <= MAX_THREADS:
            raise RuntimeDiagnostic(f"cannot run on {threads} threads", expected=f"1 to {MAX_THREADS} threads")
        self.threads = threads
        self._native = native
        self._memory = Reservation(TEAM_BYTES, what="the thread team")
        self._memory.view().view(np.int64)[0] = threads
        self._workers: list[threading.Thread] = []
        try:
            for number in range(1, threads):
                # Daemons, because a session that nobody closed must not keep the interpreter from exiting. The thread
                # holds no reference to this object, so that dropping the session still ends it.
                worker = threading.Thread(
                    target=native.worker,
                    args=(self._memory.address, number),
                    name=f"stratum-worker-{number}",
                    daemon=True,
                )
                worker.start()
                self._workers.append(worker)
        except RuntimeError as fault:
            self.close()
            raise RuntimeDiagnostic(
                f"cannot start {threads} threads: {fault}",
                hint="use fewer (--threads N) or raise the limit (ulimit -u)",
            ) from None

    @property
    def address(self) -> int:
        """Where the team's 4096 bytes lie."""
        return self._memory.address

    def keep_off(self, cpu: int) -> None:
        """The worker threads run on other CPUs than `cpu`, where there are any.

        A thread that is woken is often put where its waker runs, and would then wait for it, spinning, for a whole
        turn of the scheduler.
        """
        others = os.sched_getaffinity(0) - {cpu}
        for worker in self._workers:
            if others and worker.native_id is not None:
                with contextlib.suppress(OSError):
                    os.sched_setaffinity(worker.native_id, others)

    def run(self, function: int, arguments: int) -> int:
        """Runs one step function on all threads; 0, or another number when a bounded wait expired."""
        return self._native.run(self._memory.address, function, arguments)

    def close(self) -> bool:
        """Ends the threads. False when one did not return in time: then nothing it may touch can be freed."""
        if self._memory.address == 0:
            return True
        self._native.shutdown(self._memory.address)
        deadline = time.monotonic() + _JOIN_SECONDS
        for worker in self._workers:
            worker.join(max(0.0, deadline - time.monotonic()))
        if any(worker.is_alive() for worker in self._workers):
            return False
        self._memory.close()
        return True


@contextlib.contextmanager
def on_cpu(cpu: int | None) -> Iterator[None]:
    """The calling thread stays on that CPU meanwhile; None leaves it free."""
    if cpu is None:
        yield
        return
    before = os.sched_getaffinity(0)
    try:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, {cpu})
        yield
    finally:
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, before)
