"""A placement as stages of a prompt: chunk by chunk, every layer streamed once for each, attention over all before it.

    for chunk in range(problem.session.passes): stages = prompt_stages(problem, choice, chunk)

A chunk of many tokens uses all experts of a layer: those that are streamed come whole, of a cache what its slots do not
hold, and a split computes on both sides in the proportion of experts. What lies by a slow unit is computed by the unit
that the placement chose for prompts, to which it is moved. Keys and values that are at home elsewhere than by the unit
that attends are kept chunk by chunk: each chunk reads the earlier ones (of a window those inside) and puts its own
beside them. Only the last chunk passes the head, with one row a prompt. As in the closed form all chunks are equal.
"""

from __future__ import annotations

import dataclasses
import itertools
import math

from hw_targets.cost_model import Work
from passes.place.expert_options import missed_experts
from passes.place.kv_parts import KVPart
from passes.place.option import CACHED, RESIDENT, SPLIT, Option
from passes.place.outcome import Choice
from passes.place.parts import Part
from passes.place.problem import Problem
from passes.schedule.placed_stages import KV_BLOCK_BYTES, PAGE_BYTES, Kept, Stage, StageReader
from passes.schedule.placed_streams import storable

_PIECES = 4  # of keys and values that were there before a plan begins


def prompt_stages(
    problem: Problem, choice: Choice, chunk: int, order: str = "units", first: int = 0
) -> tuple[Stage, ...]:
    """The stages of one chunk of a prompt, layers in one of the orders of `decode_stages`, in a plan that begins with
    the chunk `first`."""
    return _PromptReader(problem, choice, order == "even", chunk, first).stages()


class _PromptReader(StageReader):
    def __init__(self, problem: Problem, choice: Choice, even: bool, chunk: int, first: int) -> None:
        super().__init__(problem, choice, even)
        self.chunk, self.first, self.passes = chunk, first, problem.session.passes
        self.batches = 1
        self.rows = problem.session.prompt / self.passes
        self.hidden_bytes = math.ceil(self.rows) * problem.shape.hidden * 2

    def head(self, part: Part, option: Option) -> list[Stage]:
        if self.chunk < self.passes - 1:
            return []
        last = _PromptReader(self.problem, self.choice, self.even, self.chunk, self.first)
        last.rows, last.hidden_bytes = 1.0, self.problem.shape.hidden * 2
        return last.part("head", part, option)

    def embedding(self, part: Part, option: Option, unit: str) -> Stage:
        """Rows are looked up where they lie; from a drive each takes a page, a few at a time."""
        if option.home not in self.problem.machine.stores:
            return super().embedding(part, option, unit)
        pages = min(part.nbytes, PAGE_BYTES * math.ceil(self.rows))
        piece = max(PAGE_BYTES, self.problem.workspace_bytes() // 8)
        count = max(1, -(-pages // piece))
        bounds = [pages * i // count for i in range(count + 1)]
        reads = [Kept(f"embedding.rows.{i}", option.home, bounds[i + 1] - bounds[i], PAGE_BYTES) for i in range(count)]
        rest = (Kept("embedding", option.home, part.nbytes - pages),)
        return Stage("embedding", unit, Work(), 0, rest, option.home, tuple(reads))

    def part(self, name: str, part: Part, option: Option) -> list[Stage]:
        if option.mode == CACHED:
            return [self.cached(name, part, option)]
        if option.mode == SPLIT:
            return [self.split(name, part, option)]
        at = option.prefill_unit or option.unit
        work = self.work(part, at, self.touched(part), self.rows, part.launches)
        if option.mode == RESIDENT and at == option.unit:
            made = [Stage(name, at, work, self.hidden_bytes, (Kept(name, option.home, part.nbytes),))]
        else:
            made = [self.streamed(name, part, option, at, work, part.nbytes)]
        if part.group == "attention":
            made += self.attend(name, part, option)
        return made

    def streamed(self, name: str, part: Part, option: Option, unit: str, work: Work, moved: int) -> Stage:
        """Work on a part of which `moved` bytes are brought in pieces as the placement's buffers are made for."""
        piece = max(1, part.slot_bytes(max(1, part.top_k)) if part.experts else part.nbytes)
        count = max(1, -(-moved // piece))
        bounds = [moved * i // count for i in range(count + 1)]
        block = part.expert_bytes or part.nbytes
        chunks = tuple(Kept(f"{name}.{i}", option.home, bounds[i + 1] - bounds[i], block) for i in range(count))
        kept = (Kept(f"{name}.rest", option.home, part.nbytes - moved),) if part.nbytes > moved else ()
        return Stage(name, unit, work, self.hidden_bytes, kept, option.home, chunks)

    def reads(self, part: Part, kv: KVPart, unit: str) -> bool:
        return not kv.newer or (self.pairs(part, kv) > 0 if kv.unit != unit else self.places_of(kv) > 0)

    def pairs(self, part: Part, kv: KVPart) -> float:
        """Pairs of the chunk's tokens and what they attend to in a part of the cache."""
        assert part.layer is not None
        window = part.layer.attention.window
        first, last = round(self.chunk * self.rows), round((self.chunk + 1) * self.rows)
        return kv.pairs(window, last) - (kv.pairs(window, first) if first else 0.0)

    def places_of(self, kv: KVPart) -> int:
        """Chunks of the prompt that come to a part of the cache in its course."""
        return max(0, self.passes - int(kv.newer // self.rows))

    def attend_part(self, name: str, part: Part, kv: KVPart) -> Stage:
        problem, session, layer = self.problem, self.problem.session, part.layer
        assert layer is not None
        name = f"{name}.{kv.home}" if kv.newer else name
        attention, unit = layer.attention, problem.machine.unit(kv.unit)
        pairs = self.pairs(part, kv)
        every = self.pairs(part, KVPart("", "", 0, layer.kv_tokens(session.context), 0))
        read = (self.chunk + 0.5) * self.rows * kv.row_bytes * pairs / every
        flops = pairs * attention.flops_per_pair(absorbed=False)
        work = Work(flops, problem.formats.float_format, ((unit.tier, read),))
        entry = math.ceil(self.rows) * 2
        entry *= attention.heads * (attention.head_dim + attention.value_dim) + attention.kv_elements
        held = session.batch * kv.positions * kv.row_bytes
        if kv.home == unit.tier:
            return Stage(name, unit.name, work, entry, (Kept(name, kv.home, held),))
        piece = min(held, math.ceil(self.rows * kv.row_bytes))
        places, newer, coming = max(1, held // max(1, piece)), int(kv.newer // self.rows), self.places_of(kv)
        before = min(self.chunk, places, math.ceil(attention.window / self.rows) if attention.window else self.chunk)
        stored = storable(problem.machine, kv.home, unit.tier)

        def chunk_of(number: int) -> Kept:
            made = f"{name} of {number}" if stored else ""
            return Kept(f"{name}.{number % places}", kv.home, piece, KV_BLOCK_BYTES, made)

        # What was there before the plan begins comes in a few pieces, unless a window lets go of it chunk by chunk.
        joined = max(0, self.first - newer) if before == self.chunk and places >= coming else 0
        bounds = [joined * piece * i // min(_PIECES, joined or 1) for i in range(min(_PIECES, joined or 1) + 1)]
        earlier = tuple(
            Kept(f"{name}.before.{i}", kv.home, end - start, KV_BLOCK_BYTES)
            for i, (start, end) in enumerate(itertools.pairwise(bounds)) if end > start
        )  # fmt: skip
        used = min(places, coming)
        kept = (*earlier, *(chunk_of(i) for i in range(joined, used)))
        rest = Kept(f"{name}.rest", kv.home, held - used * piece)
        return Stage(
            name, unit.name, work, entry, (*kept, rest), kv.home,
            (*earlier, *(chunk_of(i) for i in range(max(joined, self.chunk - before), self.chunk - newer))),
            new=chunk_of(self.chunk) if stored and self.chunk < coming else None,
        )  # fmt: skip

    def cached(self, name: str, part: Part, option: Option) -> Stage:
        """Of the experts that are touched, those come that the slots do not hold, or the helper computes them."""
        tier = self.problem.machine.unit(option.unit).tier
        needed = self.needed(part, self.rows)
        lacking = needed * max(0.0, 1.0 - option.slots / part.experts)
        share, away, far = 0.0, 0.0, None
        if option.helper:
            count = max(1, math.ceil(lacking - 1e-9))
            there = missed_experts(self.problem, option, self.rows, (lacking / count,) * count).there
            away = lacking * sum(there) / len(there)
            share = away / needed
            far = self.far(name, part, option, share, away * part.expert_bytes, ()) if away else None
        nbytes = math.ceil(self.touched(part) * (1.0 - share))
        work = self.work(part, option.unit, nbytes, self.rows * (1.0 - share), part.launches)
        work = dataclasses.replace(work, rows=self.rows * part.top_k / part.experts)
        moved = math.ceil((lacking - away) * part.rest_bytes(option.slots))
        stage = self.streamed(name, part, option, option.unit, work, moved)
        slots = Kept(f"{name}.cache", tier, part.slot_bytes(option.slots))
        return dataclasses.replace(stage, kept=(*stage.kept, slots), beside=far)

    def share_here(self, part: Part, option: Option) -> float:
        return option.slots / part.experts
