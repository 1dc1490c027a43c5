"""A change that was tried and what it buys; a target with a little more of one resource.

    Gain("+1 GiB of vram", decode=7.3e-3, prefill=0.034, saved=0.022)
    with_rate(target, "vram read")     # (the target with 10 GB/s more of it, "10 GB/s")

`passes.place.what_if` tries changes of one machine, `passes.place.parallel_what_if` those of many devices.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from hw_targets.target import Storage, Target

GIB = 1 << 30
RATE = 10e9
_DISK_RATE = 1e9


@dataclass(frozen=True)
class Gain:
    """The lengths of both phases with a change, and the share of a session's time that it saves.

    Where the batch is chosen too, `batch` is the one with the change, and `saved` is of the time of a token.
    """

    what: str
    decode: float
    prefill: float
    saved: float
    batch: int | None = None


def with_rate(target: Target, resource: str) -> tuple[Target, str] | None:
    """The target with a little more of a named resource, and how much; None for what is no rate of bytes."""
    name, _, rest = resource.partition(" ")
    tier = target.tier(name) if name else None
    if rest == "read" and tier is not None and tier.read_bandwidth is not None:
        points = tuple((threads, rate + RATE) for threads, rate in tier.read_by_threads)
        changed = dataclasses.replace(tier, read_bandwidth=tier.read_bandwidth + RATE, read_by_threads=points)
        tiers = tuple(changed if t.name == name else t for t in target.tiers)
        return dataclasses.replace(target, tiers=tiers), "10 GB/s"
    store = target.store(name) if name else None
    if rest == "read" and store is not None and store.points:
        return dataclasses.replace(
            target, storage=tuple(_faster(s) if s.name == name else s for s in target.storage)
        ), "1 GB/s"
    link = next((x for x in target.links if x.name == name), None)
    if link is not None and link.bandwidth is not None:
        back = None if link.back_bandwidth is None else link.back_bandwidth + RATE
        changed = dataclasses.replace(link, bandwidth=link.bandwidth + RATE, back_bandwidth=back)
        return dataclasses.replace(target, links=tuple(changed if x is link else x for x in target.links)), "10 GB/s"
    return None


def _faster(store: Storage) -> Storage:
    """Every point faster in the proportion that adds 1 GB/s to the best."""
    best = max(p.read_bandwidth for p in store.points)
    factor = (best + _DISK_RATE) / best
    points = tuple(dataclasses.replace(p, read_bandwidth=p.read_bandwidth * factor) for p in store.points)
    return dataclasses.replace(store, points=points)
