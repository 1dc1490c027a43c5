"""Whether the places that a streaming plan names exist in the target and can do what is asked of them.

Part of the proof in `passes.schedule.check_stream`: reads the target's tables itself and shares no code with the
simulator. Every fault is named once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from hw_targets.target import Target
from ir.core import Op, Value
from ir.diagnostics import DiagnosticSink
from ir.ops import plan_exchange as exchange
from ir.ops import plan_stream as stream
from ir.spelling import did_you_mean

Place = tuple[str, int]


class PlaceChecker:
    """`place` reads a name, `capacity` knows the room of a tier, `check` puts the faults of an op into `diag`."""

    def __init__(self, target: Target | None, capacities: Mapping[str, int | None]) -> None:
        self.target = target
        self.given = {stream.split_place(name): nbytes for name, nbytes in capacities.items()}
        self.diag = DiagnosticSink()
        self._places: dict[str, Place] = {}
        self._said: set[str] = set()
        self._tier_of: dict[Value, str] = {}

    def place(self, name: str) -> Place:
        """`hbm[3]` -> ("hbm", 3)"""
        if name not in self._places:
            self._places[name] = stream.split_place(name)
        return self._places[name]

    def capacity(self, place: Place) -> int | None:
        """Bytes that a tier or storage may hold; None when there is no limit that anybody stated."""
        if place in self.given:
            return self.given[place]
        if (place[0], 0) in self.given:  # the copies of a tier are alike
            return self.given[place[0], 0]
        if self.target is None:
            return None
        tier = next((t for t in self.target.tiers if t.name == place[0]), None)
        if tier is not None:
            return None if tier.capacity_bytes is None else max(0, tier.capacity_bytes - tier.reserve_bytes)
        return next((s.capacity_bytes for s in self.target.storage if s.name == place[0]), None)

    def check(self, op: Op) -> None:
        """Adds what is wrong with the places of an op."""
        if isinstance(op, stream.SegmentOp | stream.SlotOp):
            self._tier_of[op.out] = op.tier
        if self.target is None:
            return
        if "unit" in op.attributes:
            self._exists(op, op.attributes["unit"], "unit", self.target.units)
        match op:
            case stream.SegmentOp():
                self._exists(op, op.tier, "tier or storage", [*self.target.tiers, *self.target.storage])
            case stream.SlotOp():
                self._exists(op, op.tier, "tier", self.target.tiers)
            case stream.TransferOp():
                self._transfer(op)
            case stream.ComputeOp():
                self._compute(op)
            case exchange.SendOp() | exchange.RecvOp() | exchange.CollectiveOp():
                known = [*self.target.fabrics, *self.target.links]
                self._exists(op, op.attributes["over"], "fabric or link", known)

    def _exists(self, op: Op, name: str, what: str, known: Iterable[object]) -> bool:
        """Whether the target has something of this name, and as many copies of it."""
        assert self.target is not None
        base, copy = self.place(name)
        found = {getattr(x, "name", ""): getattr(x, "count", None) for x in known}
        if base not in found:
            listed = ", ".join(found) or "none"
            self._say(op, f"{self.target.name} has no {what} {base!r}{did_you_mean(base, found)} (it has {listed})")
            return False
        count = found[base]
        if count is not None and copy >= count * self.target.nodes:
            self._say(op, f"{self.target.name} has {count * self.target.nodes} of {base}, not {name}")
            return False
        return True

    def _transfer(self, op: stream.TransferOp) -> None:
        assert self.target is not None
        source, goal = (self._tier_of.get(v, "") for v in op.operands)
        if isinstance(op, stream.StoreOp):
            source, goal = goal, source  # as a prefetch: home first
        if not source or not goal:
            return
        over = op.attributes["over"]
        if not self._exists(
            op, over, "link or storage", [*self.target.links, *self.target.storage, *self.target.fabrics]
        ):
            return
        name, ends = self.place(over)[0], {self.place(source)[0], self.place(goal)[0]}
        link = next((x for x in self.target.links if x.name == name), None)
        drive = next((x for x in self.target.storage if x.name == name), None)
        if link is not None and ends != {link.from_tier, link.to_tier}:
            self._say(op, f"over {name}, which joins {link.from_tier} and {link.to_tier}, not {source} and {goal}")
        if drive is not None:
            arrives = drive.tier or (self.target.tiers[0].name if self.target.tiers else "")
            if ends != {name, arrives}:
                self._say(op, f"over {name}, whose data arrive in {arrives}: from {source} to {goal} is no such way")

    def _compute(self, op: stream.ComputeOp) -> None:
        assert self.target is not None
        base = self.place(op.unit)[0]
        unit = next((u for u in self.target.units if u.name == base), None)
        if unit is None:
            return
        reach = {unit.tier}
        for link in self.target.links:
            if unit.tier in (link.from_tier, link.to_tier):
                reach |= {link.from_tier, link.to_tier}
        for tier in [*(self._tier_of.get(v, unit.tier) for v in op.data), *op.tiers]:
            if self.place(tier)[0] not in reach:
                self._say(
                    op, f"on {op.unit} touches {tier}, which it does not reach (it reaches {', '.join(sorted(reach))})"
                )

    def _say(self, op: Op, message: str) -> None:
        if message not in self._said:  # one line for a mistake that every layer repeats
            self._said.add(message)
            self.diag.error(op.location, f"'{op.name}' {message}")
