"""A target as placement sees it: computing units, homes for bytes with what they may hold, and the ways between them.

    machine = machine_of(target, tensor=8, budgets={"dram": 2 << 30})
    machine.way("nvme", "hbm")     # (("nvme", "dram"), ("dram", "hbm"))

Copies that work together on every layer (`tensor` of a unit with several) become one unit: rates and capacities add
up, what they tell each other is priced by `passes.place.parallel`. Budgets cap what a tier or a storage may hold.
Refuses targets without a described unit or memory, and names of budgets that are neither tier nor storage.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hw_targets.target import ComputeUnit, Link, MemoryTier, Storage, Target
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean

UNLIMITED = 1 << 60


@dataclass(frozen=True)
class Machine:
    """`target` has one copy of everything. `room` is ((tier or storage, bytes a plan may use), ...), tiers first."""

    target: Target
    units: tuple[ComputeUnit, ...]
    room: tuple[tuple[str, int], ...]

    @property
    def tiers(self) -> tuple[str, ...]:
        """Names of the tiers that can hold something."""
        return tuple(name for name, _ in self.room if self.target.tier(name) is not None)

    @property
    def stores(self) -> tuple[str, ...]:
        """Names of the storages."""
        return tuple(name for name, _ in self.room if self.target.tier(name) is None)

    def room_of(self, name: str) -> int:
        """Bytes that a plan may use of a tier or storage."""
        return dict(self.room)[name]

    def unit(self, name: str) -> ComputeUnit:
        """The computing unit of this name."""
        return next(u for u in self.units if u.name == name)

    def units_of(self, tier: str) -> tuple[ComputeUnit, ...]:
        """Units that compute out of a tier."""
        return tuple(u for u in self.units if u.tier == tier)

    def way(self, home: str, tier: str) -> tuple[tuple[str, str], ...] | None:
        """Hops from a home to a tier: none, one link, or a drive and a link; None when nothing leads there."""
        if home == tier:
            return ()
        store = self.target.store(home) if self.target.tier(home) is None else None
        if store is not None:
            landing = store.tier or (self.tiers[0] if self.tiers else "")
            rest = self.way(landing, tier)
            return None if rest is None else ((home, landing), *rest)
        if self.target.link_between(home, tier) is not None:
            return ((home, tier),)
        for middle in self.tiers:
            first = self.target.link_between(home, middle)
            if middle not in (home, tier) and first and self.target.link_between(middle, tier):
                return ((home, middle), (middle, tier))
        return None

    def with_room(self, name: str, nbytes: int) -> Machine:
        """The same machine with another budget of one tier or storage."""
        return replace(self, room=tuple((n, nbytes if n == name else b) for n, b in self.room))

    def with_target(self, target: Target) -> Machine:
        """The same budgets on a target with other rates; its units are taken over by name."""
        return replace(self, target=target, units=tuple(u for u in target.units if u.peak))


def machine_of(target: Target, *, tensor: int | None = None, budgets: dict[str, int] | None = None) -> Machine:
    """The machine that plans are made for. `tensor`: GPUs that work together (None: all of a node)."""
    if not target.is_machine:
        raise DiagnosticError(
            f"target {target.name} describes instructions, not a machine",
            where=target.origin or target.name,
            expected="a target with [[unit]] peaks and [[tier]] sizes and bandwidths: 'compile-model targets list'",
        )
    joined = {u.name: _copies(u, tensor) for u in target.units}
    by_tier = {u.tier: joined[u.name] for u in reversed(target.units) if joined[u.name] > 1 or u.count > 1}
    tiers = tuple(_joined_tier(t, by_tier.get(t.name, t.count)) for t in target.tiers)
    copies = {t.name: min(t.count, by_tier.get(t.name, t.count)) for t in target.tiers}
    links = tuple(
        _joined_link(x, max(copies.get(x.from_tier, 1), copies.get(x.to_tier, 1)), target) for x in target.links
    )
    units = tuple(_joined_unit(u, joined[u.name]) for u in target.units)
    stores = tuple(_joined_store(s) for s in target.storage)
    single = replace(target, units=units, tiers=tiers, links=links, storage=stores)
    room = {t.name: t.usable_bytes for t in tiers if t.usable_bytes}
    room |= {s.name: s.capacity_bytes or UNLIMITED for s in stores if s.points}
    for name, nbytes in (budgets or {}).items():
        if name not in {t.name for t in tiers} | {s.name for s in stores}:
            raise DiagnosticError(
                f"target {target.name} has no tier or storage {name!r}{did_you_mean(name, list(room))}",
                expected=", ".join(room),
            )
        room[name] = min(nbytes, room.get(name) or nbytes)
    computing = tuple(u for u in units if u.peak and u.tier in room)
    if not computing:
        raise DiagnosticError(
            f"target {target.name} has no unit with a stated peak and a memory of a stated size",
            where=target.origin or target.name,
            hint="of this machine, 'compile-model targets calibrate' measures them" if target.name == "host" else "",
        )
    return Machine(single, computing, tuple((n, int(b)) for n, b in room.items()))


def main_tier(target: Target) -> str:
    """The tier that a memory budget is about: that of the first CPU, else the first one."""
    cpu = next((u.tier for u in target.units if u.kind == "cpu"), None)
    return cpu or (target.tiers[0].name if target.tiers else "")


def _copies(unit: ComputeUnit, tensor: int | None) -> int:
    """How many copies of a unit become one: near-memory engines all of them."""
    return unit.count if unit.kind == "near-memory" or tensor is None else min(unit.count, tensor)


def _joined_unit(unit: ComputeUnit, copies: int) -> ComputeUnit:
    if copies == 1 and unit.count == 1:
        return unit
    peak = tuple((element, rate * copies) for element, rate in unit.peak)
    power = None if unit.power_watts is None else unit.power_watts * copies
    return replace(unit, peak=peak, power_watts=power, count=1)


def _joined_tier(tier: MemoryTier, copies: int) -> MemoryTier:
    copies = min(copies, tier.count)
    if copies == 1:
        return replace(tier, count=1)
    return replace(
        tier,
        capacity_bytes=None if tier.capacity_bytes is None else tier.capacity_bytes * copies,
        reserve_bytes=tier.reserve_bytes * copies,
        read_bandwidth=None if tier.read_bandwidth is None else tier.read_bandwidth * copies,
        write_bandwidth=None if tier.write_bandwidth is None else tier.write_bandwidth * copies,
        count=1,
    )


def _joined_link(link: Link, copies: int, target: Target) -> Link:
    copies = min(copies, link.count)
    rate = link.bandwidth
    if rate is not None and copies > 1:
        rate *= copies
        switch = target.switch(link.switch) if link.switch else None
        if switch is not None and switch.bandwidth is not None:
            rate = min(rate, switch.bandwidth * switch.count)
    back = None if link.back_bandwidth is None else link.back_bandwidth * copies
    return replace(link, bandwidth=rate, back_bandwidth=back, count=1)


def _joined_store(store: Storage) -> Storage:
    """Drives of a node are one with the sum of their rates and sizes."""
    if store.count == 1:
        return store
    points = tuple(
        replace(
            p,
            read_bandwidth=p.read_bandwidth * store.count,
            write_bandwidth=None if p.write_bandwidth is None else p.write_bandwidth * store.count,
        )
        for p in store.points
    )
    capacity = None if store.capacity_bytes is None else store.capacity_bytes * store.count
    return replace(store, points=points, capacity_bytes=capacity, count=1)
