"""Many equal devices: how far to split products, layers, experts and sequences, by trying every way that divides.

    best = search(shape, target, formats, session)      # None when one device alone, or when nothing fits

Each way is priced in closed form with everything in the devices' own memory: products cut `tensor` ways (two
all-reduces a layer), layers in `pipeline` stages (as many micro-batches as stages), sequences in `data` copies, experts
whole on `expert` devices (all-to-all there and back; each so many devices have all of them) or cut like products. The
vocabulary (embeddings and head) is whole on each device, cut like products, or over the stages as well. Ways that need
a connection between nodes which the target does not state are left out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from frontends.model_shape import ModelShape
from hw_targets.cost_model import Price, Work, price
from hw_targets.target import ComputeUnit, Fabric, Target
from passes.place.formats import Formats
from passes.place.kv_parts import attended_pairs
from passes.place.outcome import PhaseOutcome
from passes.place.parts import Part, parts_of
from passes.place.placement import Degrees
from passes.place.problem import Session, Slo
from passes.place.routing_model import distinct_experts

_DEFAULT_LATENCY = 5e-6
NO_SLO = Slo()
# What work takes on one device, by what it is: ways that differ in one degree have most of their work in common.
Known = dict[tuple[object, ...], tuple[str, float, float]]


@dataclass(frozen=True)
class Spread:
    """One way to use the devices, with what a device holds and how long the phases are."""

    degrees: Degrees
    batch: int
    holds: tuple[tuple[str, int], ...]
    room: int
    decode: PhaseOutcome
    prefill: PhaseOutcome
    objective: float

    @property
    def total(self) -> int:
        return sum(nbytes for _, nbytes in self.holds)

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.decode.seconds

    def better(self, other: Spread, any_batch: bool) -> bool:
        """Whether it has more tokens a second, or the shorter session where the batch is given."""
        if any_batch:
            return self.tokens_per_second > other.tokens_per_second
        return self.objective < other.objective


def device_unit(target: Target) -> ComputeUnit | None:
    """The unit of which there are several: what plans for many devices are about."""
    several = [u for u in target.units if u.count * target.nodes > 1 and u.kind == "gpu" and u.peak]
    return several[0] if several else None


def search(
    shape: ModelShape,
    target: Target,
    formats: Formats,
    session: Session,
    slo: Slo = NO_SLO,
    *,
    fixed: Degrees | None = None,
    any_batch: bool = False,
) -> Spread | None:
    """The best way, or None when none fits. `fixed` leaves one way; `any_batch` chooses the sequences at once too."""
    return best_of(spreads(shape, target, formats, session, fixed=fixed, any_batch=any_batch), slo, any_batch)


def best_of(ways: Iterable[Spread], slo: Slo = NO_SLO, any_batch: bool = False) -> Spread | None:
    """The best of those that fit and keep the bounds, the first of equal ones; None where there is none."""
    best: Spread | None = None
    for spread in ways:
        if spread.total > spread.room or not slo.kept(spread.prefill.seconds, spread.decode.seconds):
            continue
        if best is None or spread.better(best, any_batch):
            best = spread
    return best


def spreads(
    shape: ModelShape,
    target: Target,
    formats: Formats,
    session: Session,
    *,
    fixed: Degrees | None = None,
    any_batch: bool = False,
) -> Iterator[Spread]:
    """Every way to use all devices, also those that do not fit, in a fixed order."""
    every = [fixed] if fixed else degrees_of(shape, target)
    tried = ((degrees, batch) for degrees in every for batch in _batches(session.batch, degrees.data, any_batch))
    return priced(shape, target, formats, session, tried)


def priced(
    shape: ModelShape,
    target: Target,
    formats: Formats,
    session: Session,
    tried: Iterable[tuple[Degrees, int]],
) -> Iterator[Spread]:
    """Ways and batches, one after the other as they are asked for, without those that a target does not connect."""
    unit = device_unit(target)
    if unit is None:
        return
    one = _one_device(target)
    parts = parts_of(shape, formats)
    known: Known = {}
    for degrees, batch in tried:
        found = _Pricing(shape, target, one, unit, formats, parts, session, degrees, batch, known).spread()
        if found is not None:
            yield found


def degrees_of(shape: ModelShape, target: Target) -> list[Degrees]:
    """Every way to use all devices of a target; none where it has no several."""
    unit = device_unit(target)
    return [] if unit is None else list(_degrees(shape, unit.count * target.nodes, unit.count))


def _degrees(shape: ModelShape, devices: int, per_node: int) -> Iterator[Degrees]:
    for tensor in _divisors(devices):
        if tensor > max(per_node, 1) * 2 or any(x.attention.heads % tensor for x, _ in shape.kinds()):
            continue
        for pipeline in _divisors(devices // tensor):
            if pipeline > len(shape.layers):
                continue
            data = devices // tensor // pipeline
            for expert in _expert_degrees(shape, tensor, data):
                for vocabulary in dict.fromkeys((tensor, 1, tensor * pipeline)):
                    yield Degrees(tensor, pipeline, expert, data, vocabulary)


def _expert_degrees(shape: ModelShape, tensor: int, data: int) -> list[int]:
    """1: cut like products; else whole experts on so many devices, those of some copies."""
    several = [tensor * copies for copies in _divisors(data) if tensor * copies > 1] if shape.moe_layers else []
    moe = [x.mlp.experts for x, _ in shape.kinds() if x.mlp.is_moe]
    return [1, *(degree for degree in several if all(experts % degree == 0 for experts in moe))]


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _batches(batch: int, data: int, any_batch: bool) -> list[int]:
    return [data << i for i in range(13)] if any_batch else [batch]


def _one_device(target: Target) -> Target:
    from passes.place.machine import machine_of

    return machine_of(target, tensor=1).target


class _Pricing:
    """The closed form of one way."""

    def __init__(
        self,
        shape: ModelShape,
        target: Target,
        one: Target,
        unit: ComputeUnit,
        formats: Formats,
        parts: tuple[Part, ...],
        session: Session,
        degrees: Degrees,
        batch: int,
        known: Known,
    ) -> None:
        self.shape, self.target, self.one, self.formats = shape, target, one, formats
        self.parts, self.session, self.degrees, self.batch = parts, session, degrees, batch
        self.known = known
        found = next(u for u in one.units if u.name == unit.name)
        self.unit = found
        self.per_node = unit.count
        self.busy: dict[str, float] = {}
        self.times = 1
        self.stated = True  # whether all connections that are needed are

    def spread(self) -> Spread | None:
        """This way, or None where nodes would have to talk and the target does not say how."""
        d, session = self.degrees, self.session
        rows = math.ceil(self.batch / d.data)
        turn = max(1, math.ceil(rows / d.pipeline))
        decode = self._phase(turn, decode=True)
        # With as many micro-batches as stages, a token takes as long as one micro-batch needs for all stages.
        prefill = self._phase(min(session.chunk, session.prompt) * session.prompts, decode=False)
        rounds = math.ceil(self.batch / d.data)
        overlap = min(d.pipeline, rounds)
        value = rounds / session.prompts * prefill.seconds / overlap + session.generate * decode.seconds
        if not self.stated:
            return None
        tier = self.one.tier(self.unit.tier)
        room = (tier.usable_bytes if tier else None) or 0
        return Spread(d, self.batch, tuple(self._holds(rows, turn).items()), room, decode, prefill, value)

    def _holds(self, rows: int, turn: int) -> dict[str, int]:
        """Bytes of the fullest device: a stage with the embeddings or the head."""
        d = self.degrees
        weights = kv = 0
        outer: list[int] = []
        for part in self.parts:
            ways = d.expert if part.experts and d.expert > 1 else d.tensor
            if part.layer is None:
                outer.append(math.ceil(part.nbytes / d.vocabulary))
                continue
            layers = math.ceil(part.count / d.pipeline)
            weights += math.ceil(part.nbytes / ways) * layers
            if part.kv_bytes_per_token:
                split = 1 if part.layer.attention.kind == "mla" else min(d.tensor, part.layer.attention.kv_heads)
                held = rows * part.layer.kv_tokens(self.session.context) * part.kv_bytes_per_token
                kv += math.ceil(held / split) * layers
        apart = d.pipeline > 1 and d.vocabulary <= d.tensor  # embeddings in the first stage, the head in the last
        weights += max(outer) if apart else sum(outer)
        tokens = max(turn, min(self.session.chunk, self.session.prompt) * self.session.prompts)
        widest = max(
            2 * x.mlp.intermediate + 2 * x.mlp.top_k * x.mlp.expert_intermediate for x, _ in self.shape.kinds()
        )
        work = tokens * (4 * self.shape.hidden + math.ceil(widest / d.tensor)) * 4
        work += turn * math.ceil(self.shape.vocab / d.vocabulary) * 4
        return {"weights": weights, "kv": kv, "activations": work}

    def _phase(self, rows: int, *, decode: bool) -> PhaseOutcome:
        """One pass of `rows` tokens of each copy through all layers; of a prompt all its chunks."""
        self.busy = {}
        session, d = self.session, self.degrees
        passes = 1 if decode else session.passes
        seconds = 0.0
        for part in self.parts:
            last = part.group == "head" and not decode  # of a prompt only the last token needs logits
            self.times = 1 if last else part.count * passes
            ways = d.tensor if part.layer is not None else d.vocabulary
            nbytes = float(part.nbytes)
            tokens = 1.0 if last else float(rows)
            if part.group == "embedding":
                nbytes *= min(1.0, tokens / self.shape.vocab)  # rows are looked up
            if part.experts:
                if d.expert > 1:
                    ways, tokens = d.expert, rows * d.expert / d.tensor
                each = min(distinct_experts(part.experts, part.top_k, tokens), part.top_k * tokens)
                nbytes = each * part.expert_bytes
                if d.expert > 1:  # whole experts: where any is asked for, the busiest device reads at least one
                    nbytes = max(nbytes, min(1.0, each) * part.expert_bytes * ways)
                seconds += self._exchange(rows, part)
            work = Work(
                part.flops_per_token * tokens / ways, part.element, ((self.unit.tier, nbytes / ways),),
                launches=part.launches,
            )  # fmt: skip
            seconds += self._paid(work)
            if part.layer is not None and part.group == "attention":
                self.times = part.count
                seconds += self._attend(part, rows, decode)
                self.times = part.count * passes
            if part.group in ("attention", "head", "mlp") or (part.experts and d.expert == 1):
                joined = d.vocabulary if part.group == "head" else d.tensor
                seconds += self._all_reduce(1 if last else rows, joined)
        stages = (d.pipeline - 1) * passes
        hop = rows * self.shape.hidden * 2
        self.times = stages
        if stages:
            seconds += self._count("pipeline hops", self._send(hop, d.pipeline * d.tensor))
        bound = max(self.busy, key=lambda name: self.busy[name], default="nothing")
        ordered = tuple(sorted(self.busy.items(), key=lambda item: (-item[1], item[0])))
        return PhaseOutcome(seconds, bound, ordered)

    def _attend(self, part: Part, rows: int, decode: bool) -> float:
        layer, session, d = part.layer, self.session, self.degrees
        assert layer is not None
        split = 1 if layer.attention.kind == "mla" else min(d.tensor, layer.attention.kv_heads)
        if decode:
            seen = rows * layer.kv_tokens(session.decode_context)
            flops = seen * layer.attention.flops_per_pair(absorbed=True)
            read = seen * part.kv_bytes_per_token
        else:
            pairs = session.prompts * attended_pairs(layer.attention.window, session.prompt)
            flops = pairs * layer.attention.flops_per_pair(absorbed=False)
            read = session.prompt_rows * session.passes / 2 * part.kv_bytes_per_token
        work = Work(flops / d.tensor, self.formats.float_format, ((self.unit.tier, read / split),))
        return self._paid(work)

    def _paid(self, work: Work) -> float:
        asked = work.flops, work.element, work.traffic, work.launches
        paid = self.known.get(asked)
        if paid is None:
            paid = self.known[asked] = _slowest(price(work, self.unit, self.one))
        slowest, seconds, dispatch = paid
        return self._count(slowest, seconds) + self._count("dispatch", dispatch)

    def _count(self, resource: str, seconds: float) -> float:
        """Notes what a resource does `times` times, and gives the seconds of all of them."""
        seconds *= self.times
        if seconds:
            self.busy[resource] = self.busy.get(resource, 0.0) + seconds
        return seconds

    def _all_reduce(self, rows: int, ways: int) -> float:
        if ways == 1:
            return 0.0
        return self._count("all-reduce", all_reduce_seconds(self._fabric(ways), ways, rows * self.shape.hidden * 2))

    def _exchange(self, rows: int, part: Part) -> float:
        """Tokens go to their experts' devices and come back."""
        ways = self.degrees.expert
        if ways <= 1:
            return 0.0
        each = rows / self.degrees.tensor * part.top_k * self.shape.hidden * 2 * (ways - 1) / ways
        return self._count("all-to-all", 2 * self._send(each, ways))

    def _send(self, nbytes: float, span: int) -> float:
        fabric = self._fabric(span)
        rate, latency = _rate(fabric)
        return latency + nbytes / rate

    def _fabric(self, span: int) -> Fabric | None:
        if span <= self.per_node:
            return fabric_of(self.target, self.unit)
        if self.target.fabric(self.unit.tier, "cluster") is None:
            self.stated = False
        return fabric_of(self.target, self.unit, "cluster")


def _slowest(paid: Price) -> tuple[str, float, float]:
    """The resource that decides, its seconds, and those of dispatch."""
    dispatch = dict(paid.parts).get("dispatch", 0.0)
    rest = {name: seconds for name, seconds in paid.parts if name != "dispatch"}
    return max(rest, key=lambda name: rest[name], default="dispatch"), paid.seconds - dispatch, dispatch


def fabric_of(target: Target, unit: ComputeUnit, scope: str = "node") -> Fabric | None:
    """What copies of a unit talk over; without a described one, the link of each to the host, there and back."""
    found = target.fabric(unit.tier, scope) or target.fabric(unit.tier, "node")
    if found is not None:
        return found
    link = next((x for x in target.links if unit.tier in (x.from_tier, x.to_tier)), None)
    rate = link.rate() if link else None
    if link is None or rate is None:
        return None
    return Fabric(link.name, unit.tier, bandwidth=rate / 2, latency_seconds=link.latency_seconds)


def together(
    shape: ModelShape, target: Target, rows: int, passes: int = 1, ways: int = 0
) -> tuple[tuple[str, float], ...]:
    """((resource, seconds),) of what GPUs of a node (`ways` of them, 0: all) tell each other when they work on every
    layer together."""
    unit = device_unit(target)
    if unit is None or unit.count == 1:
        return ()
    each = all_reduce_seconds(fabric_of(target, unit), ways or unit.count, rows / passes * shape.hidden * 2)
    return (("all-reduce", (2 * len(shape.layers) + 1) * passes * each),)


def all_reduce_seconds(fabric: Fabric | None, ways: int, nbytes: float) -> float:
    """The faster of a ring (a step for each device) and a tree (fewer steps, more bytes in each)."""
    rate, latency = _rate(fabric)
    ring = 2 * (ways - 1) * latency + 2 * (ways - 1) / ways * nbytes / rate
    tree = 2 * math.ceil(math.log2(ways)) * (latency + nbytes / rate)
    return min(ring, tree)


def _rate(fabric: Fabric | None) -> tuple[float, float]:
    if fabric is None:
        return 1e10, _DEFAULT_LATENCY
    latency = fabric.latency_seconds if fabric.latency_seconds is not None else _DEFAULT_LATENCY
    return fabric.rate() or 1e10, latency
