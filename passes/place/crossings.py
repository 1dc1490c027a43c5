"""How often activations go from one memory to another in a pass: the least that any order of the layers allows.

    for crossing in crossings(problem, options, at_prefill=False): crossing.count(counts)
    resource, seconds = one_way(problem, decode=True)      # what each of them takes

A token passes attention, MLP and experts of a layer in turn, then the next layer; it leaves attention where the newest
keys and values are attended to. Equal layers have no order here: of a part at least as many layers are entered from
another memory as the part before has layers too many in that one. What the last parts of layers leave there is taken up
by attention or, where all tokens come to it, by the head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hw_targets.cost_model import transfer_time
from passes.place.option import Option
from passes.place.problem import Problem

_GROUPS = ("attention", "mlp", "experts")


@dataclass(frozen=True)
class Crossing:
    """Crossings out of one memory behind a part of layers: `left` there by options (their indices, one for each layer),
    `taken` up there by others; `free` is one that does not count."""

    place: str
    left: tuple[int, ...]
    taken: tuple[int, ...]
    free: int

    def count(self, layers: Sequence[int]) -> int:
        """How many, with so many layers of each option."""
        return max(0, sum(layers[at] for at in self.left) - sum(layers[at] for at in self.taken) - self.free)


def crossings(problem: Problem, options: Sequence[Option], at_prefill: bool) -> list[Crossing]:
    """All places where activations may change memories, in a fixed order. Empty with one memory only."""
    tier_of = {unit.name: unit.tier for unit in problem.machine.units}
    if len(dict.fromkeys(tier_of.values())) < 2:
        return []
    parts: dict[tuple[int, str], list[int]] = {}
    for at, option in enumerate(options):
        parts.setdefault((option.part.kind, option.part.group), []).append(at)
    kinds = dict.fromkeys(kind for kind, _ in parts if kind >= 0)
    chains = {kind: [parts[kind, group] for group in _GROUPS if (kind, group) in parts] for kind in kinds}
    places = [(f"kind {kind}", before, after, 0) for kind in kinds for before, after in pairwise(chains[kind])]
    last = [at for chain in chains.values() for at in chain[-1]]
    first = [at for chain in chains.values() for at in chain[0]]
    heads = [] if at_prefill else parts.get((-1, "head"), [])
    places.append(("layers", last, [*first, *heads], int(at_prefill)))

    found = []
    for place, before, after, free in places:
        leaving = {at: tier_of[options[at].kv_unit or options[at].unit_at(at_prefill)] for at in before}
        entering = {at: tier_of[options[at].unit_at(at_prefill)] for at in after}
        for tier in dict.fromkeys(leaving.values()):
            left = tuple(at for at, here in leaving.items() if here == tier)
            taken = tuple(at for at, here in entering.items() if here == tier)
            found.append(Crossing(place, left, taken, free))
    return found


def one_way(problem: Problem, *, decode: bool) -> tuple[str, float] | None:
    """(resource, seconds) of a layer's activations going to another memory, the fastest way; None without any.

    Over two links only the second one is counted."""
    rows = problem.session.batch if decode else problem.session.prompt_rows
    nbytes = rows * problem.shape.hidden * 2
    target, best = problem.machine.target, None
    for source in dict.fromkeys(unit.tier for unit in problem.machine.units):
        for goal in dict.fromkeys(unit.tier for unit in problem.machine.units):
            hops = problem.machine.way(source, goal) if source != goal else None
            if hops:
                link = target.link_between(*hops[-1])
                resource, seconds = transfer_time(target, *hops[-1], nbytes)
                seconds += (link.latency_seconds if link else None) or 0.0
                if best is None or seconds < best[1]:
                    best = resource, seconds
    return best
