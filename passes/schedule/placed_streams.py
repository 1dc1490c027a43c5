"""What the plan of a placement streams: pieces that come through slots, as many ahead as the buffers have room for.

`Streams` is the part of the emitter (`passes.schedule.placed_emitter`) that starts transfers, waits for them and frees
slots. A piece over two links goes through a slot between; its whole way is reserved when it is started, so that no
piece waits for a later one. Pieces are taken in the order of use.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

from ir.core import Value
from passes.place.machine import Machine
from passes.schedule.placed_stages import Kept
from passes.schedule.stream_problem import Piece
from passes.schedule.stream_writer import StreamWriter

Hops = tuple[tuple[str, str], ...]  # (from, to) of each


@dataclass
class Item:
    """A piece on its way to a unit: the slots it has taken and its last token. `absent`: never asked for, only its room
    is kept."""

    key: tuple[int, ...]
    name: str
    source: Kept
    hops: Hops
    slots: list[Value] = field(default_factory=list)
    token: Value | None = None
    absent: bool = False


@dataclass
class Unit:
    """What one unit has under way."""

    name: str
    tier: str
    todo: deque[Item] = field(default_factory=deque)
    active: dict[tuple[int, ...], Item] = field(default_factory=dict)
    room: dict[str, int] = field(default_factory=dict)
    spare: dict[str, int] = field(default_factory=dict)  # of that, kept free for a missing expert
    act: list[Value] = field(default_factory=list)  # activations of each micro-batch
    sending: dict[int, Value] = field(default_factory=dict)
    leaving: list[tuple[Kept, Value, Value]] = field(default_factory=list)  # what goes home: what, slot, token
    stored: set[str] = field(default_factory=set)  # what has gone home: `Kept.made` of each
    workspace: Value | None = None
    later: tuple[Item, str, int] | None = None  # a missing expert that is fetched for later steps, its cache and rank
    guessed: dict[str, list[Item]] = field(default_factory=dict)  # experts on their way for a later stage
    asked: list[Value] = field(default_factory=list)  # what a helper is sent of each micro-batch
    answer: list[Value] = field(default_factory=list)  # and what it sends back


class Streams:
    """Writes the transfers of all units."""

    def __init__(self, machine: Machine, writer: StreamWriter) -> None:
        self.machine, self.writer = machine, writer

    def way(self, home: str, tier: str) -> Hops:
        hops = self.machine.way(home, tier)
        assert hops is not None, f"nothing leads from {home} to {tier}"
        return hops

    def bring(self, unit: Unit, key: tuple[int, ...]) -> Item:
        """The item that is needed now, arrived; those behind it are on their way as far as there is room."""
        while key not in unit.active:
            if not self.is_made(unit, unit.todo[0]):
                self.let_go(unit)
            if not self.fits(unit, unit.todo[0]):
                self.drop_later(unit)
            self.start(unit, unit.todo.popleft())
        self.fill(unit)
        item = unit.active[key]
        self.arrive(unit, item)
        return item

    def fill(self, unit: Unit) -> None:
        """Starts the next items, as many as there is room for."""
        while unit.todo and self.fits(unit, unit.todo[0]):
            self.start(unit, unit.todo.popleft())

    def fits(self, unit: Unit, item: Item) -> bool:
        """Whether it is at home, and its way has room beside what is in use."""
        made, nbytes = self.is_made(unit, item), item.source.nbytes
        return made and all(unit.room.get(goal, 0) >= nbytes + unit.spare.get(goal, 0) for _, goal in item.hops)

    def is_made(self, unit: Unit, item: Item) -> bool:
        """Whether what it brings has gone home, where the plan itself makes it."""
        return not item.source.made or item.source.made in unit.stored

    def start(self, unit: Unit, item: Item) -> None:
        unit.active[item.key] = item
        for _, goal in item.hops:  # the whole way is reserved in advance, so no item waits for a later one
            unit.room[goal] = unit.room.get(goal, 0) - item.source.nbytes
        self.hop(unit, item, 0)

    def hop(self, unit: Unit, item: Item, number: int, cache: str = "", rank: int = 0) -> None:
        source, goal = item.hops[number]
        slot = self.writer.slot(unit.name, goal, item.source.nbytes, item.name)
        piece = self.piece(item, source, goal)
        held = item.slots[-1] if number else None
        if held is not None:  # a queue of its own: it is needed before what was asked for further ahead
            piece = replace(piece, stream="second")
        item.token = self.writer.fetch(unit.name, piece, slot, cache, rank, held)
        item.slots.append(slot)

    def piece(self, item: Item, source: str, goal: str) -> Piece:
        """A piece with the link or storage that brings it."""
        target = self.machine.target
        store = target.store(source) if target.tier(source) is None else None
        if store is not None:  # as many requests at once as the drive was measured with: placements count on its best
            deepest = max((p.queue_depth for p in store.points), default=1)
            return Piece(item.name, item.source.nbytes, item.source.home, source, "", item.source.block, deepest)
        link = target.link_between(source, goal)
        assert link is not None, f"no link between {source} and {goal}"
        return Piece(item.name, item.source.nbytes, item.source.home, link.name)

    def arrive(self, unit: Unit, item: Item, cache: str = "", rank: int = 0) -> None:
        """Takes an item over its last hops; of its slots the last one is left."""
        if item.absent:
            for _, goal in item.hops[:-1]:
                unit.room[goal] = unit.room.get(goal, 0) + item.source.nbytes
            item.hops = item.hops[-1:]
            return
        while True:
            assert item.token is not None
            self.writer.wait(unit.name, item.token)
            if len(item.slots) > 1:
                self.free(unit, item, item.slots.pop(0), item.hops[0][1])
                item.hops = item.hops[1:]
            if len(item.hops) == 1:
                return
            self.hop(unit, item, 1, cache, rank)

    def free(self, unit: Unit, item: Item, slot: Value, tier: str) -> None:
        self.writer.evict(unit.name, slot)
        unit.room[tier] = unit.room.get(tier, 0) + item.source.nbytes

    def release(self, unit: Unit, item: Item) -> None:
        """Frees what was used; its place is for the next ones."""
        del unit.active[item.key]
        self.free(unit, item, item.slots[0], item.hops[-1][1])
        self.fill(unit)
        following = next(iter(unit.active.values()), None)
        if following is not None and following.token is not None and len(following.hops) > len(following.slots):
            self.writer.wait(unit.name, following.token)
            self.hop(unit, following, 1)

    def drop_later(self, unit: Unit) -> None:
        """Waits for the expert that was fetched for later; its slot is the cache's now, that of another one is free."""
        if unit.later is not None:
            (item, cache, rank), unit.later = unit.later, None
            self.arrive(unit, item, cache, rank)
            self.leave(unit, item)

    def leave(self, unit: Unit, item: Item) -> None:
        """Frees the last slot of an item that has arrived."""
        if item.absent:
            goal = item.hops[-1][1]
            unit.room[goal] = unit.room.get(goal, 0) + item.source.nbytes
        else:
            self.free(unit, item, item.slots[0], item.hops[-1][1])

    def send_home(self, unit: Unit, kept: Kept, slot: Value, keep: int) -> None:
        """Starts to store a slot; of the earlier stores `keep` may still be under way."""
        hops = self.way(kept.home, unit.tier)
        over = self.piece(Item((), kept.name, kept, hops), *hops[0])
        self.let_go(unit, keep)
        unit.leaving.append((kept, slot, self.writer.store(unit.name, slot, over)))

    def let_go(self, unit: Unit, keep: int = 0) -> None:
        while len(unit.leaving) > keep:
            kept, slot, token = unit.leaving.pop(0)
            self.writer.wait(unit.name, token)
            self.writer.evict(unit.name, slot)
            unit.stored.add(kept.made)


def storable(machine: Machine, home: str, tier: str) -> bool:
    """Whether what is made in `tier` can be put there: over one link, or to a drive that says how fast it writes."""
    hops = machine.way(home, tier)
    if hops is None or len(hops) != 1:
        return False
    source = hops[0][0]
    store = machine.target.store(source) if machine.target.tier(source) is None else None
    return store is None or store.write_rate() is not None
