"""A control group that limits memory, page cache counted: what containers do to a process.

    with MemoryGroup(2 << 30) as group:
        subprocess.run(group.command(["program"]))
        group.facts()      # peak bytes, how often the limit was hit

Version 1 of control groups or 2, whichever has the memory controller and may be written. Standard library only.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path("/sys/fs/cgroup")


class MemoryGroup:
    """A group of its own, removed at the end; `limit` in bytes (0: none), `number` tells those of one process apart.
    Raises OSError where no group can be made."""

    def __init__(self, limit: int, number: int = 0) -> None:
        self.limit = limit
        self._second = (ROOT / "cgroup.controllers").is_file()
        self.path = (ROOT if self._second else ROOT / "memory") / f"stratum-bench-{os.getpid()}-{number}"

    def __enter__(self) -> Self:
        self.path.mkdir()
        if not self.limit:
            return self
        try:
            (self.path / ("memory.max" if self._second else "memory.limit_in_bytes")).write_text(str(self.limit))
        except OSError:
            self.path.rmdir()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        with contextlib.suppress(OSError):
            if not self._second:
                (self.path / "memory.force_empty").write_text("0")
        with contextlib.suppress(OSError):
            self.path.rmdir()

    def command(self, words: Sequence[str]) -> list[str]:
        """The same command, in the group from before its first page."""
        return ["sh", "-c", f'echo $$ > {self.path}/cgroup.procs && exec "$@"', "sh", *words]

    def facts(self) -> dict[str, int]:
        """`peak`: bytes at most; `hits`: how often the limit made the kernel look for memory to take back."""
        if not self._second:
            return {
                "peak": int((self.path / "memory.max_usage_in_bytes").read_text()),
                "hits": int((self.path / "memory.failcnt").read_text()),
            }
        events = dict(line.split() for line in (self.path / "memory.events").read_text().splitlines())
        peak = self.path / "memory.peak"
        return {"peak": int(peak.read_text()) if peak.exists() else 0, "hits": int(events.get("max", 0))}
