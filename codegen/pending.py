"""What launches touched since the last barrier: one is put between two launches only where the second needs it."""

from __future__ import annotations

from typing import Any


class Pending:
    """Memory touched since the last barrier, as (name, start, end)."""

    def __init__(self) -> None:
        self.writes: list[tuple[Any, int, int]] = []
        self.reads: list[tuple[Any, int, int]] = []

    def conflicts(self, writes: list[tuple[Any, int, int]], reads: list[tuple[Any, int, int]]) -> bool:
        """Whether a launch of these regions needs a barrier in front of it."""
        return any(_overlap(a, b) for a in self.writes for b in (*writes, *reads)) or any(
            _overlap(a, b) for a in self.reads for b in writes
        )

    def add(self, writes: list[tuple[Any, int, int]], reads: list[tuple[Any, int, int]]) -> None:
        self.writes += writes
        self.reads += reads

    def clear(self) -> None:
        self.writes, self.reads = [], []


def _overlap(a: tuple[Any, int, int], b: tuple[Any, int, int]) -> bool:
    return a[0] == b[0] and a[1] < b[2] and b[1] < a[2]
