"""Writes the plan of a placement op by op: stages in the order of a token, on their units, with what they stream.

    program = Emitter(problem, passes, buffers, "decode").run()

`passes` are the stages of each step of decoding, or of each chunk of a prompt. `most` says of each expert cache how
many are missing at most in what is asked about: the plan is then shorter and takes as long, without transfers that
never take place, the experts that are always there computed together. Every unit takes its stages in turn;
activations go to the next unit as a message where memories differ. Refuses placements in which two units stream through
one tier whose buffers have no room for a piece of each.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace

from hw_targets.cost_model import Work
from hw_targets.expert_outcomes import EARLY, LATE
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from passes.place.problem import Problem
from passes.schedule.placed_guesses import Guesses
from passes.schedule.placed_stages import KV_BLOCK_BYTES, Kept, Stage
from passes.schedule.placed_streams import Hops, Item, Unit, storable
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter


class Emitter(Guesses):
    """One plan in the making."""

    def __init__(
        self,
        problem: Problem,
        passes: Sequence[tuple[Stage, ...]],
        buffers: dict[str, int],
        name: str,
        batches: int,
        most: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__(problem.machine, StreamWriter(name))
        self.most = most or {}
        self.problem, self.passes, self.batches = problem, passes, batches
        self.every = [s for stages in passes for stage in stages for s in (stage, stage.beside) if s is not None]
        self.units = {s.unit: Unit(s.unit, problem.machine.unit(s.unit).tier) for s in self.every}
        self.act_bytes = max((s.entry_bytes for s in self.every), default=0)
        self.where: list[str] = [passes[0][0].unit] * batches
        self.last: list[Value | None] = [None] * batches
        self.messages = 0
        self.ahead = problem.session.ahead
        self.plan_guesses(passes)
        self.plan_items()
        self.share_rooms(buffers)

    def plan_items(self) -> None:
        """All that is streamed, in the order of use."""
        made = {s.new.made for s in self.every if s.new is not None}
        for step, stages in enumerate(self.passes):
            for number, stage in enumerate(stages):
                unit = self.units[stage.unit]
                unit.stored |= {chunk.made for chunk in stage.chunks} - made  # by passes before the first of this plan
                for i, chunk in enumerate(stage.chunks):
                    unit.todo.append(Item((step, number, i), chunk.name, chunk, self.way(chunk.home, unit.tier)))
                for k in range(self.batches if stage.cache_piece else 0):
                    kept = Kept(f"{stage.name}.{k}", stage.cache_home, stage.cache_piece, KV_BLOCK_BYTES)
                    unit.todo.append(Item((step, number, k), kept.name, kept, self.way(kept.home, unit.tier)))

    def needs(self) -> dict[str, dict[str, int]]:
        """The largest piece of each unit in each tier: tier -> unit -> bytes."""
        found: dict[str, dict[str, int]] = {}
        for unit in self.units.values():
            pieces = [(item.source.nbytes, item.hops) for item in unit.todo if not item.name.startswith("embedding.")]
            for stage in self.every:
                if stage.fetches and stage.unit == unit.name:
                    way = self.way(stage.chunk_home, unit.tier)
                    pieces.append((stage.expert_bytes, way))
                    unit.spare |= {goal: max(stage.expert_bytes, unit.spare.get(goal, 0)) for _, goal in way}
            for nbytes, hops in pieces:
                for _, goal in hops:
                    here = found.setdefault(goal, {})
                    here[unit.name] = max(here.get(unit.name, 0), nbytes)
        return found

    def share_rooms(self, buffers: dict[str, int]) -> None:
        """What each unit may take of each tier's buffers: all but the largest piece of each other unit."""
        for tier, by_unit in self.needs().items():
            for name, mine in by_unit.items():
                others = sum(nbytes for other, nbytes in by_unit.items() if other != name)
                room = buffers.get(tier, 0) - others
                if room < mine:
                    raise DiagnosticError(
                        f"the placement keeps {buffers.get(tier, 0)} bytes of {tier} for streams",
                        expected=f"{mine + others}: {' and '.join(by_unit)} stream through it at once",
                    )
                self.units[name].room[tier] = room if len(by_unit) == 1 else mine
                early = self.units[name].room[tier] - mine - self.units[name].spare.get(tier, 0)
                self.early_room[name] = max(0, min(early, self.early_room.get(name, early)))

    def run(self) -> FuncOp:
        self.declare()
        self.reserve()
        for step, stages in enumerate(self.passes):
            for number, stage in enumerate(stages):
                self.stage(step, number, stage)
        self.end()
        return self.writer.finish()

    def declare(self) -> None:
        for stage in self.every:
            for kept in (*stage.kept, *stage.chunks, *((stage.new,) if stage.new is not None else ())):
                self.writer.segment(Piece(kept.name, kept.nbytes, kept.home))
            for k in range(self.batches if stage.cache_home else 0):
                self.writer.segment(Piece(f"{stage.name}.{k}", stage.cache_piece, stage.cache_home))
                self.writer.segment(Piece(f"{stage.name}.{k}.new", stage.new_bytes, stage.cache_home))

    def reserve(self) -> None:
        """Activations of each unit, and what is left of its workspace."""
        sharing: dict[str, int] = {}
        for unit in self.units.values():
            sharing[unit.tier] = sharing.get(unit.tier, 0) + 1
        for unit in self.units.values():
            small = self.batches * self.act_bytes
            mine = [s for s in self.every if s.unit == unit.name]
            small += max((3 * s.new_bytes + (2 * s.new.nbytes if s.new is not None else 0) for s in mine), default=0)
            asked = max((s.beside.entry_bytes for s in mine if s.fetches and s.beside is not None), default=0)
            small += 2 * self.batches * asked
            small += 2 * max((c.nbytes for s in mine if s.name == "embedding" for c in s.chunks), default=0)
            for k in range(self.batches):
                unit.act.append(self.writer.slot(unit.name, unit.tier, self.act_bytes, f"{unit.name}.activations.{k}"))
                if asked:
                    unit.asked.append(self.writer.slot(unit.name, unit.tier, asked, f"{unit.name}.asked.{k}"))
                    unit.answer.append(self.writer.slot(unit.name, unit.tier, asked, f"{unit.name}.answer.{k}"))
            left = self.problem.workspace_bytes() // sharing[unit.tier] - small
            if left > 0:
                unit.workspace = self.writer.slot(unit.name, unit.tier, left, f"{unit.name}.workspace")

    def stage(self, step: int, number: int, stage: Stage) -> None:
        unit, batches = self.units[stage.unit], self.batches
        if stage.fetches:
            for k in range(batches):
                self.enter(stage, k)
                self.cached(stage, unit, k)
            return
        count = max(1, len(stage.chunks))
        resident = [self.writer.segments[kept.name] for kept in stage.kept if kept.home == unit.tier]
        beside: dict[int, Unit | None] = {}
        for i in range(count):
            item = self.bring(unit, (step, number, i)) if stage.chunks else None
            for k in range(batches):
                self.enter(stage, k)
                work = one_of(stage.work, count, first=i == 0)
                reads = [*resident, *(item.slots if item else [])]
                if stage.cache_home:
                    self.attend(stage, unit, k, self.bring(unit, (step, number, k)), work)
                else:
                    far = self.start_beside(stage, k) if i == 0 else None
                    new = self.new_slot(stage, unit) if i == count - 1 else None
                    self.compute(unit, stage.name, work, reads, k, new)
                    beside[k] = far if i == 0 else beside[k]
                    self.join(unit, beside[k] if i == count - 1 else None, k)
                    if new is not None and stage.new is not None:
                        self.send_home(unit, stage.new, new, keep=0)
            if item is not None:
                self.release(unit, item)

    def new_slot(self, stage: Stage, unit: Unit) -> Value | None:
        """Where the keys and values of a chunk are made that are at home elsewhere."""
        if stage.new is None:
            return None
        return self.writer.slot(unit.name, unit.tier, stage.new.nbytes, stage.new.name)

    def compute(
        self, unit: Unit, name: str, work: Work, reads: list[Value], k: int, new: Value | None = None,
        unless: tuple[str, int] = ("", 0),
    ) -> None:  # fmt: skip
        """A computation on the activations of a micro-batch; `unless` so many experts of a cache are missing."""
        self.sent(unit, k)
        source = self.units[self.where[k]]
        from_other = [source.act[k]] if source is not unit and source.tier == unit.tier else []
        writes = [unit.act[k], *([new] if new is not None else [])]
        cache, rank = unless
        self.last[k] = self.writer.compute(
            unit.name, name, work, [*reads, *from_other], writes, cache=cache, rank=rank, missing=not cache
        )
        self.where[k] = unit.name

    def enter(self, stage: Stage, k: int) -> None:
        """Brings the activations of a micro-batch to the unit of a stage."""
        source, unit = self.units[self.where[k]], self.units[stage.unit]
        if source is unit:
            return
        if source.tier == unit.tier:
            token = self.last[k]
            if token is not None:
                self.writer.wait(unit.name, token)
            return
        self.message(source, unit, stage.entry_bytes, k)
        self.where[k] = unit.name

    def message(self, source: Unit, unit: Unit, nbytes: int, k: int) -> None:
        tag, link = self.tag(), self.link(source, unit)
        self.sent(source, k)
        self.sent(unit, k)
        source.sending[k] = self.writer.send(source.name, unit.name, link, nbytes, tag, source.act[k])
        self.writer.wait(unit.name, self.writer.receive(unit.name, source.name, link, nbytes, tag, unit.act[k]))

    def tag(self) -> str:
        """A name for a message that no other has."""
        self.messages += 1
        return f"{self.messages - 1}"

    def link(self, source: Unit, unit: Unit) -> str:
        """What messages go over; of two links the last."""
        hops = self.way(source.tier, unit.tier)
        link = self.machine.target.link_between(*hops[-1])
        assert link is not None, f"no link between {hops[-1][0]} and {hops[-1][1]}"
        return link.name

    def sent(self, unit: Unit, k: int) -> None:
        """Waits until what was sent from a unit's activations has left."""
        token = unit.sending.pop(k, None)
        if token is not None:
            self.writer.wait(unit.name, token)

    def start_beside(self, stage: Stage, k: int) -> Unit | None:
        """Starts what another unit computes of a stage; `join` waits for it."""
        far = stage.beside
        if far is None:
            return None
        unit, helper = self.units[stage.unit], self.units[far.unit]
        self.message(unit, helper, far.entry_bytes, k)
        self.sent(helper, k)
        segments = [self.writer.segments[kept.name] for kept in far.kept]
        self.writer.compute(helper.name, far.name, far.work, segments, [helper.act[k]])
        return helper

    def join(self, unit: Unit, far: Unit | None, k: int) -> None:
        if far is not None:
            self.message(far, unit, self.act_bytes, k)

    def attend(self, stage: Stage, unit: Unit, k: int, item: Item, work: Work) -> None:
        """Attention over keys and values that were brought; the new ones go home."""
        writer = self.writer
        new = None
        if stage.new_bytes and storable(self.machine, stage.cache_home, unit.tier):
            new = writer.slot(unit.name, unit.tier, stage.new_bytes, f"{stage.name}.new")
        self.compute(unit, stage.name, work, item.slots, k, new)
        self.release(unit, item)
        if new is not None:
            kept = Kept(f"{stage.name}.{k}.new", stage.cache_home, stage.new_bytes, KV_BLOCK_BYTES)
            pending = any(going.name == kept.name for going, _, _ in unit.leaving)  # of the step before
            self.send_home(unit, kept, new, keep=0 if pending else 1)

    def cached(self, stage: Stage, unit: Unit, k: int) -> None:
        """The experts of a layer: those in the cache first, missing ones as they come, as many at once as fit.

        A rank that `there` says so of is the helper's when so many are missing, else the unit's."""
        self.drop_later(unit)
        cache, hops = f"{stage.name}.{LATE}", self.way(stage.chunk_home, unit.tier)
        held = self.writer.segments[f"{stage.name}.cache"]
        answer = self.ask_helper(stage, unit, cache, k)
        there = {rank for rank in range(1, stage.fetches + 1) if answer and stage.there[rank - 1]}
        most = self.most.get(cache, stage.fetches)
        early = self.guessed(unit, stage)
        first = stage.fetches - len(early)  # ranks above this one take what was brought early
        held_ones = 0  # experts above `most` that are still to be computed, all at once
        coming: deque[Item] = deque()
        waiting = deque(rank for rank in range(stage.fetches, 0, -1) if rank not in there)
        for rank in range(stage.fetches, 0, -1):
            while waiting and (not coming or self.has_room(unit, stage, hops)):
                if rank in there and not self.has_room(unit, stage, hops):
                    break  # it can wait: this one is no fetch
                if waiting[0] <= most:
                    held_ones = self.compute_held(stage, unit, k, rank, held_ones)
                coming.append(self.fetch_missing(stage, unit, waiting.popleft(), cache, hops))
            if stage.later in there and unit.later is None and not waiting and self.has_room(unit, stage, hops):
                if stage.later <= most:
                    held_ones = self.compute_held(stage, unit, k, rank, held_ones)
                unit.later = self.fetch_missing(stage, unit, stage.later, cache, hops), cache, stage.later
            if not waiting and self.may_guess(unit, stage):
                held_ones = self.compute_held(stage, unit, k, rank, held_ones)
                self.start_guessed(unit, stage)
            sooner = early[stage.fetches - rank] if rank > first else None
            if rank > most and sooner is None:
                held_ones += 1
            else:
                held_ones = self.compute_held(stage, unit, k, rank, held_ones)
            item = coming.popleft() if rank not in there else None
            if item is not None:
                self.arrive(unit, item, cache, rank)
            if sooner is not None:
                self.arrive(unit, sooner, f"{stage.name}.{EARLY}", stage.fetches - rank + 1)
            if rank <= most or sooner is not None:
                work = one_of(stage.work, stage.fetches, first=rank == stage.fetches)
                slots, unless = (item.slots, ("", 0)) if item is not None else ([], (cache, rank))
                slots = [*slots, *(sooner.slots if sooner is not None else ())]
                self.compute(unit, stage.name, work, [held, *slots], k, unless=unless)
            for done in (item, sooner):
                if done is not None:
                    self.leave(unit, done)
        self.compute_held(stage, unit, k, 0, held_ones)
        self.start_guessed(unit, stage)
        if answer:
            self.writer.wait(unit.name, *answer)
            self.compute(unit, f"{stage.name}.sum", Work(), [unit.answer[k]], k)

    def compute_held(self, stage: Stage, unit: Unit, k: int, rank: int, count: int) -> int:
        """The `count` experts before `rank` in one computation, all of them there; returns 0, what is left to do."""
        if count:
            work = one_of(stage.work, stage.fetches, first=rank + count == stage.fetches)
            held = self.writer.segments[f"{stage.name}.cache"]
            self.compute(unit, stage.name, times(work, count), [held], k)
        return 0

    def ask_helper(self, stage: Stage, unit: Unit, cache: str, k: int) -> tuple[Value, ...]:
        """Sends what missing experts are computed from to the unit that has them; the tokens of question and answer.

        Both have slots of their own, so that the unit goes on in the meantime."""
        far = stage.beside
        if far is None:
            return ()
        writer, helper = self.writer, self.units[far.unit]
        writer.compute(unit.name, f"{stage.name}.router", Work(), [unit.act[k]], [unit.asked[k]])
        self.sent(helper, k)
        question, link = self.tag(), self.link(unit, helper)
        asked = writer.send(unit.name, helper.name, link, far.entry_bytes, question, unit.asked[k])
        received = writer.receive(helper.name, unit.name, link, far.entry_bytes, question, helper.act[k])
        writer.wait(helper.name, received)
        work, most = far.work, self.most.get(cache, stage.fetches)
        for rank, there in enumerate(stage.there, 1):
            if there and rank <= most:
                expert = self.writer.segments[f"{stage.name}.missing.{rank - 1}"]
                writer.compute(helper.name, far.name, work, [expert], [helper.act[k]], cache=cache, rank=rank)
                work = replace(work, launches=0)
        reply, link = self.tag(), self.link(helper, unit)
        helper.sending[k] = writer.send(helper.name, unit.name, link, far.entry_bytes, reply, helper.act[k])
        return asked, writer.receive(unit.name, helper.name, link, far.entry_bytes, reply, unit.answer[k])

    def fetch_missing(self, stage: Stage, unit: Unit, rank: int, cache: str, hops: Hops) -> Item:
        kept = Kept(f"{stage.name}.missing.{rank - 1}", stage.chunk_home, stage.expert_bytes)
        item = Item((-1, rank), kept.name, kept, hops, absent=rank > self.most.get(cache, stage.fetches))
        for _, goal in hops:
            unit.room[goal] = unit.room.get(goal, 0) - stage.expert_bytes
        if not item.absent:
            self.hop(unit, item, 0, cache, rank)
        return item

    def has_room(self, unit: Unit, stage: Stage, hops: Hops) -> bool:
        return all(unit.room.get(goal, 0) >= stage.expert_bytes for _, goal in hops)

    def end(self) -> None:
        for unit in self.units.values():
            for k in list(unit.sending):
                self.sent(unit, k)
            self.let_go(unit)
            self.drop_later(unit)
            for other in self.last:
                if other is not None:
                    self.writer.wait(unit.name, other)
            workspace = [unit.workspace] if unit.workspace is not None else []
            self.writer.evict(unit.name, *unit.act, *unit.asked, *unit.answer, *workspace)


def one_of(work: Work, count: int, first: bool) -> Work:
    """One of `count` equal parts of some work: the kernels are started once, with the first."""
    traffic = tuple((tier, nbytes / count) for tier, nbytes in work.traffic)
    return Work(work.flops / count, work.element, traffic, launches=work.launches if first else 0, rows=work.rows)


def times(work: Work, count: int) -> Work:
    """`count` equal parts of some work as one, in the whole numbers that a plan has of each: started once."""
    traffic = tuple((tier, float(count * round(nbytes))) for tier, nbytes in work.traffic)
    return Work(float(count * round(work.flops)), work.element, traffic, launches=work.launches, rows=work.rows)
