"""One way to keep and compute a part, and how its seconds are counted.

`path` is what tokens wait for, in turn; `streams` run beside it. Both are kept by resource, so that a sum over parts
says what bounds a phase.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.target import ComputeUnit
from passes.place.parts import Part
from passes.place.problem import Problem

RESIDENT, STREAMED, CACHED, SPLIT = "resident", "streamed", "cached", "split"
Missed = Literal["", "sooner", "there"]  # who has missing experts: whoever is sooner, or always the helper
SOONER: Missed = "sooner"
THERE: Missed = "there"


@dataclass
class PhaseCost:
    """Seconds by resource. `unit_seconds` is the path by unit (what micro-batches overlap)."""

    path: dict[str, float] = field(default_factory=dict)
    streams: dict[str, float] = field(default_factory=dict)
    unit_seconds: dict[str, float] = field(default_factory=dict)

    def wait(self, unit: str, resource: str, seconds: float) -> None:
        """Time on the path of tokens, at `unit`."""
        if seconds:
            self.path[resource] = self.path.get(resource, 0.0) + seconds
            self.unit_seconds[unit] = self.unit_seconds.get(unit, 0.0) + seconds

    def beside(self, resource: str, seconds: float) -> None:
        """Time of a resource beside the path."""
        if seconds:
            self.streams[resource] = self.streams.get(resource, 0.0) + seconds

    @property
    def waited(self) -> float:
        return sum(self.path.values())


@dataclass(eq=False)
class Option:
    """One way for one part. `holds` is ((tier or storage, category, bytes), ...) of one layer, `buffer` one piece of a
    stream ((tier, bytes), ...), of which the plan keeps `depth`, shared by all layers."""

    part: Part
    unit: str
    home: str
    mode: str
    slots: int = 0
    kv_home: str = ""
    kv_unit: str = ""
    kv_old: int = 0  # positions of the cache, the oldest ones, that lie elsewhere (`passes.place.kv_division`)
    old_home: str = ""
    old_unit: str = ""
    kv_format: str = ""  # of the newest positions, where plans choose it (`passes.place.kv_formats`)
    old_format: str = ""
    helper: str = ""  # the unit that computes the rest of a split, or experts that a cache lacks
    missed: Missed = ""  # of a cache with a helper
    prefill_unit: str = ""
    holds: tuple[tuple[str, str, int], ...] = ()
    buffer: tuple[tuple[str, int], ...] = ()
    decode: PhaseCost = field(default_factory=PhaseCost)
    prefill: PhaseCost = field(default_factory=PhaseCost)
    hit: float = 1.0

    @property
    def cache(self) -> tuple[str, str, str]:
        """Where the newest positions are, who attends to them, and their format."""
        return self.kv_home, self.kv_unit, self.kv_format

    def unit_at(self, prefill: bool) -> str:
        """Who computes it: decode steps or prompts."""
        return self.prefill_unit if prefill and self.prefill_unit else self.unit

    @property
    def label(self) -> str:
        """All that tells it from the others of its part."""
        kv = f" kv={self.kv_home}@{self.kv_unit}" if self.kv_home else ""
        kv += f" old={self.kv_old}:{self.old_home}@{self.old_unit}" if self.kv_old else ""
        kv += f" in {self.kv_format}" if self.kv_format else ""
        kv += f" old in {self.old_format}" if self.old_format else ""
        slots = f" slots={self.slots}" if self.slots else ""
        rest = f" rest@{self.helper}" if self.helper else ""
        rest += f" {self.missed}" if self.missed else ""
        prefill = f" prefill@{self.prefill_unit}" if self.prefill_unit != self.unit else ""
        return f"{self.mode} {self.home}->{self.unit}{slots}{kv}{rest}{prefill}"


def keep_weights(option: Option, unit: ComputeUnit, nbytes: int, problem: Problem) -> None:
    """The bytes at home, and one piece of the stream where it passes through."""
    option.holds = ((option.home, "weights", nbytes),)
    part = option.part
    goals = dict.fromkeys(
        goal
        for u in dict.fromkeys((unit.name, option.prefill_unit))
        for _, goal in problem.machine.way(option.home, problem.machine.unit(u).tier) or ()
    )
    piece = nbytes if not part.experts else min(nbytes, part.slot_bytes(max(1, part.top_k)))
    option.buffer = tuple((goal, piece) for goal in goals)


def compute_part(
    problem: Problem,
    cost: PhaseCost,
    unit: ComputeUnit,
    part: Part,
    nbytes: float,
    rows: float,
    passes: int,
    share: float = 1.0,
) -> None:
    """The work of `rows` tokens, `passes` times over, on the path; of experts maybe a `share` of them."""
    each = rows / share * part.top_k / part.experts if part.experts else rows
    work = Work(part.flops_per_token * rows, part.element, ((unit.tier, nbytes),), launches=part.launches, rows=each)
    paid = price(work, unit, problem.machine.target)
    parts = dict(paid.parts)
    dispatch = parts.pop("dispatch", 0.0)
    bound = max(parts, key=lambda name: parts[name], default="dispatch")
    cost.wait(unit.name, bound, (paid.seconds - dispatch) * passes)
    cost.wait(unit.name, "dispatch", dispatch * passes)


def move_part(problem: Problem, cost: PhaseCost, home: str, tier: str, nbytes: float, part: Part) -> None:
    """Moving bytes beside the path."""
    block = part.expert_bytes or part.nbytes
    for source, goal in problem.machine.way(home, tier) or ():
        resource, seconds = transfer_time(problem.machine.target, source, goal, nbytes, block)
        cost.beside(resource, seconds)


def cross(problem: Problem, cost: PhaseCost, unit: str, first: str, second: str, nbytes: float, ways: int = 2) -> None:
    """Activations of `nbytes` together go from one memory to another, and with 2 ways come back: waited for."""
    target = problem.machine.target
    for source, goal in problem.machine.way(first, second) or ():
        link = target.link_between(source, goal)
        resource, seconds = transfer_time(target, source, goal, nbytes)
        cost.wait(unit, resource, seconds + ways * ((link.latency_seconds if link else None) or 0.0))


def blended(ways: Sequence[tuple[Option, float]]) -> Option:
    """One way for a part whose shares are kept in several (their shares add up to 1): all its figures are linear."""
    first = next((option for option, _ in ways if option.mode == STREAMED), ways[0][0])
    found = replace(first, holds=(), buffer=(), decode=PhaseCost(), prefill=PhaseCost())
    holds: dict[tuple[str, str], float] = {}
    buffer: dict[str, float] = {}
    for option, share in ways:
        for tier, category, nbytes in option.holds:
            holds[tier, category] = holds.get((tier, category), 0.0) + nbytes * share
        for tier, nbytes in option.buffer:
            buffer[tier] = buffer.get(tier, 0.0) + nbytes * share
        for mine, theirs in ((found.decode, option.decode), (found.prefill, option.prefill)):
            for total, one in (
                (mine.path, theirs.path),
                (mine.streams, theirs.streams),
                (mine.unit_seconds, theirs.unit_seconds),
            ):
                for name, seconds in one.items():
                    total[name] = total.get(name, 0.0) + seconds * share
    found.holds = tuple((tier, category, round(nbytes)) for (tier, category), nbytes in holds.items())
    found.buffer = tuple((tier, round(nbytes)) for tier, nbytes in buffer.items())
    return found
