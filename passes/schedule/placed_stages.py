"""A placement as stages of a decode step: what every part computes, on which unit, and what must be brought to it.

    stages = decode_stages(problem, choice)      # in the order in which a token passes them

`choice` gives each part its options (`passes.place`). Equal layers are interchangeable; `order` says which get which:
`units` those of one unit together, as a placement numbers them, so that activations cross seldom; `even` all options
spread evenly, so that what is streamed for one unit comes while others compute too. All figures are those of one
micro-batch and are computed from the parts anew, so that a simulated step is a second opinion on the closed form of the
placement, not a copy of it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from hw_targets.cost_model import Work
from passes.place.build_plan import numbered, sensitive_first
from passes.place.expert_options import missed_experts, missing_chances, most_missing
from passes.place.kv_parts import KVPart, kv_parts
from passes.place.option import CACHED, SPLIT, STREAMED, Option
from passes.place.outcome import Choice, by_part
from passes.place.parts import Part
from passes.place.problem import Problem
from passes.place.routing_model import distinct_experts

PAGE_BYTES = 4096
KV_BLOCK_BYTES = 1 << 20  # keys and values are kept together, chunk by chunk


@dataclass(frozen=True)
class Kept:
    """Bytes at home: a segment that the plan declares, read from drives in requests of `block` bytes (0: whole).

    `made` names the store that puts them there, "" for what is there from the start.
    """

    name: str
    home: str
    nbytes: int
    block: int = 0
    made: str = ""


@dataclass(frozen=True)
class Stage:
    """`work` of one micro-batch on `unit`; `entry_bytes` of activations come with it from the unit of the stage before.

    `chunks` are pieces that are brought from `chunk_home` one after another for all micro-batches, `cache_piece` those
    of keys and values for each of them (from `cache_home`, with `new_bytes` that go back). `new` is what a chunk of a
    prompt adds to a cache elsewhere. Of an expert cache at most `fetches` experts of `expert_bytes` are missing, r or
    more with the chance `chances[r - 1]`. `beside`: a stage that another unit computes at the same time; of missing
    experts those that `there` says so of, by rank, `work` being that of one. The one of rank `later` is then fetched as
    well, for later steps.
    """

    name: str
    unit: str
    work: Work
    entry_bytes: int
    kept: tuple[Kept, ...] = ()
    chunk_home: str = ""
    chunks: tuple[Kept, ...] = ()
    cache_home: str = ""
    cache_piece: int = 0
    new_bytes: int = 0
    fetches: int = 0
    expert_bytes: int = 0
    chances: tuple[float, ...] = ()
    there: tuple[bool, ...] = ()
    later: int = 0
    beside: Stage | None = None
    new: Kept | None = None


def decode_stages(problem: Problem, choice: Choice, order: str = "units") -> tuple[Stage, ...]:
    """The stages of one decode step of all sequences."""
    if order not in ("units", "even"):
        raise ValueError(f"expected the order units or even, got {order!r}")
    return StageReader(problem, choice, order == "even").stages()


class StageReader:
    """Reads the stages of a decode step, part by part."""

    def __init__(self, problem: Problem, choice: Choice, even: bool) -> None:
        self.problem, self.choice, self.even = problem, choice, even
        session = problem.session
        self.batches = min(session.micro_batches, session.batch)
        self.rows = session.batch / self.batches
        self.hidden_bytes = math.ceil(self.rows) * problem.shape.hidden * 2

    def stages(self) -> tuple[Stage, ...]:
        layers: dict[int, dict[str, tuple[Part, Option]]] = {}
        outer: dict[str, tuple[Part, Option]] = {}
        for found in by_part(self.choice).values():
            for option, numbers in _spread(found) if self.even else numbered(self.problem, found):
                for number in numbers:
                    layers.setdefault(number, {})[option.part.group] = (option.part, option)
                if not numbers:
                    outer[option.part.group] = (option.part, option)
        first = layers[min(layers)]["attention"][1].unit if layers else self.problem.machine.units[0].name
        made = [self.embedding(*outer["embedding"], first)]
        for number in sorted(layers):
            for group in ("attention", "mlp", "experts"):
                if group in layers[number]:
                    made += self.part(f"layers.{number}.{group}", *layers[number][group])
        return (*made, *self.head(*outer["head"]))

    def head(self, part: Part, option: Option) -> list[Stage]:
        return self.part("head", part, option)

    def embedding(self, part: Part, option: Option, unit: str) -> Stage:
        """Rows are looked up where they lie; from a drive each takes a page."""
        kept = (Kept("embedding", option.home, part.nbytes),) if part.nbytes else ()
        if option.home not in self.problem.machine.stores:
            return Stage("embedding", unit, Work(), 0, kept)
        pages = min(part.nbytes, PAGE_BYTES * self.problem.session.batch)
        read = (Kept("embedding.rows", option.home, pages, PAGE_BYTES),)
        rest = (Kept("embedding", option.home, part.nbytes - pages),)
        return Stage("embedding", unit, Work(), 0, rest, option.home, read)

    def part(self, name: str, part: Part, option: Option) -> list[Stage]:
        if option.mode == CACHED:
            return [self.cached(name, part, option)]
        if option.mode == SPLIT:
            return [self.split(name, part, option)]
        touched = self.touched(part)
        work = self.work(part, option.unit, touched, self.rows, part.launches)
        kept: tuple[Kept, ...] = (Kept(name, option.home, part.nbytes),)
        chunks: tuple[Kept, ...] = ()
        if option.mode == STREAMED:
            moved = min(part.nbytes, touched)
            piece = max(1, part.slot_bytes(max(1, part.top_k)) if part.experts else part.nbytes)
            count = max(1, -(-moved // piece))
            bounds = [moved * i // count for i in range(count + 1)]
            block = part.expert_bytes or part.nbytes
            chunks = tuple(Kept(f"{name}.{i}", option.home, bounds[i + 1] - bounds[i], block) for i in range(count))
            kept = (Kept(f"{name}.rest", option.home, part.nbytes - moved),) if part.nbytes > moved else ()
        home = option.home if chunks else ""
        made = [Stage(name, option.unit, work, self.hidden_bytes, kept, home, chunks)]
        if part.group == "attention":
            made += self.attend(name, part, option)
        return made

    def attend(self, name: str, part: Part, option: Option) -> list[Stage]:
        """Scores and values, on the unit of the cache or on one that the cache is brought to. Of a divided cache the
        older part first; what nothing is read of is only there."""
        made: list[Stage] = []
        unread: tuple[Kept, ...] = ()
        for kv in kv_parts(self.problem, option):
            if self.reads(part, kv, option.unit):
                made.append(self.attend_part(f"{name}.kv", part, kv))
            else:
                held = self.problem.session.batch * kv.positions * kv.row_bytes
                unread = (Kept(f"{name}.kv.{kv.home}", kv.home, held),)
        made[-1] = dataclasses.replace(made[-1], kept=(*made[-1].kept, *unread))
        return made

    def reads(self, part: Part, kv: KVPart, unit: str) -> bool:
        """Whether something of a part of the cache is read, or must be brought to it."""
        return kv.seen > 0 or not kv.newer

    def attend_part(self, name: str, part: Part, kv: KVPart) -> Stage:
        session, layer, target = self.problem.session, part.layer, self.problem.machine
        assert layer is not None
        name = f"{name}.{kv.home}" if kv.newer else name
        read = math.ceil(self.rows * kv.seen * kv.row_bytes)
        held = session.batch * kv.positions * kv.row_bytes
        unit = target.unit(kv.unit)
        flops = self.rows * kv.seen * layer.attention.flops_per_pair(absorbed=True)
        work = Work(flops, self.problem.formats.float_format, ((unit.tier, float(read)),))
        attention = layer.attention
        entry = math.ceil(self.rows) * 2
        entry *= attention.heads * (attention.head_dim + attention.value_dim) + attention.kv_elements
        if kv.home == unit.tier:
            return Stage(name, unit.name, work, entry, (Kept(name, kv.home, held),))
        new = math.ceil(self.rows * kv.row_bytes)
        piece = max(0, min(read, held // self.batches - new))
        rest = held - self.batches * (piece + new)
        kept = (Kept(f"{name}.rest", kv.home, max(0, rest)),)
        return Stage(name, unit.name, work, entry, kept, cache_home=kv.home, cache_piece=piece, new_bytes=new)

    def cached(self, name: str, part: Part, option: Option) -> Stage:
        """Experts in slots of the unit's tier; those that are missing come one by one."""
        tier = self.problem.machine.unit(option.unit).tier
        needed = self.needed(part, self.rows)
        fetches = most_missing(needed)
        each = min(math.ceil(self.problem.missed_bytes(part, option.slots, option.hit)), part.nbytes // fetches)
        missing = tuple(Kept(f"{name}.missing.{i}", option.home, each) for i in range(fetches))
        rest = part.nbytes - fetches * each
        kept = (
            *missing,
            *((Kept(f"{name}.rest", option.home, rest),) if rest > 0 else ()),
            Kept(f"{name}.cache", tier, part.slot_bytes(option.slots)),
        )
        work = self.work(part, option.unit, math.ceil(needed * part.asked_bytes(self.rows)), self.rows, part.launches)
        there: tuple[bool, ...] = ()
        later, far, chances = 0, None, missing_chances(needed, option.hit)
        if option.helper:
            divided = missed_experts(self.problem, option, self.rows, chances)
            there, later = divided.there, divided.later
            far = self.far(name, part, option, 1.0 / needed, part.expert_bytes, ()) if any(there) else None
        return Stage(
            name, option.unit, work, self.hidden_bytes, kept, option.home,
            fetches=fetches, expert_bytes=each, chances=chances, there=there, later=later, beside=far,
        )  # fmt: skip

    def far(self, name: str, part: Part, option: Option, share: float, nbytes: float, kept: tuple[Kept, ...]) -> Stage:
        """What the helper of an option computes: a share of the experts' work, `nbytes` of them."""
        helper = option.helper
        each = self.rows * part.top_k / part.experts
        work = self.work(part, helper, math.ceil(nbytes), self.rows * share, part.launches)
        return Stage(f"{name}.far", helper, dataclasses.replace(work, rows=each), self.hidden_bytes, kept)

    def split(self, name: str, part: Part, option: Option) -> Stage:
        """Some experts on the unit, the others computed by the helper where they lie."""
        tier, helper = self.problem.machine.unit(option.unit).tier, self.problem.machine.unit(option.helper)
        needed, here = self.needed(part, self.rows), option.slots * part.expert_bytes
        near = self.share_here(part, option)
        kept = Kept(f"{name}.far", helper.tier, part.nbytes - here)
        far = self.far(name, part, option, 1 - near, needed * (1 - near) * part.expert_bytes, (kept,))
        near_rows, near_bytes = self.rows * near, needed * near * part.expert_bytes
        work = self.work(part, option.unit, math.ceil(near_bytes), near_rows, part.launches)
        return Stage(name, option.unit, work, self.hidden_bytes, (Kept(name, tier, here),), beside=far)

    def share_here(self, part: Part, option: Option) -> float:
        """The share of a split that the unit itself computes."""
        return option.hit

    def work(self, part: Part, unit: str, nbytes: int, rows: float, launches: int) -> Work:
        tier = self.problem.machine.unit(unit).tier
        each = rows * part.top_k / part.experts if part.experts else rows
        return Work(part.flops_per_token * rows, part.element, ((tier, float(nbytes)),), launches=launches, rows=each)

    def needed(self, part: Part, rows: float) -> float:
        """Experts that a micro-batch touches."""
        return min(distinct_experts(part.experts, part.top_k, rows), part.top_k * rows)

    def touched(self, part: Part) -> int:
        return math.ceil(part.asked_bytes(self.rows) * self.needed(part, self.rows)) if part.experts else part.nbytes


def _spread(found: list[tuple[Option, int]]) -> list[tuple[Option, tuple[int, ...]]]:
    """The layers of a part dealt to its options so that each option's are as far apart as they can be."""
    part = found[0][0].part
    if not part.layers:
        return [(option, ()) for option, _ in found]
    turns = [((2 * turn + 1) / (2 * count), at) for at, (_, count) in enumerate(found) for turn in range(count)]
    taken: list[list[int]] = [[] for _ in found]
    for layer, (_, at) in zip(part.layers, sorted(turns), strict=True):
        taken[at].append(layer)
    return sensitive_first([(option, tuple(numbers)) for (option, _), numbers in zip(found, taken, strict=True)])
