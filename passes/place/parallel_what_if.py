"""What more of something would buy for many equal devices: every way to use them looked at again with a little more.

    ways = tuple(spreads(shape, target, formats, session))
    for gain in device_gains(Devices(shape, target, formats, session, ways, best)): gain.what, gain.decode

One GiB more in each device, 10 GB/s more of its memory, of what joins the devices of a node and of what joins nodes,
and the next format down of the ladder: what `search` finds for the machine so changed. More room changes no time, and a
rate shortens no more than what waits for it, so that few of the ways have to be priced again. Sorted by what they save
of a session; where the batch is chosen too, of the time of a token.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from frontends.model_shape import ModelShape
from hw_targets.target import Fabric, Target
from passes.place.eight_bits import formats_below_floats
from passes.place.formats import LADDER, Formats, next_down
from passes.place.gain import GIB, RATE, Gain, with_rate
from passes.place.outcome import PhaseOutcome
from passes.place.parallel import NO_SLO, Spread, best_of, device_unit, fabric_of, priced, spreads
from passes.place.problem import Session, Slo

_FABRIC = ("all-reduce", "all-to-all", "pipeline hops")
_ROUNDING = 1e-9  # of sums in another order


@dataclass(frozen=True)
class Devices:
    """A model on many devices as it was planned: every one of the `ways`, and the best of them, found under `slo`."""

    shape: ModelShape
    target: Target
    formats: Formats
    session: Session
    ways: tuple[Spread, ...]
    best: Spread
    slo: Slo = NO_SLO
    any_batch: bool = False


@dataclass(frozen=True)
class _Faster:
    """A target on which what waits for `resources` takes a `factor`-th of its time, at best."""

    what: str
    target: Target
    resources: tuple[str, ...]
    factor: float


def device_gains(devices: Devices) -> tuple[Gain, ...]:
    """Every change that was tried, those that save most first."""
    unit = device_unit(devices.target)
    assert unit is not None  # there are ways
    found = [_gain(devices, f"+1 GiB of each {unit.tier}", _with_room(devices))]
    for faster in _faster(devices.target):
        found.append(_gain(devices, faster.what, _with_rate(devices, faster)))
    floats = devices.formats.name == LADDER[0]
    lower = formats_below_floats(devices.formats.float_format) if floats else next_down(devices.formats)
    if lower is not None:
        ways = spreads(devices.shape, devices.target, lower, devices.session, any_batch=devices.any_batch)
        best = best_of(ways, devices.slo, devices.any_batch)
        if best is not None:
            found.append(_gain(devices, f"--recipe {lower.name}", best))
    return tuple(sorted(found, key=lambda g: (-g.saved, g.what)))


def _gain(devices: Devices, what: str, after: Spread) -> Gain:
    before = _score(devices.best, devices.any_batch)
    saved = max(0.0, 1.0 - _score(after, devices.any_batch) / before) if before else 0.0
    batch = after.batch if devices.any_batch else None
    return Gain(what, after.decode.seconds, after.prefill.seconds, saved, batch)


def _score(way: Spread, any_batch: bool) -> float:
    """What the best way has least of: seconds of a token, or of a session where the batch is given."""
    return way.decode.seconds / way.batch if any_batch else way.objective


def _with_room(devices: Devices) -> Spread:
    """The best way with another GiB in each device."""
    fitting = [
        dataclasses.replace(w, room=w.room + GIB) for w in devices.ways if w.room < w.total <= w.room + GIB
    ]  # fmt: skip
    best = best_of([devices.best, *fitting], devices.slo, devices.any_batch)
    return best if best is not None else devices.best


def _with_rate(devices: Devices, faster: _Faster) -> Spread:
    """The best way on a faster machine: priced in the order of what each takes at least, until no other can be best."""
    session, any_batch = devices.session, devices.any_batch
    fitting = [w for w in devices.ways if w.total <= w.room]
    least = sorted(((_at_least(w, faster, session, any_batch), i) for i, w in enumerate(fitting)))
    best: tuple[float, int, Spread] | None = None
    ordered = [(fitting[i].degrees, fitting[i].batch) for _, i in least]
    again = priced(devices.shape, faster.target, devices.formats, session, ordered)
    for bound, i in least:
        if best is not None and bound * (1.0 - _ROUNDING) > best[0]:
            break
        way = next(again)
        if not devices.slo.kept(way.prefill.seconds, way.decode.seconds):
            continue
        score = _score(way, any_batch)
        if best is None or (score, i) < best[:2]:
            best = score, i, way
    return best[2] if best is not None else devices.best


def _at_least(way: Spread, faster: _Faster, session: Session, any_batch: bool) -> float:
    """What the score of a way is at least with the rate."""
    decode = way.decode.seconds - _waits(way.decode, faster)
    if any_batch:
        return decode / way.batch
    steps = session.generate * way.decode.seconds
    prompts = (way.objective - steps) * (1.0 - _waits(way.prefill, faster) / way.prefill.seconds)
    return prompts + session.generate * decode


def _waits(phase: PhaseOutcome, faster: _Faster) -> float:
    """Seconds that are saved at best."""
    return sum(s for name, s in phase.busy if name in faster.resources) * (1.0 - 1.0 / faster.factor)


def _faster(target: Target) -> list[_Faster]:
    """The target with each of its rates a little higher; those that are not stated are left out."""
    unit = device_unit(target)
    assert unit is not None
    tier, found = target.tier(unit.tier), []
    changed = with_rate(target, f"{unit.tier} read")
    before = tier.read_rate() if tier is not None else None
    after = changed[0].tier(unit.tier) if changed is not None else None
    if changed is not None and before and after is not None:
        factor = (after.read_rate() or before) / before
        found.append(_Faster(f"+{changed[1]} of each {unit.tier}", changed[0], (f"{unit.tier} read",), factor))
    for scope in ("node", "cluster"):
        several = unit.count > 1 if scope == "node" else target.nodes > 1
        fabric = target.fabric(unit.tier, scope)
        if not several or (fabric is None and scope == "cluster"):
            continue
        joined = fabric_of(target, unit, scope)
        more = _with_fabric(target, fabric) if fabric is not None else None
        if fabric is None and joined is not None:  # each device's link to the host
            linked = with_rate(target, joined.name)
            more = linked[0] if linked is not None else None
        reached = fabric_of(more, unit, scope) if more is not None else None
        if joined is None or more is None or reached is None or not joined.rate():
            continue
        factor = (reached.rate() or 0.0) / (joined.rate() or 1.0)
        found.append(_Faster(f"+{RATE / 1e9:.0f} GB/s of each {joined.name}", more, _FABRIC, factor))
    return found


def _with_fabric(target: Target, fabric: Fabric) -> Target | None:
    """The target with a faster fabric; None where its bandwidth is not stated."""
    if fabric.bandwidth is None:
        return None
    more = dataclasses.replace(fabric, bandwidth=fabric.bandwidth + RATE)
    return dataclasses.replace(target, fabrics=tuple(more if f is fabric else f for f in target.fabrics))
