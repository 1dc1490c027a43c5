"""Where data lies and how it moves: tiers, links, switches, fabrics, storage, as frozen data.

Sizes are bytes, rates bytes/s, times seconds. What nobody stated is None. The rates given by the methods are those to
plan with: the stated bandwidth times the stated efficiency, or the measured points, interpolated.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryTier:
    """A memory that tensors can live in. `reserve_bytes` is left to others and never planned with.

    `read_by_threads` is ((threads, bytes/s of all of them together), ...) in rising order. `page_fault_seconds` is what
    the first touch of a page of 4096 bytes costs.
    """

    name: str
    capacity_bytes: int | None = None
    reserve_bytes: int = 0
    read_bandwidth: float | None = None
    write_bandwidth: float | None = None
    latency_seconds: float | None = None
    source: str = ""
    read_by_threads: tuple[tuple[int, float], ...] = ()
    page_fault_seconds: float | None = None
    power_watts: float | None = None
    idle_watts: float | None = None
    joules_per_byte: float | None = None
    count: int = 1

    @property
    def usable_bytes(self) -> int | None:
        """Capacity less the reserve, of one copy."""
        return None if self.capacity_bytes is None else max(0, self.capacity_bytes - self.reserve_bytes)

    def read_rate(self, threads: int | None = None) -> float | None:
        """Bytes/s that `threads` threads read together (default: as many as it takes).

        Between measured points it is linear, below the first one in proportion, beyond the last one constant.
        """
        points = self.read_by_threads
        if threads is None or not points:
            return self.read_bandwidth
        if threads <= points[0][0]:
            return points[0][1] * threads / points[0][0]
        for (low, slow), (high, fast) in itertools.pairwise(points):
            if threads <= high:
                return slow + (fast - slow) * (threads - low) / (high - low)
        return points[-1][1]

    def write_rate(self) -> float | None:
        """Bytes/s written; the read bandwidth where none is stated."""
        return self.write_bandwidth if self.write_bandwidth is not None else self.read_bandwidth


@dataclass(frozen=True)
class Link:
    """A connection between two tiers; data go both ways over it.

    `bandwidth` is that from `from_tier` to `to_tier`, `back_bandwidth` that of the other way (None: the same).
    `duplex`: both ways at once, each at its full bandwidth; without it they share the time. `switch` names the switch
    whose total the link shares with others. `pageable_bandwidth` is what copies get when the memory is not pinned;
    where `pinned` is false none of it is, and all copies get that.
    """

    name: str
    from_tier: str
    to_tier: str
    bandwidth: float | None = None
    latency_seconds: float | None = None
    source: str = ""
    back_bandwidth: float | None = None
    duplex: bool = True
    switch: str = ""
    efficiency: float | None = None
    pageable_bandwidth: float | None = None
    pinned: bool = True
    power_watts: float | None = None
    joules_per_byte: float | None = None
    count: int = 1

    def rate(self, to_tier: str = "", *, pinned: bool = True) -> float | None:
        """Bytes/s of one copy towards `to_tier` (default: the link's own direction); None when it is not stated."""
        back = to_tier == self.from_tier and to_tier != self.to_tier
        if back and self.back_bandwidth is not None:
            nominal = self.back_bandwidth
        else:
            nominal = self.bandwidth
        if nominal is None:
            return None
        rate = nominal * (1.0 if self.efficiency is None else self.efficiency)
        if not self.pinned:
            return None if self.pageable_bandwidth is None else min(rate, self.pageable_bandwidth)
        return rate if pinned or self.pageable_bandwidth is None else min(rate, self.pageable_bandwidth)


@dataclass(frozen=True)
class Switch:
    """What several links and drives go through: all of them together move at most `bandwidth` in one direction."""

    name: str
    bandwidth: float | None = None
    source: str = ""
    count: int = 1


@dataclass(frozen=True)
class Fabric:
    """Joins the copies of a tier with each other, within one node or across nodes.

    `bandwidth` is what **one** copy sends (and at the same time receives). `scope`: `node` or `cluster`. `topology`:
    `switch` (all pairs at full rate), `ring` or `mesh` (a direct connection for each pair, which shares the bandwidth).
    """

    name: str
    tier: str
    scope: str = "node"
    bandwidth: float | None = None
    latency_seconds: float | None = None
    topology: str = "switch"
    efficiency: float | None = None
    joules_per_byte: float | None = None
    source: str = ""

    def rate(self) -> float | None:
        """Bytes/s that one copy sends, efficiency included."""
        return (
            None if self.bandwidth is None else self.bandwidth * (1.0 if self.efficiency is None else self.efficiency)
        )


@dataclass(frozen=True)
class StoragePoint:
    """Sustained bandwidth with requests of `block_bytes`, `queue_depth` of them in flight."""

    block_bytes: int
    queue_depth: int
    read_bandwidth: float
    write_bandwidth: float | None = None
    access: str = "any"  # "any" | "random" | "sequential"


@dataclass(frozen=True)
class Storage:
    """A drive: its size and its sustained points. What is read arrives in `tier` (empty: the target's first).

    `burst_bandwidth` is what the first `burst_bytes` after a rest are read with; plans use the points.
    """

    name: str
    capacity_bytes: int | None = None
    points: tuple[StoragePoint, ...] = ()
    source: str = ""
    tier: str = ""
    switch: str = ""
    latency_seconds: float | None = None
    burst_bandwidth: float | None = None
    burst_bytes: int | None = None
    power_watts: float | None = None
    idle_watts: float | None = None
    joules_per_byte: float | None = None
    count: int = 1

    def read_rate(
        self, block_bytes: int | None = None, queue_depth: int | None = None, access: str = "any"
    ) -> float | None:
        """Bytes/s read with such requests; without arguments the best of all points. None when nothing is known."""
        return self._rate(block_bytes, queue_depth, access, "read_bandwidth")

    def write_rate(
        self, block_bytes: int | None = None, queue_depth: int | None = None, access: str = "any"
    ) -> float | None:
        """Bytes/s written with such requests, from the points that state it."""
        return self._rate(block_bytes, queue_depth, access, "write_bandwidth")

    def _rate(self, block: int | None, depth: int | None, access: str, name: str) -> float | None:
        """Interpolates in the logarithms of block and depth; outside of the points the nearest holds, but blocks
        smaller than the smallest take as long as that one. Where a depth has no blocks as small as this one, more
        requests at once are as fast as fewer are with such blocks, at least."""
        points = [p for p in self.points if getattr(p, name) is not None]
        fitting = [p for p in points if "any" in (access, p.access) or p.access == access] or points
        if not fitting:
            return None
        if block is None and depth is None:
            return max(getattr(p, name) for p in fitting)
        curves: dict[int, list[tuple[float, float]]] = {}
        for p in fitting:
            curves.setdefault(p.queue_depth, []).append((math.log2(p.block_bytes), getattr(p, name)))
        wanted = None if block is None else math.log2(max(1, block))
        at_depth: list[tuple[float, float]] = []
        for d, curve in sorted(curves.items()):
            rate = _along(sorted(curve), wanted)
            if wanted is not None and wanted < min(curve)[0]:
                rate = max([rate, *(fewer for _, fewer in at_depth)])
            at_depth.append((math.log2(d), rate))
        return _along(at_depth, None if depth is None else math.log2(max(1, depth)), proportional=False)


def _along(points: list[tuple[float, float]], x: float | None, *, proportional: bool = True) -> float:
    """The value at x of a curve of (log2 size, rate) points, piecewise linear; the best of all when x is None.

    Of several points at one x the fastest counts. Below the first point the rate falls with the size if
    `proportional`, else it stays.
    """
    curve: dict[float, float] = {}
    for at, value in points:
        curve[at] = max(value, curve.get(at, 0.0))
    if x is None:
        return max(curve.values())
    ordered = sorted(curve.items())
    if x <= ordered[0][0]:
        return ordered[0][1] * (2.0 ** (x - ordered[0][0]) if proportional else 1.0)
    for (low, slow), (high, fast) in itertools.pairwise(ordered):
        if x <= high:
            return slow + (fast - slow) * (x - low) / (high - low)
    return ordered[-1][1]
