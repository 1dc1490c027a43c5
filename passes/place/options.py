"""Every way to keep and compute a part, each with what it takes: seconds of both phases, bytes of every tier.

    for option in options_of(problem, part): option.decode.path, option.decode.streams, option.holds

Modes: `resident` (in the memory of the unit that computes), `streamed` (moved there for every pass), `cached` (experts:
some slots, the rest moved when it is asked for), `split` (experts: the popular ones here, the others computed where
they lie). Attention chooses where its cache lies and who attends: the unit itself, or the unit beside the cache.

`path` is what tokens wait for, in turn; `streams` run beside it. Both are kept by resource, so that a sum over parts
says what bounds a phase.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.target import ComputeUnit
from passes.place.parts import Part
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts

RESIDENT, STREAMED, CACHED, SPLIT = "resident", "streamed", "cached", "split"
_SLOT_STEPS = 12


@dataclass
class PhaseCost:
    """Seconds by resource. `unit_seconds` is the path by unit (what micro-batches overlap)."""

    path: dict[str, float] = field(default_factory=dict)
    streams: dict[str, float] = field(default_factory=dict)
    unit_seconds: dict[str, float] = field(default_factory=dict)

    def wait(self, unit: str, resource: str, seconds: float) -> None:
        """Time on the path of tokens, at `unit`."""
        if seconds:
            self.path[resource] = self.path.get(resource, 0.0) + seconds
            self.unit_seconds[unit] = self.unit_seconds.get(unit, 0.0) + seconds

    def beside(self, resource: str, seconds: float) -> None:
        """Time of a resource beside the path."""
        if seconds:
            self.streams[resource] = self.streams.get(resource, 0.0) + seconds

    @property
    def waited(self) -> float:
        return sum(self.path.values())


@dataclass(eq=False)
class Option:
    """One way for one part. `holds` is ((tier or storage, category, bytes), ...) of one layer, `buffer` one piece of a
    stream ((tier, bytes), ...), of which the plan keeps `depth`, shared by all layers."""

    part: Part
    unit: str
    home: str
    mode: str
    slots: int = 0
    kv_home: str = ""
    kv_unit: str = ""
    helper: str = ""  # the unit that computes the rest of a split
    prefill_unit: str = ""
    holds: tuple[tuple[str, str, int], ...] = ()
    buffer: tuple[tuple[str, int], ...] = ()
    decode: PhaseCost = field(default_factory=PhaseCost)
    prefill: PhaseCost = field(default_factory=PhaseCost)
    hit: float = 1.0

    def unit_at(self, prefill: bool) -> str:
        """Who computes it: decode steps or prompts."""
        return self.prefill_unit if prefill and self.prefill_unit else self.unit

    @property
    def label(self) -> str:
        """All that tells it from the others of its part."""
        kv = f" kv={self.kv_home}@{self.kv_unit}" if self.kv_home else ""
        slots = f" slots={self.slots}" if self.slots else ""
        rest = f" rest@{self.helper}" if self.helper else ""
        prefill = f" prefill@{self.prefill_unit}" if self.prefill_unit != self.unit else ""
        return f"{self.mode} {self.home}->{self.unit}{slots}{kv}{rest}{prefill}"


def options_of(problem: Problem, part: Part) -> list[Option]:
    """Every option of a part that its pins allow, in a fixed order; empty when the pins contradict each other."""
    machine = problem.machine
    if part.group == "embedding":
        found = [_embedding(problem, part, home) for home in (*machine.tiers, *machine.stores)]
    elif part.group == "attention":
        found = list(_attention(problem, part))
    elif part.group == "experts":
        found = list(_experts(problem, part))
    else:
        found = list(_dense(problem, part))
    pins = [pin for pin in problem.pins if pin.concerns(part)]
    return [option for option in found if all(_allowed(pin.group, pin.where, option) for pin in pins)]


def option_with(problem: Problem, part: Part, mode: str, unit: str, home: str, slots: int) -> Option | None:
    """The cached or split option with any number of slots; None when the machine has no such way."""
    units = {u.name: u for u in problem.machine.units}
    if unit not in units or not 0 < slots <= part.experts or home == units[unit].tier:
        return None
    if home not in dict(problem.machine.room) or problem.machine.way(home, units[unit].tier) is None:
        return None
    if mode == CACHED:
        return _cached(problem, part, units[unit], home, slots)
    helpers = problem.machine.units_of(home)
    return _split(problem, part, units[unit], helpers[0], slots) if helpers else None


def _allowed(group: str, where: str, option: Option) -> bool:
    if group == "kv":
        return where in (option.kv_home, option.kv_unit)
    return where in (option.home, option.unit, option.mode) or where in option.part.recipes


# -- the kinds of parts ------------------------------------------------------------------------------------------------


def _embedding(problem: Problem, part: Part, home: str) -> Option:
    """Rows are looked up where they lie; from a drive each costs a read of a page."""
    option = Option(part, problem.machine.units[0].name, home, RESIDENT, prefill_unit=problem.machine.units[0].name)
    option.holds = ((home, "weights", part.nbytes),) if part.nbytes else ()
    store = problem.machine.target.store(home) if home in problem.machine.stores else None
    if store is not None:
        page = 4096 * problem.session.batch
        option.decode.wait(option.unit, f"{home} read", page / (store.read_rate(4096) or 1e6))
        option.prefill.wait(
            option.unit, f"{home} read", 4096 * problem.session.prompt_rows / (store.read_rate(4096) or 1e6)
        )
    return option


def _homes(problem: Problem) -> Iterator[tuple[ComputeUnit, str, str]]:
    """(unit, home, mode) of whole parts, resident before streamed."""
    machine = problem.machine
    for unit in machine.units:
        yield unit, unit.tier, RESIDENT
        for home in (*machine.tiers, *machine.stores):
            if home != unit.tier and machine.way(home, unit.tier) is not None:
                yield unit, home, STREAMED


def _dense(problem: Problem, part: Part) -> Iterator[Option]:
    for unit, home, mode in _homes(problem):
        for at_prefill in _prefill_units(problem, unit, mode):
            option = Option(part, unit.name, home, mode, prefill_unit=at_prefill.name)
            _keep_weights(option, unit, part.nbytes, problem)
            _whole_part(problem, option, option.decode, unit, _tokens(problem))
            _whole_part(problem, option, option.prefill, at_prefill, None)
            yield option


def _attention(problem: Problem, part: Part) -> Iterator[Option]:
    machine, session = problem.machine, problem.session
    assert part.layer is not None
    held = session.batch * part.layer.kv_tokens(session.context) * part.kv_bytes_per_token
    for unit, home, mode in _homes(problem):
        places = [(unit.tier, unit)]
        for kv_home in (*machine.tiers, *machine.stores):
            if kv_home == unit.tier:
                continue
            beside = machine.units_of(kv_home)
            if beside and machine.way(unit.tier, kv_home) is not None:
                places.append((kv_home, beside[0]))  # attention near the cache
            if machine.way(kv_home, unit.tier) is not None:
                places.append((kv_home, unit))
        for kv_home, kv_unit in places:
            option = Option(part, unit.name, home, mode, kv_home=kv_home, kv_unit=kv_unit.name, prefill_unit=unit.name)
            _keep_weights(option, unit, part.nbytes, problem)
            option.holds = (*option.holds, (kv_home, "kv", held))
            _whole_part(problem, option, option.decode, unit, _tokens(problem))
            _whole_part(problem, option, option.prefill, unit, None)
            _attend(problem, option, unit, kv_unit)
            yield option


def _experts(problem: Problem, part: Part) -> Iterator[Option]:
    machine, session = problem.machine, problem.session
    yield from _dense(problem, part)
    grid = slot_grid(part.experts, part.top_k)
    for unit in machine.units:
        for home in (*machine.tiers, *machine.stores):
            if home == unit.tier or machine.way(home, unit.tier) is None:
                continue
            for slots in grid:
                yield _cached(problem, part, unit, home, slots)
            for helper in machine.units_of(home):
                for slots in grid:
                    if slots * part.expert_bytes <= machine.room_of(unit.tier) and session.batch < 64:
                        yield _split(problem, part, unit, helper, slots)


def slot_grid(experts: int, top_k: int) -> tuple[int, ...]:
    """Numbers of slots to choose from: from one token's experts to all but one, finer where few."""
    low, high = max(1, top_k), experts - 1
    if high < low:
        return ()
    steps = [low * (high / low) ** (i / (_SLOT_STEPS - 1)) for i in range(_SLOT_STEPS)]
    return tuple(sorted({round(s) for s in steps}))


# -- what they cost ----------------------------------------------------------------------------------------------------


def _tokens(problem: Problem) -> int:
    return problem.session.batch


def _prefill_units(problem: Problem, unit: ComputeUnit, mode: str) -> list[ComputeUnit]:
    """Who computes a prompt: the unit itself; of what lies by a slow one also a faster one, to which it is moved."""
    if mode != RESIDENT or not problem.move_for_prompts:
        return [unit]
    others = [
        other
        for other in problem.machine.units
        if other.kind == "gpu" and other.tier != unit.tier and problem.machine.way(unit.tier, other.tier) is not None
    ]
    return [unit, *others]


def _keep_weights(option: Option, unit: ComputeUnit, nbytes: int, problem: Problem) -> None:
    """The bytes at home, and one piece of the stream where it passes through."""
    option.holds = ((option.home, "weights", nbytes),)
    part = option.part
    goals = dict.fromkeys(
        goal
        for u in dict.fromkeys((unit.name, option.prefill_unit))
        for _, goal in problem.machine.way(option.home, problem.machine.unit(u).tier) or ()
    )
    piece = nbytes if not part.experts else min(nbytes, part.expert_bytes * max(1, part.top_k))
    option.buffer = tuple((goal, piece) for goal in goals)


def _whole_part(problem: Problem, option: Option, cost: PhaseCost, unit: ComputeUnit, tokens: int | None) -> None:
    """All of a part passes on `unit`: once for a decode step of `tokens`, once for every chunk when that is None."""
    session, part = problem.session, option.part
    if tokens is None and part.group == "head":
        passes, rows, reads = 1, float(session.prompts), 1  # of a prompt only the last token needs logits
    elif tokens is None:
        passes, rows, reads = session.passes, session.prompt_rows / session.passes, 1
    else:
        passes, rows, reads = 1, float(tokens), min(session.micro_batches, tokens)
    touched = part.nbytes
    if part.experts:
        each = distinct_experts(part.experts, part.top_k, rows / reads)
        touched = math.ceil(part.expert_bytes * min(each, part.top_k * rows))
    _compute(problem, cost, unit, part, touched * reads, rows, passes)
    moved = touched if part.experts and tokens is not None else part.nbytes
    _stream(problem, cost, option.home, unit.tier, moved * passes, part)


def _compute(
    problem: Problem, cost: PhaseCost, unit: ComputeUnit, part: Part, nbytes: float, rows: float, passes: int
) -> None:
    each = rows * part.top_k / part.experts if part.experts else rows
    work = Work(part.flops_per_token * rows, part.element, ((unit.tier, nbytes),), launches=part.launches, rows=each)
    paid = price(work, unit, problem.machine.target)
    parts = dict(paid.parts)
    dispatch = parts.pop("dispatch", 0.0)
    bound = max(parts, key=lambda name: parts[name], default="dispatch")
    cost.wait(unit.name, bound, (paid.seconds - dispatch) * passes)
    cost.wait(unit.name, "dispatch", dispatch * passes)


def _stream(problem: Problem, cost: PhaseCost, home: str, tier: str, nbytes: float, part: Part) -> None:
    """Moving bytes beside the path."""
    block = part.expert_bytes or part.nbytes
    for source, goal in problem.machine.way(home, tier) or ():
        resource, seconds = transfer_time(problem.machine.target, source, goal, nbytes, block)
        cost.beside(resource, seconds)


def _attend(problem: Problem, option: Option, unit: ComputeUnit, kv_unit: ComputeUnit) -> None:
    """Scores and values: the cache is read by `kv_unit`, moved to it first when it lies elsewhere."""
    session, layer, target = problem.session, option.part.layer, problem.machine.target
    assert layer is not None
    seen = layer.kv_tokens(session.decode_context)
    read = session.batch * seen * option.part.kv_bytes_per_token
    flops = session.batch * seen * layer.attention.flops_per_pair(absorbed=True)
    element = problem.formats.float_format
    at_home = option.kv_home == kv_unit.tier
    paid = price(Work(flops, element, ((kv_unit.tier, read),)), kv_unit, target)
    option.decode.wait(kv_unit.name, paid.bound, paid.seconds)
    pairs = session.prompts * attended_pairs(layer.attention.window, session.prompt)
    prompt_read = session.prompt_rows * session.passes / 2 * option.part.kv_bytes_per_token
    flops = pairs * layer.attention.flops_per_pair(absorbed=False)
    paid = price(Work(flops, element, ((kv_unit.tier, prompt_read),)), kv_unit, target)
    option.prefill.wait(kv_unit.name, paid.bound, paid.seconds)
    if not at_home:
        for source, goal in problem.machine.way(option.kv_home, kv_unit.tier) or ():
            resource, seconds = transfer_time(target, source, goal, read)
            option.decode.beside(resource, seconds)
            option.buffer = (*option.buffer, (goal, math.ceil(read / max(1, session.micro_batches))))
        _write_back(problem, option, kv_unit.tier)
    elif kv_unit.name != unit.name:
        row = (layer.attention.heads * (layer.attention.head_dim + layer.attention.value_dim)) * 2
        row += layer.attention.kv_elements * 2
        cross(problem, option.decode, unit.name, unit.tier, kv_unit.tier, session.batch * row)
        cross(problem, option.prefill, unit.name, unit.tier, kv_unit.tier, session.prompt_rows * row)


def _write_back(problem: Problem, option: Option, tier: str) -> None:
    """New keys and values go home."""
    session = problem.session
    for cost, tokens in ((option.decode, session.batch), (option.prefill, session.prompt_rows)):
        hops = problem.machine.way(option.kv_home, tier) or ()
        for goal, source in reversed(hops):
            try_bytes = tokens * option.part.kv_bytes_per_token
            store = problem.machine.target.store(goal) if problem.machine.target.tier(goal) is None else None
            if store is not None and store.write_rate() is None:
                continue
            resource, seconds = transfer_time(problem.machine.target, source, goal, try_bytes)
            cost.beside(resource, seconds)


def cross(problem: Problem, cost: PhaseCost, unit: str, first: str, second: str, nbytes: float) -> None:
    """Activations of `nbytes` together go from one memory to another and come back: waited for."""
    target = problem.machine.target
    for source, goal in problem.machine.way(first, second) or ():
        link = target.link_between(source, goal)
        resource, seconds = transfer_time(target, source, goal, nbytes)
        cost.wait(unit, resource, seconds + 2 * ((link.latency_seconds if link else None) or 0.0))


def attended_pairs(window: int, prompt: int) -> float:
    """Pairs of a token and one it attends to in a causal prompt."""
    if not window or window >= prompt:
        return prompt * (prompt + 1) / 2
    return window * (window + 1) / 2 + (prompt - window) * window


def _cached(problem: Problem, part: Part, unit: ComputeUnit, home: str, slots: int) -> Option:
    """Experts in slots; a miss is waited for as far as the experts that are there do not take as long."""
    session = problem.session
    option = Option(part, unit.name, home, CACHED, slots=slots, prefill_unit=unit.name)
    _keep_weights(option, unit, part.nbytes, problem)
    option.holds = (*option.holds, (unit.tier, "cache", slots * part.expert_bytes))
    option.hit = problem.cached(part.experts, part.top_k, slots, session.batch)
    needed = min(distinct_experts(part.experts, part.top_k, session.batch), part.top_k * session.batch)
    missed = needed * (1.0 - option.hit) * part.expert_bytes
    _compute(problem, option.decode, unit, part, needed * part.expert_bytes, session.batch, 1)
    moves = PhaseCost()
    _stream(problem, moves, home, unit.tier, missed, part)
    slowest = max(moves.streams, key=lambda name: moves.streams[name], default="")
    waiting = max(0.0, moves.streams.get(slowest, 0.0) - option.decode.waited * option.hit)
    for resource, seconds in moves.streams.items():
        option.decode.beside(resource, seconds - waiting if resource == slowest else seconds)
    option.decode.wait(unit.name, slowest, waiting)
    rows = session.prompt_rows / session.passes
    touched = min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)
    _compute(problem, option.prefill, unit, part, touched * part.expert_bytes, rows, session.passes)
    lacking = touched * max(0.0, 1.0 - slots / part.experts) * part.expert_bytes
    _stream(problem, option.prefill, home, unit.tier, lacking * session.passes, part)
    return option


def _split(problem: Problem, part: Part, unit: ComputeUnit, helper: ComputeUnit, slots: int) -> Option:
    """The popular experts on `unit`, the others computed by `helper` where they lie, both at the same time."""
    session = problem.session
    option = Option(part, unit.name, helper.tier, SPLIT, slots=slots, helper=helper.name, prefill_unit=unit.name)
    here = slots * part.expert_bytes
    option.holds = ((unit.tier, "weights", here), (helper.tier, "weights", part.nbytes - here))
    option.hit = problem.popular(part.experts, part.top_k, slots, session.batch)
    for cost, rows, passes in (
        (option.decode, float(session.batch), 1),
        (option.prefill, session.prompt_rows / session.passes, session.passes),
    ):
        needed = min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)
        share = option.hit if cost is option.decode else slots / part.experts
        near, far = PhaseCost(), PhaseCost()
        _compute(problem, near, unit, part, needed * share * part.expert_bytes, rows * share, passes)
        _compute(problem, far, helper, part, needed * (1 - share) * part.expert_bytes, rows * (1 - share), passes)
        slower, name = (near, unit.name) if near.waited >= far.waited else (far, helper.name)
        for resource, seconds in slower.path.items():
            cost.wait(name, resource, seconds)
        for resource, seconds in (far if slower is near else near).path.items():
            cost.beside(resource, seconds)
        width = problem.shape.hidden * 2
        cross(problem, cost, unit.name, unit.tier, helper.tier, 2 * rows * passes * width)
    return option
