"""Max-min fair sharing of resources among flows, each of which may need several resources at once.

A flow moves `weight` bytes (or does other work of that size) and takes `seconds` of each resource it uses, were it the
only one there. All flows grow at the same rate in bytes/s until one reaches its own limit or a resource is full; that
one is frozen and the others go on growing. At the end no flow can get more without taking from one that has less
(Bertsekas and Gallager, Data Networks, 6.5.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False, slots=True)
class Resource:
    """Something that serves flows. `active` are those it serves now; `used` its time at full speed so far."""

    name: str
    active: dict[Flow, None] = field(default_factory=dict)
    used: float = 0.0


@dataclass(eq=False, slots=True)
class Flow:
    """`uses` are (resource, seconds of it) of the whole flow, `alone` the least seconds it takes by itself.

    `rate` is the share of the whole that is done in a second, `limit` the name of what keeps it from being faster.
    """

    task: int
    label: str
    alone: float
    weight: float
    uses: tuple[tuple[Resource, float], ...]
    remaining: float = 1.0
    rate: float = 0.0
    updated: float = 0.0
    version: int = 0
    limit: str = ""
    limits: dict[str, float] = field(default_factory=dict)


def share(flows: Sequence[Flow]) -> list[tuple[float, str]]:
    """(rate, what limits it) of each flow. All flows of every resource that is used must be among `flows`."""
    if len(flows) == 1:
        return [_alone(flows[0])]
    found: list[tuple[float, str]] = [(0.0, "")] * len(flows)
    still = dict.fromkeys(range(len(flows)))  # not frozen yet, in order
    users: dict[Resource, list[tuple[int, float]]] = {}
    for i, flow in enumerate(flows):
        for resource, seconds in flow.uses:
            if seconds > 0.0:
                users.setdefault(resource, []).append((i, seconds / flow.weight))
    left = dict.fromkeys(users, 1.0)
    while still:
        level = min(flows[i].weight / flows[i].alone for i in still)
        full: Resource | None = None
        for resource, takes in users.items():
            load = sum(c for i, c in takes if i in still)
            if load > 0.0 and left[resource] / load < level * (1 - 1e-12):
                level, full = left[resource] / load, resource
        if full is None:
            now = [i for i in still if flows[i].weight / flows[i].alone <= level]
        else:
            now = [i for i, _ in users[full] if i in still]
        for i in now:
            flow = flows[i]
            del still[i]
            found[i] = (level / flow.weight, flow.label if full is None else limit_name(flow, full))
            for resource, seconds in flow.uses:
                if seconds > 0.0:
                    left[resource] = max(0.0, left[resource] - level * seconds / flow.weight)
    return found


def _alone(flow: Flow) -> tuple[float, str]:
    slowest, label = flow.alone, flow.label
    for resource, seconds in flow.uses:
        if seconds > slowest * (1 + 1e-12):
            slowest, label = seconds, limit_name(flow, resource)
    return 1.0 / slowest, label


def limit_name(flow: Flow, resource: Resource) -> str:
    """What to call a full resource: as the flow calls it (`hbm read`) where it is the same one (`hbm[3]`)."""
    return flow.label if _first_word(flow.label) == _first_word(resource.name) else resource.name


def _first_word(name: str) -> str:
    return name.split(" ", 1)[0].split("[", 1)[0]
