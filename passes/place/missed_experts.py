"""Experts that a cache lacks: each is brought to the unit, or computed where it lies, whichever is sooner.

    there = computed_there(8, fetch=90e-6, near=10e-6, far=40e-6, start=20e-6)    # (True, True, False, True, ...)
    loads = divide([9, 4, 1, 1], fetch=..., near=..., far=lambda tokens: ...)

HybriMoE's rule (arXiv:2504.05897): missing experts are taken one after another, and each goes to the side that would be
done with it first: the link, which brings it to the unit that computes it then, or the other unit, which has it in its
memory. With loads (tokens that chose an expert) the link takes the most loaded, since bringing costs the same whatever
the load, and the other unit the least loaded. `computed_there` is the same for equal loads; that the r-th missing
expert goes to one side whatever comes after it makes it a decision of the plan: rank r is always computed there.

`expected_misses` are the chances that at least r of n experts are missing, each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence


def computed_there(count: int, *, fetch: float, near: float, far: float, start: float = 0.0) -> tuple[bool, ...]:
    """Of the r-th missing expert (r = 1..count) whether it is computed where it lies.

    Seconds of one expert: `fetch` to bring it, `near` to compute it then, `far` to compute it there, and once `start`
    until the other unit has begun and given its results back.
    """
    link, unit, other, found = 0.0, 0.0, start, []
    for _ in range(count):
        arrived = max(link + fetch, unit) + near
        found.append(other + far <= arrived)
        if found[-1]:
            other += far
        else:
            link, unit = link + fetch, arrived
    return tuple(found)


def divide(
    loads: Sequence[int], *, fetch: float, near: Callable[[int], float], far: Callable[[int], float], start: float = 0.0
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(indices to bring, in that order; indices computed there) of missing experts with so many tokens each.

    `near` and `far` give the seconds of one expert with that many tokens on the unit and where it lies.
    """
    order = sorted(range(len(loads)), key=lambda i: (-loads[i], i))
    link, unit, other = 0.0, 0.0, start
    brought: list[int] = []
    there: list[int] = []
    first, last = 0, len(order) - 1
    while first <= last:
        heavy, light = loads[order[first]], loads[order[last]]
        arrived = max(link + fetch, unit) + near(heavy)
        if other + far(light) <= arrived:
            other += far(light)
            there.append(order[last])
            last -= 1
        else:
            link, unit = link + fetch, arrived
            brought.append(order[first])
            first += 1
    return tuple(brought), tuple(there)


def expected_misses(count: int, chance: float) -> tuple[float, ...]:
    """The chance that r or more of `count` experts are missing, r = 1..count, when each is with `chance`."""
    if chance <= 0.0:
        return (0.0,) * count
    if chance >= 1.0:
        return (1.0,) * count
    found, total, ways = [], 0.0, math.lgamma(count + 1)
    for r in range(count, 0, -1):
        log = ways - math.lgamma(r + 1) - math.lgamma(count - r + 1)
        total += math.exp(log + r * math.log(chance) + (count - r) * math.log1p(-chance))
        found.append(min(1.0, total))
    return tuple(reversed(found))
