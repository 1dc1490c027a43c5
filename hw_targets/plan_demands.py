"""What the ops of a streaming plan ask of a target: which resources, for how long.

Resources are names of what is shared: each direction of a link (both as one where it is not duplex), switches, drives,
memory tiers, each side of a fabric. A demand is a lead (dispatch), a flow over resources, and a tail (latency) in which
nothing is held. Computations are priced by a function (the cost model by default) and share the bandwidth of the tiers
they touch; transfers share links and drives, and the tiers at both ends where these state a bandwidth.

`nvme` without a number stands for all drives of that name together, `nvme[2]` for one; other places without a number
are copy 0. Refuses places that the target lacks and rates that nobody stated (DiagnosticError).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hw_targets.cost_model import Price, Work, price, unstated_link
from hw_targets.fair_share import Resource
from hw_targets.memory import Link, Storage
from hw_targets.target import ComputeUnit, Target
from ir.diagnostics import DiagnosticError
from ir.ops import plan_exchange as exchange
from ir.ops import plan_stream as stream

Prices = Callable[[Work, ComputeUnit, Target], Price]
PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class DriveUse:
    """Requests to a drive: how fast they are depends on how many others are in flight."""

    resource: Resource
    storage: Storage
    nbytes: int
    block: int
    depth: int
    write: bool
    copies: int

    def seconds(self, depth: int) -> float:
        """Time of the drive with `depth` requests in flight, these among them."""
        rate = (self.storage.write_rate if self.write else self.storage.read_rate)(self.block, max(1, depth))
        if not rate:
            what = "written" if self.write else "read"
            raise DiagnosticError(
                f"the target does not state how fast {self.storage.name} is {what}",
                expected="points with 'read' and 'write' in its [[storage]]",
            )
        return self.nbytes / (rate * self.copies)


@dataclass(frozen=True, slots=True)
class Demand:
    """`lead` seconds, then a flow that takes `alone` seconds or more, then `tail` seconds. `label` names its bound."""

    label: str
    lead: float
    alone: float
    tail: float
    weight: float
    uses: tuple[tuple[Resource, float], ...]
    drive: DriveUse | None = None

    @property
    def seconds(self) -> float:
        """Without anybody else."""
        return self.lead + self.alone + self.tail


class Demands:
    """Demands of ops on one target. Equal ops are looked up once."""

    def __init__(self, target: Target, prices: Prices | None = None) -> None:
        self.target = target
        self.prices = prices or price
        self.resources: dict[str, Resource] = {}
        self._units = {u.name: u for u in target.units}
        self._tiers = {t.name: t for t in target.tiers}
        self._links = {x.name: x for x in target.links}
        self._drives = {s.name: s for s in target.storage}
        self._fabrics = {f.name: f for f in target.fabrics}
        self._prices: dict[tuple[object, ...], Price] = {}
        self._known: dict[tuple[object, ...], Demand] = {}

    def resource(self, name: str) -> Resource:
        """The resource of a name, made when first asked for."""
        found = self.resources.get(name)
        if found is None:
            found = self.resources[name] = Resource(name)
        return found

    # -- computations ------------------------------------------------------------------------------------------------

    def compute(self, op: stream.ComputeOp) -> Demand:
        """What a computation takes of its unit and of the tiers it touches."""
        a = op.attributes
        key = (a["unit"], a["work"], a["element"], a["tiers"], a["moved"], a["launches"], a["rows"])
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._compute(op)
        return known

    def _compute(self, op: stream.ComputeOp) -> Demand:
        name, copy = stream.split_place(op.unit)
        unit = self._units.get(name)
        if unit is None:
            raise self._missing("unit", name, self._units)
        traffic, transfers, uses = [], [], []
        for place, moved in zip(op.tiers, op.moved, strict=True):
            tier, number = stream.split_place(place)
            if tier not in self._tiers:
                raise self._missing("tier", tier, self._tiers)
            uses += self._tier_use(tier, number, moved, write=False)
            if tier == unit.tier:
                traffic.append((tier, float(moved)))
            else:  # read where it lies, over the link
                transfers.append((tier, unit.tier, float(moved)))
                link = self.target.link_between(tier, unit.tier)
                if link is not None:
                    uses += self._link_uses(link, copy, tier, unit.tier, moved)
        work = Work(float(op.work), op.element, tuple(traffic), tuple(transfers), op.launches, rows=op.rows or None)
        key = (name, work)
        found = self._prices.get(key)
        if found is None:
            found = self._prices[key] = self.prices(work, unit, self.target)
        lead = min(found.seconds, dict(found.parts).get("dispatch", 0.0))
        return Demand(found.bound, lead, found.seconds - lead, 0.0, float(max(sum(op.moved), 1)), tuple(uses))

    # -- transfers ---------------------------------------------------------------------------------------------------

    def transfer(self, op: stream.TransferOp, home: str, place: str, nbytes: int) -> Demand:
        """What a prefetch or store takes of what joins `home`, the segment's tier, and `place`, the slot's."""
        a = op.attributes
        write = isinstance(op, stream.StoreOp)
        key = (write, a["over"], a["block"], a["depth"], a["pinned"], home, place, nbytes)
        known = self._known.get(key)
        if known is None:
            source, goal = (place, home) if write else (home, place)
            known = self._known[key] = self._transfer(a, source, goal, nbytes, write)
        return known

    def _transfer(self, a: dict[str, object], source: str, goal: str, nbytes: int, write: bool) -> Demand:
        over = str(a["over"])
        name, copy = stream.split_place(over)
        ends = self._ends(source, goal, nbytes)
        if name in self._drives:
            drive = self._drives[name]
            copies = 1 if "[" in over else drive.count
            block, depth = int(str(a["block"])) or max(nbytes, 1), int(str(a["depth"]))
            label = f"{name} {'write' if write else 'read'}"
            resource = self.resource(over if copies == 1 else name)
            use = DriveUse(resource, drive, nbytes, block, depth, write, copies)
            alone = use.seconds(depth)
            if not a["pinned"]:
                alone += self._page_faults(goal if not write else source, nbytes)
            return Demand(label, 0.0, alone, 0.0, float(max(nbytes, 1)), ends, use)
        if name in self._links:
            link = self._links[name]
            base_source, base_goal = stream.split_place(source)[0], stream.split_place(goal)[0]
            rate = link.rate(base_goal, pinned=bool(a["pinned"]))
            if not rate:
                raise self._unstated(*unstated_link(link))
            label = f"{name} {base_source}->{base_goal}"
            uses = (*self._link_uses(link, copy, base_source, base_goal, nbytes), *ends)
            tail = link.latency_seconds or 0.0
            return Demand(label, 0.0, nbytes / rate, tail, float(max(nbytes, 1)), uses)
        if name in self._fabrics:
            return self._fabric(name, nbytes, [(stream.split_place(source)[1], stream.split_place(goal)[1])], ends)
        raise self._missing("link, storage or fabric", name, [*self._links, *self._drives, *self._fabrics])

    def message(self, op: exchange.SendOp, source: str, goal: str) -> Demand:
        """What a message takes, from a slot in tier `source` to one in tier `goal`."""
        name, copy = stream.split_place(op.over)
        ends = self._ends(source, goal, op.bytes)
        if name in self._fabrics:
            return self._fabric(name, op.bytes, [(stream.split_place(op.unit)[1], stream.split_place(op.to)[1])], ends)
        if name in self._links:
            link = self._links[name]
            base_source, base_goal = stream.split_place(source)[0], stream.split_place(goal)[0]
            rate = link.rate(base_goal)
            if not rate:
                raise self._unstated(*unstated_link(link))
            uses = (*self._link_uses(link, copy, base_source, base_goal, op.bytes), *ends)
            label = f"{name} {base_source}->{base_goal}"
            return Demand(label, 0.0, op.bytes / rate, link.latency_seconds or 0.0, float(max(op.bytes, 1)), uses)
        raise self._missing("fabric or link", name, [*self._fabrics, *self._links])

    def collective(self, op: exchange.CollectiveOp) -> Demand:
        """What a collective takes of every unit of its group, as a ring (arXiv:1909.09756, section 4, and NCCL)."""
        key = (op.kind, op.group, op.over, op.bytes)
        known = self._known.get(key)
        if known is None:
            known = self._known[key] = self._collective(op)
        return known

    def _collective(self, op: exchange.CollectiveOp) -> Demand:
        members = [stream.split_place(member)[1] for member in op.group]
        n = len(members)
        share = {"all_reduce": 2 * (n - 1) / n, "broadcast": 1.0 if n > 1 else 0.0}.get(op.kind, (n - 1) / n)
        steps = {"all_reduce": 2 * (n - 1), "all_to_all": min(1, n - 1)}.get(op.kind, n - 1)
        name = stream.split_place(op.over)[0]
        if name not in self._fabrics:
            raise self._missing("fabric", name, self._fabrics)
        return self._fabric(name, round(op.bytes * share), list(zip(members, members, strict=True)), (), steps)

    def _fabric(
        self,
        name: str,
        nbytes: int,
        pairs: list[tuple[int, int]],
        ends: tuple[tuple[Resource, float], ...],
        steps: int = 1,
    ) -> Demand:
        rate = self._fabrics[name].rate()
        if not rate:
            raise self._unstated(f"the bandwidth of fabric {name}", f"{name}.bandwidth=50GB/s")
        seconds = nbytes / rate
        uses = [(self.resource(f"{name}[{i}] out"), seconds) for i, _ in pairs]
        uses += [(self.resource(f"{name}[{j}] in"), seconds) for _, j in pairs]
        tail = steps * (self._fabrics[name].latency_seconds or 0.0)
        return Demand(name, 0.0, seconds, tail, float(max(nbytes, 1)), (*uses, *ends))

    def _link_uses(self, link: Link, copy: int, source: str, goal: str, nbytes: int) -> list[tuple[Resource, float]]:
        rate = link.rate(goal)
        if not rate:
            raise self._unstated(f"the bandwidth of link {link.name}", f"{link.name}.bandwidth=25GB/s")
        number = f"[{copy}]" if link.count * self.target.nodes > 1 else ""
        way = f" {source}->{goal}" if link.duplex else ""
        uses = [(self.resource(f"{link.name}{number}{way}"), nbytes / rate)]
        switch = self.target.switch(link.switch) if link.switch else None
        if switch is not None and switch.bandwidth:
            behind = copy * switch.count // link.count
            uses.append((self.resource(f"{switch.name}[{behind}] {source}->{goal}"), nbytes / switch.bandwidth))
        return uses

    def _ends(self, source: str, goal: str, nbytes: int) -> tuple[tuple[Resource, float], ...]:
        """The memories that a transfer reads and writes."""
        uses = []
        for place, write in ((source, False), (goal, True)):
            name, copy = stream.split_place(place)
            if name in self._tiers:
                uses += self._tier_use(name, copy, nbytes, write)
        return tuple(uses)

    def _tier_use(self, name: str, copy: int, nbytes: int, write: bool) -> list[tuple[Resource, float]]:
        tier = self._tiers[name]
        rate = tier.write_rate() if write else tier.read_rate()
        if not rate:
            return []
        number = f"[{copy}]" if tier.count * self.target.nodes > 1 else ""
        return [(self.resource(f"{name}{number}"), nbytes / rate)]

    def _page_faults(self, place: str, nbytes: int) -> float:
        tier = self._tiers.get(stream.split_place(place)[0])
        if tier is None or tier.page_fault_seconds is None:
            name = tier.name if tier is not None else place
            raise self._unstated(f"what a page fault of {name} costs", f"{name}.page_fault=0.5us")
        return -(-nbytes // PAGE_BYTES) * tier.page_fault_seconds

    def _unstated(self, what: str, override: str) -> DiagnosticError:
        where = self.target.origin or self.target.name
        return DiagnosticError(
            f"target {self.target.name} does not state {what}", where=where, expected=f"such as {override}"
        )

    def _missing(self, what: str, name: str, known: object) -> DiagnosticError:
        listed = ", ".join(known) if isinstance(known, dict | list) else ""
        where = self.target.origin or self.target.name
        return DiagnosticError(
            f"target {self.target.name} has no {what} {name!r}", where=where, expected=listed or "none"
        )
