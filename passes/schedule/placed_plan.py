"""A decode step of a placement as a streaming plan: the same decisions, op by op, to be proven and simulated.

    plan = placed_plan(problem, choice, steps=2)
    check_stream(plan.program, problem.machine.target, dict(problem.machine.room))
    seconds = step_seconds(problem, choice)       # simulated, beside placement.decode.seconds of the closed form

Every unit takes its stages in the order of a token; activations go to the next unit as a message where memories differ.
What a placement streams comes through slots, as many as the buffers that it counts have room for: one piece in use and
`depth - 1` ahead, or more smaller ones; over two links through a slot between. Missing experts are fetched when they
are known and computed in order of arrival. Drives are asked with as many requests at once as they were measured with.
Activations that pass two links are charged the second; new keys and values go home where that is one link.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import numpy as np

from hw_targets.cost_model import Work
from hw_targets.expert_outcomes import LATE, from_hit_rates, from_misses, simulate_steps
from hw_targets.simulator import Simulator
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp
from passes.place.outcome import Choice, tier_use
from passes.place.problem import Problem
from passes.schedule.placed_stages import KV_BLOCK_BYTES, Kept, Stage, decode_stages
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter


@dataclass(frozen=True)
class PlacedPlan:
    """The plan of `steps` steps, and the expert caches that it asks: (name, most missing, hit rate)."""

    program: FuncOp
    caches: tuple[tuple[str, int, float], ...]


def placed_plan(problem: Problem, choice: Choice, steps: int = 1, *, order: str = "units") -> PlacedPlan:
    """The plan of a choice, its layers in one of the orders of `decode_stages`.

    Raises DiagnosticError where the streams of two units need one tier's buffers at once."""
    stages = decode_stages(problem, choice, order)
    emitter = _Emitter(problem, stages, steps, _buffers(problem, choice))
    return PlacedPlan(emitter.run(), tuple((f"{s.name}.{LATE}", s.fetches, s.hit) for s in stages if s.fetches))


def step_seconds(problem: Problem, choice: Choice, *, samples: int = 32, seed: int = 0, order: str = "units") -> float:
    """Simulated seconds of a decode step that follows another; expert misses are drawn by the expected hit rates."""
    times = []
    for steps in (1, 2):
        plan = placed_plan(problem, choice, steps, order=order)
        simulator = Simulator(plan.program, problem.machine.target)
        if not plan.caches:
            times.append(simulator.run().seconds)
            continue
        names = [name.removesuffix(f".{LATE}") for name, _, _ in plan.caches]
        drawn = [from_hit_rates([hit], most, samples, seed + i) for i, (_, most, hit) in enumerate(plan.caches)]
        times.append(simulate_steps(simulator, from_misses(np.concatenate(drawn, axis=1), names)).mean)
    return times[1] - times[0]


def _buffers(problem: Problem, choice: Choice) -> dict[str, int]:
    """Bytes that the placement keeps for streams, by tier."""
    return {t.name: dict(t.used).get("buffers", 0) for t in tier_use(problem, choice)}


Hops = tuple[tuple[str, str], ...]  # (from, to) of each


@dataclass
class _Item:
    """A piece on its way to a unit: the slots it has taken and its last token."""

    key: tuple[int, ...]
    name: str
    source: Kept
    hops: Hops
    slots: list[Value] = field(default_factory=list)
    token: Value | None = None


@dataclass
class _Unit:
    """What one unit has under way."""

    name: str
    tier: str
    todo: deque[_Item] = field(default_factory=deque)
    active: dict[tuple[int, ...], _Item] = field(default_factory=dict)
    room: dict[str, int] = field(default_factory=dict)
    spare: dict[str, int] = field(default_factory=dict)  # of that, kept free for a missing expert
    act: list[Value] = field(default_factory=list)  # activations of each micro-batch
    sending: dict[int, Value] = field(default_factory=dict)
    leaving: list[tuple[str, Value, Value]] = field(default_factory=list)  # what goes home: name, slot, token
    workspace: Value | None = None


class _Emitter:
    def __init__(self, problem: Problem, stages: tuple[Stage, ...], steps: int, buffers: dict[str, int]) -> None:
        self.problem, self.stages, self.steps = problem, stages, steps
        self.writer = StreamWriter("decode")
        session = problem.session
        self.batches = min(session.micro_batches, session.batch)
        every = [s for stage in stages for s in (stage, stage.beside) if s is not None]
        self.units = {s.unit: _Unit(s.unit, problem.machine.unit(s.unit).tier) for s in every}
        self.act_bytes = max((s.entry_bytes for s in every), default=0)
        self.where: list[str] = [stages[0].unit] * self.batches
        self.last: list[Value | None] = [None] * self.batches
        self.messages = 0
        self.plan_items()
        self.share_rooms(buffers)

    # -- before the first op -----------------------------------------------------------------------------------------

    def plan_items(self) -> None:
        """All that is streamed, in the order of use."""
        for step in range(self.steps):
            for number, stage in enumerate(self.stages):
                unit = self.units[stage.unit]
                for i, chunk in enumerate(stage.chunks):
                    unit.todo.append(_Item((step, number, i), chunk.name, chunk, self.way(chunk.home, unit.tier)))
                for k in range(self.batches if stage.cache_piece else 0):
                    kept = Kept(f"{stage.name}.{k}", stage.cache_home, stage.cache_piece, KV_BLOCK_BYTES)
                    unit.todo.append(_Item((step, number, k), kept.name, kept, self.way(kept.home, unit.tier)))

    def way(self, home: str, tier: str) -> Hops:
        hops = self.problem.machine.way(home, tier)
        assert hops is not None, f"nothing leads from {home} to {tier}"
        return hops

    def needs(self) -> dict[str, dict[str, int]]:
        """The largest piece of each unit in each tier: tier -> unit -> bytes."""
        found: dict[str, dict[str, int]] = {}
        for unit in self.units.values():
            pieces = [(item.source.nbytes, item.hops) for item in unit.todo if item.name != "embedding.rows"]
            for stage in self.stages:
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

    # -- the plan ----------------------------------------------------------------------------------------------------

    def run(self) -> FuncOp:
        self.declare()
        self.reserve()
        for step in range(self.steps):
            for number, stage in enumerate(self.stages):
                self.stage(step, number, stage)
        self.end()
        return self.writer.finish()

    def declare(self) -> None:
        for stage in self.stages:
            for one in (stage, stage.beside):
                for kept in (*one.kept, *one.chunks) if one is not None else ():
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
            small += 3 * max((s.new_bytes for s in self.stages if s.unit == unit.name), default=0)
            small += sum(c.nbytes for s in self.stages[:1] if s.unit == unit.name for c in s.chunks) * 2
            for k in range(self.batches):
                unit.act.append(self.writer.slot(unit.name, unit.tier, self.act_bytes, f"{unit.name}.activations.{k}"))
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
        for i in range(count):
            item = self.bring(unit, (step, number, i)) if stage.chunks else None
            for k in range(batches):
                self.enter(stage, k)
                work = _part(stage.work, count, first=i == 0)
                reads = [*resident, *(item.slots if item else [])]
                if stage.cache_home:
                    self.attend(stage, unit, k, self.bring(unit, (step, number, k)), work)
                else:
                    far = self.start_beside(stage, k)
                    self.compute(unit, stage.name, work, reads, k)
                    self.join(unit, far, k)
            if item is not None:
                self.release(unit, item)

    def compute(self, unit: _Unit, name: str, work: Work, reads: list[Value], k: int, new: Value | None = None) -> None:
        self.sent(unit, k)
        source = self.units[self.where[k]]
        from_other = [source.act[k]] if source is not unit and source.tier == unit.tier else []
        writes = [unit.act[k], *([new] if new is not None else [])]
        self.last[k] = self.writer.compute(unit.name, name, work, [*reads, *from_other], writes)
        self.where[k] = unit.name

    # -- activations -------------------------------------------------------------------------------------------------

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

    def message(self, source: _Unit, unit: _Unit, nbytes: int, k: int) -> None:
        hops = self.way(source.tier, unit.tier)
        link = self.problem.machine.target.link_between(*hops[-1])
        assert link is not None, f"no link between {hops[-1][0]} and {hops[-1][1]}"
        tag = f"{self.messages}"
        self.messages += 1
        self.sent(source, k)
        self.sent(unit, k)
        source.sending[k] = self.writer.send(source.name, unit.name, link.name, nbytes, tag, source.act[k])
        self.writer.wait(unit.name, self.writer.receive(unit.name, source.name, link.name, nbytes, tag, unit.act[k]))

    def sent(self, unit: _Unit, k: int) -> None:
        """Waits until what was sent from a unit's activations has left."""
        token = unit.sending.pop(k, None)
        if token is not None:
            self.writer.wait(unit.name, token)

    def start_beside(self, stage: Stage, k: int) -> _Unit | None:
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

    def join(self, unit: _Unit, far: _Unit | None, k: int) -> None:
        if far is not None:
            self.message(far, unit, self.act_bytes, k)

    # -- what is streamed --------------------------------------------------------------------------------------------

    def bring(self, unit: _Unit, key: tuple[int, ...]) -> _Item:
        """The item that is needed now, arrived; those behind it are on their way as far as there is room."""
        while key not in unit.active:
            self.start(unit, unit.todo.popleft())
        self.fill(unit)
        item = unit.active[key]
        self.arrive(unit, item)
        return item

    def fill(self, unit: _Unit) -> None:
        """Starts the next items, as many as there is room for."""
        while unit.todo and self.fits(unit, unit.todo[0]):
            self.start(unit, unit.todo.popleft())

    def fits(self, unit: _Unit, item: _Item) -> bool:
        """Whether its first slot has room now, and the later ones beside what is in use."""
        return all(unit.room.get(goal, 0) >= item.source.nbytes + unit.spare.get(goal, 0) for _, goal in item.hops)

    def start(self, unit: _Unit, item: _Item) -> None:
        unit.active[item.key] = item
        for _, goal in item.hops:  # the whole way is reserved in advance, so no item waits for a later one
            unit.room[goal] = unit.room.get(goal, 0) - item.source.nbytes
        self.hop(unit, item, 0)

    def hop(self, unit: _Unit, item: _Item, number: int, cache: str = "", rank: int = 0) -> None:
        source, goal = item.hops[number]
        slot = self.writer.slot(unit.name, goal, item.source.nbytes, item.name)
        piece = self.piece(item, source, goal)
        held = item.slots[-1] if number else None
        if held is not None:  # a queue of its own: it is needed before what was asked for further ahead
            piece = replace(piece, stream="second")
        item.token = self.writer.fetch(unit.name, piece, slot, cache, rank, held)
        item.slots.append(slot)

    def piece(self, item: _Item, source: str, goal: str) -> Piece:
        """A piece with the link or storage that brings it."""
        target = self.problem.machine.target
        store = target.store(source) if target.tier(source) is None else None
        if store is not None:  # as many requests at once as the drive was measured with: placements count on its best
            deepest = max((p.queue_depth for p in store.points), default=1)
            return Piece(item.name, item.source.nbytes, item.source.home, source, "", item.source.block, deepest)
        link = target.link_between(source, goal)
        assert link is not None, f"no link between {source} and {goal}"
        return Piece(item.name, item.source.nbytes, item.source.home, link.name)

    def arrive(self, unit: _Unit, item: _Item, cache: str = "", rank: int = 0) -> None:
        """Takes an item over its last hops; of its slots the last one is left."""
        while True:
            assert item.token is not None
            self.writer.wait(unit.name, item.token)
            if len(item.slots) > 1:
                self.free(unit, item, item.slots.pop(0), item.hops[0][1])
                item.hops = item.hops[1:]
            if len(item.hops) == 1:
                return
            self.hop(unit, item, 1, cache, rank)

    def free(self, unit: _Unit, item: _Item, slot: Value, tier: str) -> None:
        self.writer.evict(unit.name, slot)
        unit.room[tier] = unit.room.get(tier, 0) + item.source.nbytes

    def release(self, unit: _Unit, item: _Item) -> None:
        """Frees what was used; its place is for the next ones."""
        del unit.active[item.key]
        self.free(unit, item, item.slots[0], item.hops[-1][1])
        self.fill(unit)
        following = next(iter(unit.active.values()), None)
        if following is not None and following.token is not None and len(following.hops) > len(following.slots):
            self.writer.wait(unit.name, following.token)
            self.hop(unit, following, 1)

    def attend(self, stage: Stage, unit: _Unit, k: int, item: _Item, work: Work) -> None:
        """Attention over keys and values that were brought; the new ones go home."""
        writer = self.writer
        hops = self.way(stage.cache_home, unit.tier)
        new = None
        if stage.new_bytes and len(hops) == 1 and self.writable(hops[0][0]):
            new = writer.slot(unit.name, unit.tier, stage.new_bytes, f"{stage.name}.new")
        self.compute(unit, stage.name, work, item.slots, k, new)
        self.release(unit, item)
        if new is not None:
            name = f"{stage.name}.{k}.new"
            over = self.piece(
                _Item((), name, Kept(name, stage.cache_home, stage.new_bytes, KV_BLOCK_BYTES), hops), *hops[0]
            )
            pending = any(going == name for going, _, _ in unit.leaving)  # of the step before
            self.let_go(unit, keep=0 if pending else 1)
            unit.leaving.append((name, new, writer.store(unit.name, new, over)))

    def writable(self, source: str) -> bool:
        store = self.problem.machine.target.store(source) if self.problem.machine.target.tier(source) is None else None
        return store is None or store.write_rate() is not None

    def cached(self, stage: Stage, unit: _Unit, k: int) -> None:
        """The experts of a layer: those in the cache first, missing ones as they come, as many at once as fit."""
        cache, hops = f"{stage.name}.{LATE}", self.way(stage.chunk_home, unit.tier)
        held = self.writer.segments[f"{stage.name}.cache"]
        coming: deque[tuple[int, _Item]] = deque()
        waiting = deque(range(stage.fetches, 0, -1))
        while waiting or coming:
            while waiting:
                rank = waiting[0]
                kept = Kept(f"{stage.name}.missing.{rank - 1}", stage.chunk_home, stage.expert_bytes)
                item = _Item((-1, rank), kept.name, kept, hops)
                if coming and any(unit.room.get(goal, 0) < stage.expert_bytes for _, goal in hops):
                    break
                waiting.popleft()
                for _, goal in hops:
                    unit.room[goal] = unit.room.get(goal, 0) - stage.expert_bytes
                self.hop(unit, item, 0, cache, rank)
                coming.append((rank, item))
            rank, item = coming.popleft()
            self.arrive(unit, item, cache, rank)
            work = _part(stage.work, stage.fetches, first=rank == stage.fetches)
            self.compute(unit, stage.name, work, [held, *item.slots], k)
            self.free(unit, item, item.slots[0], item.hops[-1][1])

    def let_go(self, unit: _Unit, keep: int = 0) -> None:
        while len(unit.leaving) > keep:
            _, slot, token = unit.leaving.pop(0)
            self.writer.wait(unit.name, token)
            self.writer.evict(unit.name, slot)

    def end(self) -> None:
        for unit in self.units.values():
            for k in list(unit.sending):
                self.sent(unit, k)
            self.let_go(unit)
            for other in self.last:
                if other is not None:
                    self.writer.wait(unit.name, other)
            self.writer.evict(unit.name, *unit.act, *([unit.workspace] if unit.workspace is not None else []))


def _part(work: Work, count: int, first: bool) -> Work:
    """One of `count` equal parts of some work: the kernels are started once, with the first."""
    traffic = tuple((tier, nbytes / count) for tier, nbytes in work.traffic)
    return Work(work.flops / count, work.element, traffic, launches=work.launches if first else 0, rows=work.rows)
