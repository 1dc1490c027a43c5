"""An independent proof that a streaming plan is sound. Shares no code with what makes, runs or simulates plans.

Checked for every order of events that the waits of the plan allow, not only for the order of the text:
- nothing is read before it has arrived: some wait of the reading unit, or one it has heard of, lies in between;
- nothing is overwritten or evicted while it is read or under way, and no two transfers write one place at once;
- what a computation writes that may not take place does not count as written, what it reads must be there;
- every slot is evicted exactly once, by the unit that reserved it, and not used after;
- no tier holds more than it has room for: what is at home there plus the most that each unit ever reserves;
- every message sent is received once, with the same size and over the same link, every collective is joined by its
  whole group, and none is waited for before the other side has begun: the text itself is an order without deadlock;
- what is still under way at the end has been waited for;
- units, tiers, links, storage and fabrics are of the target, a transfer goes over what joins its two ends, and a unit
  computes on its own tier or one that is linked to it.

`known[unit]` is the set of ops that a unit knows to be over, as the bits of one number. A computation is over when its
unit goes on; a transfer when its token was waited for, and with it all that its starter knew when it began.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hw_targets.target import Target
from ir.core import Op, Value
from ir.diagnostics import DiagnosticSink
from ir.ops import plan_exchange as exchange
from ir.ops import plan_stream as stream
from ir.ops.builtin import FuncOp
from ir.types import SLOT
from passes.schedule.check_places import PlaceChecker


def check_stream(
    program: FuncOp, target: Target | None = None, capacities: Mapping[str, int | None] | None = None
) -> DiagnosticSink:
    """The faults of `program`, none when it is sound.

    `capacities` (bytes by tier, `hbm` or `hbm[3]`) go before those of the target; a tier with neither has no limit.
    Without a target the names of places are not checked.
    """
    checker = _Checker(program, PlaceChecker(target, capacities or {}))
    for op in program.block.ops:
        checker.step(op)
    checker.finish()
    return checker.diag


@dataclass
class _Held:
    """What is known of a slot or segment: its last writer and the readers since, as ops; who reserved it."""

    op: Op
    filled: bool
    writer: Op | None = None
    readers: list[Op] = field(default_factory=list)
    evicted: bool = False


@dataclass
class _Meeting:
    """The ops of a message or collective met so far, by unit."""

    members: dict[str, Op] = field(default_factory=dict)


class _Checker:
    def __init__(self, program: FuncOp, places: PlaceChecker) -> None:
        self.program = program
        self.places = places
        self.diag = places.diag
        self.bit: dict[Op, int] = {}
        self.known: dict[str, int] = {}
        self.over: dict[Op, int] = {}  # what is known to be over once this op is
        self.held: dict[Value, _Held] = {}
        self.transfers: list[Op] = []
        self.meetings: dict[tuple[str, ...], _Meeting] = {}
        self.at_home: dict[tuple[str, int], int] = {}
        self.reserved: dict[tuple[tuple[str, int], str], list[int]] = {}  # (tier, unit) -> [now, most]

    def step(self, op: Op) -> None:
        if not isinstance(op, stream.StreamOp):
            return
        self.bit[op] = 1 << len(self.bit)
        self.places.check(op)
        match op:
            case stream.SegmentOp():
                self.held[op.out] = _Held(op, filled=True)
                place = self.places.place(op.tier)
                self.at_home[place] = self.at_home.get(place, 0) + op.bytes
            case stream.SlotOp():
                self.held[op.out] = _Held(op, filled=False)
                account = self.reserved.setdefault((self.places.place(op.tier), op.unit), [0, 0])
                account[0] += op.bytes
                account[1] = max(account)
            case stream.PrefetchOp():
                self.transfer(op, op.unit, reads=[op.segment], writes=[op.slot])
            case stream.StoreOp():
                self.transfer(op, op.unit, reads=[op.slot], writes=[op.segment])
            case exchange.SendOp():
                self.transfer(op, op.unit, reads=[op.slot], writes=[])
                self.meet(op, ("message", op.unit, op.to, op.tag), op.unit)
            case exchange.RecvOp():
                self.transfer(op, op.unit, reads=[], writes=[op.slot])
                self.meet(op, ("message", op.source, op.unit, op.tag), op.unit)
            case exchange.CollectiveOp():
                self.transfer(op, op.unit, reads=[op.slot], writes=[op.slot])
                self.meet(op, ("collective", *op.group, op.tag), op.unit)
            case stream.ComputeOp():
                self.compute(op)
            case stream.WaitOp():
                for token in op.tokens:
                    self.wait(op, token)
            case stream.EvictOp():
                self.evict(op)

    def error(self, op: Op, message: str) -> None:
        self.diag.error(op.location, f"'{op.name}' {message}")

    # -- what ops do to slots and segments ---------------------------------------------------------------------------

    def transfer(self, op: Op, unit: str, reads: list[Value], writes: list[Value]) -> None:
        self.access(op, unit, reads, writes)
        self.over[op] = self.known.get(unit, 0) | self.bit[op]
        self.transfers.append(op)

    def compute(self, op: stream.ComputeOp) -> None:
        writes = [op.data[i] for i in op.writes]
        reads = [v for i, v in enumerate(op.data) if i not in op.writes]
        self.access(op, op.unit, reads, writes)
        self.over[op] = self.known[op.unit] = self.known.get(op.unit, 0) | self.bit[op]

    def access(self, op: Op, unit: str, reads: list[Value], writes: list[Value]) -> None:
        known = self.known.get(unit, 0)
        for value in [*reads, *writes]:
            held = self.held.get(value)
            if held is None:
                self.error(op, "uses what is no slot or segment of this plan")
                continue
            if held.evicted:
                self.error(op, f"uses a slot after its eviction ({_named(held.op)})")
            if value in reads and not held.filled:
                self.error(op, f"reads a slot that nothing was put into ({_named(held.op)})")
            if held.writer is not None and not known & self.bit[held.writer]:
                did = "reads" if value in reads else "overwrites"
                self.error(op, f"{did} {_named(held.op)} before '{held.writer.name}' that fills it is known to be over")
            if value in writes:
                for reader in held.readers:
                    if reader is not op and not known & self.bit[reader]:
                        message = (
                            f"overwrites {_named(held.op)} before '{reader.name}' that reads it is known to be over"
                        )
                        self.error(op, message)
        for value in reads:
            if value in self.held:
                self.held[value].readers.append(op)
        for value in writes:
            if value in self.held:
                held = self.held[value]
                held.writer, held.readers = op, []
                held.filled = held.filled or not self.conditional(op)

    @staticmethod
    def conditional(op: Op) -> bool:
        """Whether what an op writes may not be written. A prefetch with a cache that does not take place has put it
        there before."""
        return isinstance(op, stream.ComputeOp) and bool(op.cache)

    def evict(self, op: stream.EvictOp) -> None:
        held = self.held.get(op.slot)
        if held is None or not isinstance(held.op, stream.SlotOp):
            self.error(op, "evicts what is no slot of this plan")
            return
        if held.evicted:
            self.error(op, f"evicts {_named(held.op)} a second time")
            return
        held.evicted = True
        if held.op.unit != op.unit:
            self.error(op, f"by {op.unit} of {_named(held.op)}, which {held.op.unit} reserved")
        known = self.known.get(op.unit, 0)
        for user in [*([held.writer] if held.writer is not None else []), *held.readers]:
            if not known & self.bit[user]:
                self.error(op, f"evicts {_named(held.op)} before '{user.name}' that uses it is known to be over")
        self.reserved[self.places.place(held.op.tier), held.op.unit][0] -= held.op.bytes

    # -- waiting and meeting -----------------------------------------------------------------------------------------

    def wait(self, op: stream.WaitOp, token: Value) -> None:
        started = token.defining_op()
        if started is None or started not in self.over:
            self.error(op, "waits for what this plan does not start")
            return
        gained = self.over[started]
        key, group = _meeting_of(started)
        if key:
            met = self.meetings[key].members
            missing = [unit for unit in group if unit not in met]
            if missing:
                self.error(op, f"waits for {started.attributes['tag']!r}, which {missing[0]} has not begun: a deadlock")
            for member in met.values():
                gained |= self.over[member]
        self.known[op.unit] = self.known.get(op.unit, 0) | gained

    def meet(self, op: Op, key: tuple[str, ...], unit: str) -> None:
        met = self.meetings.setdefault(key, _Meeting()).members
        tag = op.attributes["tag"]
        if unit in met:
            self.error(op, f"is a second one of {unit} with tag {tag!r}")
            return
        for name in ("bytes", "over", "kind"):
            for other in met.values():
                mine, theirs = op.attributes.get(name), other.attributes.get(name)
                if mine != theirs:
                    self.error(op, f"of {tag!r} has {name} = {mine}, the other side {theirs}")
                    break
        met[unit] = op

    # -- the end -----------------------------------------------------------------------------------------------------

    def finish(self) -> None:
        for value, held in self.held.items():
            if value.type == SLOT and not held.evicted:
                self.error(held.op, f"of {held.op.attributes['bytes']} bytes is never evicted")
        for key, meeting in self.meetings.items():
            first = next(iter(meeting.members.values()))
            missing = [unit for unit in _meeting_of(first)[1] if unit not in meeting.members]
            if missing:
                what = "joined" if key[0] == "collective" else "met"
                self.error(first, f"with tag {first.attributes['tag']!r} is never {what} by {', '.join(missing)}")
        known = 0
        for bits in self.known.values():
            known |= bits
        for op in self.transfers:
            if not known & self.bit[op]:
                self.error(op, "is never waited for")
        self.capacities()

    def capacities(self) -> None:
        most: dict[tuple[str, int], list[tuple[str, int]]] = {}
        for (place, unit), (_, peak) in self.reserved.items():
            most.setdefault(place, []).append((unit, peak))
        for place in dict.fromkeys([*self.at_home, *most]):
            limit = self.places.capacity(place)
            home, units = self.at_home.get(place, 0), most.get(place, [])
            needed = home + sum(peak for _, peak in units)
            if limit is not None and needed > limit:
                parts = [f"{home} at home", *(f"{peak} reserved by {unit}" for unit, peak in units)]
                message = f"{_place(place)} needs {needed} bytes ({', '.join(parts)}) and has {limit}"
                self.diag.error(self.program.location, message)


def _meeting_of(op: Op) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(key, units) of the message or collective that an op is part of; empty for other ops."""
    match op:
        case exchange.SendOp():
            return ("message", op.unit, op.to, op.tag), (op.unit, op.to)
        case exchange.RecvOp():
            return ("message", op.source, op.unit, op.tag), (op.source, op.unit)
        case exchange.CollectiveOp():
            return ("collective", *op.group, op.tag), op.group
    return (), ()


def _named(op: Op) -> str:
    """A slot or segment in words."""
    if isinstance(op, stream.SegmentOp):
        return f"segment {op.symbol}"
    value = op.results[0]
    return (
        f"slot %{value.name_hint} of {op.attributes['tier']}" if value.name_hint else f"slot of {op.attributes['tier']}"
    )


def _place(place: tuple[str, int]) -> str:
    return place[0] if not place[1] else f"{place[0]}[{place[1]}]"
