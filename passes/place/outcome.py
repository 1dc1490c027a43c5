"""What a choice of options amounts to: seconds and bound of both phases, bytes of every tier, exactly.

    outcome = evaluate(problem, choice)     # choice: ((option, layers), ...) of all parts
    outcome.decode.seconds, outcome.decode.bound, outcome.fits

A phase lasts as long as its slowest resource, and at least as long as what tokens wait for in turn. With micro-batches
a unit works while others do: then the path is that of the busiest unit, and one micro-batch's turn of the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

from passes.place.crossings import crossings, one_way
from passes.place.option import Option, PhaseCost
from passes.place.problem import Problem

Choice = tuple[tuple[Option, int], ...]
CATEGORIES = ("weights", "cache", "kv", "activations", "buffers")


@dataclass(frozen=True)
class PhaseOutcome:
    """Seconds of a phase, the resource that decides them, and seconds that every resource is busy."""

    seconds: float
    bound: str
    busy: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class TierUse:
    """Bytes in one tier or storage by category, beside the room a plan may use."""

    name: str
    room: int
    used: tuple[tuple[str, int], ...]

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.used)


@dataclass(frozen=True)
class Outcome:
    """All that a plan promises."""

    decode: PhaseOutcome
    prefill: PhaseOutcome
    tiers: tuple[TierUse, ...]
    objective: float

    @property
    def fits(self) -> bool:
        return all(tier.total <= tier.room for tier in self.tiers)

    def tier(self, name: str) -> TierUse:
        return next(t for t in self.tiers if t.name == name)


def objective(problem: Problem, decode: float, prefill: float) -> float:
    """What is made small: the time of all sequences of the session, prompts one after the other (or `prompts`)."""
    return problem.session.batch / problem.session.prompts * prefill + problem.session.generate * decode


def by_part(choice: Choice) -> dict[tuple[str, int], list[tuple[Option, int]]]:
    """The options of each part, however it is stored, in the order of the choice."""
    found: dict[tuple[str, int], list[tuple[Option, int]]] = {}
    for option, count in choice:
        found.setdefault(option.part.key, []).append((option, count))
    return found


def evaluate(problem: Problem, choice: Choice) -> Outcome:
    """The outcome of a choice, to the last digit the same in whatever order its options come."""
    choice = tuple(sorted(choice, key=lambda entry: (entry[0].part.key, entry[0].label)))
    decode, prefill = PhaseCost(), PhaseCost()
    for option, count in choice:
        _add(decode, option.decode, count)
        _add(prefill, option.prefill, count)
    for cost, extra in ((decode, problem.together_decode), (prefill, problem.together_prefill)):
        for resource, seconds in extra:
            cost.wait(problem.machine.units[0].name, resource, seconds)
    options, layers = [option for option, _ in choice], [count for _, count in choice]
    for cost, at_prefill in ((decode, False), (prefill, True)):
        way, moved = one_way(problem, decode=not at_prefill), dict[str, int]()
        for crossing in crossings(problem, options, at_prefill):
            moved[crossing.place] = moved.get(crossing.place, 0) + crossing.count(layers)
        resource, seconds = way or ("", 0.0)
        for place in sorted(moved):  # whatever the order of the options
            cost.wait(f"crossing {place}", resource, seconds * moved[place])
    found = phase(decode, problem.session.micro_batches), phase(prefill, 1)
    value = objective(problem, found[0].seconds, found[1].seconds)
    return Outcome(*found, tier_use(problem, choice), value)


def phase(cost: PhaseCost, micro_batches: int) -> PhaseOutcome:
    """The length of a phase and what decides it."""
    busy: dict[str, float] = dict(cost.streams)
    for resource, seconds in cost.path.items():
        busy[resource] = busy.get(resource, 0.0) + seconds
    total = cost.waited
    longest = max(cost.unit_seconds.values(), default=0.0)
    path = longest + (total - longest) / max(1, micro_batches)
    slowest = max(busy, key=lambda name: busy[name], default="nothing")
    ordered = tuple(sorted(busy.items(), key=lambda item: (-item[1], item[0])))
    if busy.get(slowest, 0.0) >= path:
        return PhaseOutcome(busy.get(slowest, 0.0), slowest, ordered)
    bound = max(cost.path, key=lambda name: cost.path[name], default="nothing")
    return PhaseOutcome(path, bound, ordered)


def workspaces(problem: Problem) -> dict[str, int]:
    """Bytes of activations in the memory of every unit."""
    return dict.fromkeys((u.tier for u in problem.machine.units), problem.workspace_bytes())


def tier_use(problem: Problem, choice: Choice) -> tuple[TierUse, ...]:
    """Bytes of every tier and storage."""
    used: dict[str, dict[str, int]] = {name: {} for name, _ in problem.machine.room}
    pieces: dict[str, list[tuple[int, bool]]] = {}
    for option, count in choice:
        for tier, category, nbytes in option.holds:
            used[tier][category] = used[tier].get(category, 0) + nbytes * count
        for tier, nbytes in option.buffer if count else ():
            pieces.setdefault(tier, []).append((nbytes, bool(option.part.layers)))
    for tier, found in pieces.items():
        used[tier]["buffers"] = buffer_bytes(found, problem.session.depth)
    for tier, nbytes in workspaces(problem).items():
        used[tier]["activations"] = nbytes
    return tuple(
        TierUse(name, room, tuple((c, used[name][c]) for c in CATEGORIES if used[name].get(c)))
        for name, room in problem.machine.room
    )


def buffer_bytes(pieces: list[tuple[int, bool]], depth: int) -> int:
    """Room for the piece in use and those on their way. `pieces` are (bytes, whether layers repeat it).

    The head comes once in a step, so that what is on its way behind it is a layer's piece.
    """
    ahead = max((nbytes for nbytes, repeats in pieces if repeats), default=0)
    return max(nbytes for nbytes, _ in pieces) + (depth - 1) * ahead


def _add(total: PhaseCost, one: PhaseCost, count: int) -> None:
    for mine, theirs in (
        (total.path, one.path),
        (total.streams, one.streams),
        (total.unit_seconds, one.unit_seconds),
    ):
        for name, seconds in theirs.items():
            mine[name] = mine.get(name, 0.0) + seconds * count
