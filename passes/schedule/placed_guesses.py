"""Experts that are brought before their layer asks for them: guessed by its router on the input of the layer before.

`Guesses` is the part of the emitter of placements (`passes.schedule.placed_emitter`) that starts these fetches and
hands out what they brought. The two inputs differ by what one layer adds, so that most guesses come true (Fate,
arXiv:2502.12224); the runtime guesses the same way (`runtime.expert_guess`). The fetches stand behind those that the
layer in front waits for itself. The r-th takes place when r or more experts of the next layer's cache were guessed to
be missing; of the layer's computations the first ones take what they brought, those still coming late the last ones.

Up to `Session.ahead` experts, as many as there is room for beside the largest piece that the unit streams and one
missing expert. Not where a helper computes missing experts, where micro-batches take turns, or where units share the
room; the first layer with experts has none before it that could guess.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hw_targets.expert_outcomes import EARLY
from passes.schedule.placed_stages import Kept, Stage
from passes.schedule.placed_streams import Item, Streams, Unit


class Guesses(Streams):
    """Writes the early fetches of all units."""

    ahead: int = 0
    batches: int = 1

    def plan_guesses(self, passes: Sequence[tuple[Stage, ...]]) -> None:
        """Which stage is guessed by which; `self.early` says how many experts of each cache are brought at most."""
        self.guessed_by: dict[int, Stage] = {}
        self.early: dict[str, int] = {}
        self.early_room: dict[str, int] = {}  # unit -> bytes that early experts may take of every tier
        if self.ahead < 1 or self.batches > 1:
            return
        for stages in passes:
            caches = [stage for stage in stages if stage.fetches]
            for before, after in itertools.pairwise(caches):
                alike = (before.unit, before.chunk_home) == (after.unit, after.chunk_home)
                if alike and before.beside is None and after.beside is None:
                    self.guessed_by[id(before)] = after

    def may_guess(self, unit: Unit, stage: Stage) -> bool:
        """Whether an expert of the next layer with experts may be brought now."""
        after = self.guessed_by.get(id(stage))
        if after is None:
            return False
        most = min(self.ahead, after.fetches, self.early_room.get(unit.name, 0) // max(1, after.expert_bytes))
        hops, nbytes = self.way(after.chunk_home, unit.tier), after.expert_bytes
        room = all(unit.room.get(goal, 0) >= nbytes + unit.spare.get(goal, 0) for _, goal in hops)
        return room and len(unit.guessed.get(after.name, ())) < most

    def start_guessed(self, unit: Unit, stage: Stage) -> None:
        """Starts what is guessed at a stage and not yet under way, as far as there is room now."""
        while self.may_guess(unit, stage):
            after = self.guessed_by[id(stage)]
            items = unit.guessed.setdefault(after.name, [])
            rank, hops = len(items) + 1, self.way(after.chunk_home, unit.tier)
            kept = Kept(f"{after.name}.missing.{rank - 1}", after.chunk_home, after.expert_bytes)
            item = Item((-2, rank), kept.name, kept, hops)
            for _, goal in hops:
                unit.room[goal] = unit.room.get(goal, 0) - after.expert_bytes
            self.hop(unit, item, 0, f"{after.name}.{EARLY}", rank)
            items.append(item)

    def guessed(self, unit: Unit, stage: Stage) -> list[Item]:
        """What was brought early for a stage, the surest first; from now on the stage's own."""
        found = unit.guessed.pop(stage.name, [])
        if self.guessed_by:
            self.early[stage.name] = min(len(found), self.early.get(stage.name, len(found)))
        return found
