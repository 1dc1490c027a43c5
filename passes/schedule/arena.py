"""One arena for all activations of a step: offsets are assigned once, before the program runs.

    assign_arena([Lifetime("a", 4096, 0, 2), Lifetime("b", 4096, 1, 3), Lifetime("c", 4096, 3, 4)])
        -> Arena(offsets={"a": 0, "b": 4096, "c": 0}, total_bytes=8192)

Takes buffers with a size and the first and last step at which each is touched (both inclusive: a step that reads `a`
and writes `b` needs both at once). Gives an aligned offset to each such that two buffers alive at the same step
never share a byte. Two greedy orders are tried and the smaller arena wins (Pisarchyk and Lee, "Efficient memory
management for deep neural net inference", arXiv:2001.03288): largest buffer first, and the buffers of the busiest
step first; each buffer goes into the smallest gap that holds it. The result depends on the input only.

Refuses negative sizes, lifetimes that end before they begin, and two buffers of one name (ValueError: these come from
the compiler, not from a user). `check_arena` shares no code with the assignment and proves the result.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

ALIGNMENT = 64  # bytes: one cache line and one 512-bit register


@dataclass(frozen=True)
class Lifetime:
    """A buffer of `bytes` bytes that must be kept from step `first` to step `last`, both included."""

    buffer: Hashable
    bytes: int
    first: int
    last: int


@dataclass(frozen=True)
class Arena:
    """`offsets[buffer]` in bytes from the start of the arena (input order); `total_bytes` is a whole number of lines.

    `peak_bytes` is the most that is alive at one step: no assignment can need less.
    """

    offsets: dict[Hashable, int]
    total_bytes: int
    peak_bytes: int = 0


def assign_arena(lifetimes: Sequence[Lifetime], alignment: int = ALIGNMENT) -> Arena:
    """Offsets for `lifetimes`. Buffers of zero bytes get offset 0. Raises ValueError on senseless lifetimes."""
    _check_input(lifetimes, alignment)
    sized = [x for x in lifetimes if x.bytes > 0]
    sizes = [-(-x.bytes // alignment) * alignment for x in sized]
    peak, breadth = _breadth(sized, sizes)
    by_size = sorted(range(len(sized)), key=lambda i: (-sizes[i], sized[i].first - sized[i].last, i))
    by_breadth = sorted(range(len(sized)), key=lambda i: (-breadth[i], -sizes[i], i))
    by_start = sorted(range(len(sized)), key=lambda i: (sized[i].first, -sizes[i], i))
    best: list[int] = []
    best_total = -1
    for order in (by_size, by_breadth, by_start):
        offsets = _place(sized, sizes, order)
        total = max((o + s for o, s in zip(offsets, sizes, strict=True)), default=0)
        if best_total < 0 or total < best_total:
            best, best_total = offsets, total
        if total == peak:  # nothing can be smaller
            break
    at = {x.buffer: 0 for x in lifetimes}
    at.update((x.buffer, offset) for x, offset in zip(sized, best, strict=True))
    return Arena(at, max(best_total, 0), peak)


def _check_input(lifetimes: Iterable[Lifetime], alignment: int) -> None:
    if alignment < 1 or alignment & (alignment - 1):
        raise ValueError(f"alignment {alignment} is not a power of two")
    seen: set[Hashable] = set()
    for x in lifetimes:
        if x.bytes < 0:
            raise ValueError(f"buffer {x.buffer} has {x.bytes} bytes")
        if x.last < x.first:
            raise ValueError(f"buffer {x.buffer} ends at step {x.last}, before it begins at {x.first}")
        if x.buffer in seen:
            raise ValueError(f"two buffers are named {x.buffer}")
        seen.add(x.buffer)


def _breadth(sized: Sequence[Lifetime], sizes: Sequence[int]) -> tuple[int, list[int]]:
    """The most bytes alive at one step, and for each buffer the most bytes alive while it lives.

    What is alive only grows where a buffer begins, so the first steps are the only ones to look at.
    """
    steps = sorted({x.first for x in sized})
    alive = [sum(s for x, s in zip(sized, sizes, strict=True) if x.first <= step <= x.last) for step in steps]
    breadth = [max(a for step, a in zip(steps, alive, strict=True) if x.first <= step <= x.last) for x in sized]
    return max(alive, default=0), breadth


def _place(sized: Sequence[Lifetime], sizes: Sequence[int], order: Sequence[int]) -> list[int]:
    """Puts the buffers down in `order`, each into the smallest gap between those alive with it; the lowest on a tie."""
    offsets = [0] * len(sized)
    placed: list[int] = []  # sorted by offset
    for i in order:
        first, last, size = sized[i].first, sized[i].last, sizes[i]
        best_offset, best_gap, end = -1, 0, 0
        for j in placed:
            if sized[j].first > last or sized[j].last < first:
                continue
            gap = offsets[j] - end
            if gap >= size and (best_offset < 0 or gap < best_gap):
                best_offset, best_gap = end, gap
            end = max(end, offsets[j] + sizes[j])
        offsets[i] = best_offset if best_offset >= 0 else end
        at = next((n for n, j in enumerate(placed) if offsets[j] > offsets[i]), len(placed))
        placed.insert(at, i)
    return offsets


def check_arena(lifetimes: Sequence[Lifetime], arena: Arena, alignment: int = ALIGNMENT) -> list[str]:
    """Every fault of an assignment, in words; empty when it is right. Written without the code that assigns."""
    faults = []
    by_step: dict[int, list[Lifetime]] = {}
    for x in lifetimes:
        if x.buffer not in arena.offsets:
            faults.append(f"{x.buffer} has no offset")
            continue
        offset = arena.offsets[x.buffer]
        if offset % alignment:
            faults.append(f"{x.buffer} is at {offset}, which is no multiple of {alignment}")
        if offset < 0 or offset + x.bytes > arena.total_bytes:
            faults.append(f"{x.buffer} at {offset}..{offset + x.bytes} lies outside of {arena.total_bytes} bytes")
        if x.bytes:
            for step in range(x.first, x.last + 1):
                by_step.setdefault(step, []).append(x)
    clashes: dict[tuple[Hashable, Hashable], int] = {}
    for step in sorted(by_step):
        alive = sorted(by_step[step], key=lambda x: (arena.offsets[x.buffer], x.bytes))
        for low, high in itertools.pairwise(alive):
            if arena.offsets[low.buffer] + low.bytes > arena.offsets[high.buffer]:
                clashes.setdefault((low.buffer, high.buffer), step)
    faults += [f"{a} and {b} share memory at step {step}" for (a, b), step in clashes.items()]
    return faults
