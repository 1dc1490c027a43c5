"""Notices a disk that gives far less than a plan counted on.

Takes the rate of the plan and, step by step, bytes read and the time in which reads were in flight. Gives, once, a
sentence with both rates.
"""

from __future__ import annotations

SLOW = 0.5  # of the rate that was counted on: less is worth a word, drives vary by a third from minute to minute
LEAST_BYTES = 512 << 20  # over which a rate is taken
LEAST_S = 4.0


class DiskWatch:
    """`planned`: bytes a second that the plan counts on, 0 where nobody knows."""

    def __init__(self, planned: int) -> None:
        self._planned = planned
        self._from_bytes, self._from_s = 0, 0.0
        self.slow = False

    def observe(self, nbytes: int, busy_s: float) -> str | None:
        """All bytes and seconds so far. What to say, the first time that the disk was slow for a while."""
        read, took_s = nbytes - self._from_bytes, busy_s - self._from_s
        if self.slow or not self._planned or read < LEAST_BYTES or took_s < LEAST_S:
            return None
        self._from_bytes, self._from_s = nbytes, busy_s
        if read / took_s >= SLOW * self._planned:
            return None
        self.slow = True
        return (
            f"the disk gives {read / took_s / 1e9:.2f} GB/s, the plan counts on {self._planned / 1e9:.2f}: "
            "steps take longer than planned (compile-model targets calibrate --disk measures it anew)"
        )
