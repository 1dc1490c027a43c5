"""Every way to keep and compute a part, each with what it takes: seconds of both phases, bytes of every tier.

    for option in options_of(problem, part): option.decode.path, option.decode.streams, option.holds

Modes: `resident` (in the memory of the unit that computes), `streamed` (moved there for every pass), and for experts
`cached` and `split` (`passes.place.expert_options`). Attention chooses where its cache lies and who attends: the unit
itself, or the unit beside the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.target import ComputeUnit
from passes.place.expert_options import expert_ways, kernels_for
from passes.place.kv_division import KVPart, attended_pairs, kv_parts, with_share
from passes.place.machine import Machine
from passes.place.option import RESIDENT, STREAMED, Option, PhaseCost, compute_part, cross, keep_weights, move_part
from passes.place.parts import Part
from passes.place.problem import NEAR, Problem
from passes.place.routing_model import distinct_experts


def options_of(problem: Problem, part: Part) -> list[Option]:
    """Every option of a part that its pins allow, in a fixed order; empty when the pins contradict each other."""
    machine = problem.machine
    if part.group == "embedding":
        found = [_embedding(problem, part, home) for home in (*machine.tiers, *machine.stores)]
    elif part.group == "attention":
        found = list(_attention(problem, part))
    elif part.group == "experts":
        found = [*_dense(problem, part), *expert_ways(problem, part)]
    else:
        found = list(_dense(problem, part))
    pins = [pin for pin in problem.pins if pin.concerns(part)]
    for pin in pins:
        if pin.share is not None and part.group == "attention":
            found = with_share(problem, found, pin.where, pin.share)
        elif pin.share is not None and part.group == "experts":
            found = found if _has_share(part, pin.where, pin.share) else []
    plain = [pin for pin in pins if pin.share is None]
    return [option for option in found if all(_allowed(pin.group, pin.where, option, machine) for pin in plain)]


def _has_share(part: Part, recipe: str, share: float) -> bool:
    """Whether that share of a layer's experts has the recipe, those that lose most of it."""
    count = round(share * part.experts)
    if part.mix is None:
        return count == (part.experts if recipe in part.recipes else 0)
    return part.mix.recipes[0] == recipe and part.mix.counts[0] == count


def _allowed(group: str, where: str, option: Option, machine: Machine) -> bool:
    if group == "kv" and where == NEAR:
        return any(unit.name == option.kv_unit and unit.tier == option.kv_home for unit in machine.units)
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
        if not kernels_for(part, [unit]):
            continue
        for at_prefill in kernels_for(part, _prefill_units(problem, unit, mode)):
            option = Option(part, unit.name, home, mode, prefill_unit=at_prefill.name)
            keep_weights(option, unit, part.nbytes, problem)
            _whole_part(problem, option, option.decode, unit, _tokens(problem))
            _whole_part(problem, option, option.prefill, at_prefill, None)
            yield option


def _attention(problem: Problem, part: Part) -> Iterator[Option]:
    machine = problem.machine
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
        like = Option(part, unit.name, home, mode, prefill_unit=unit.name)
        for kv_home, kv_unit in places:
            yield attention_option(problem, like, (kv_home, kv_unit.name))


def attention_option(
    problem: Problem, like: Option, kv: tuple[str, str], older: tuple[str, str] = ("", ""), old: int = 0
) -> Option:
    """Weights as `like` has them, the cache at a place, attended to by a unit; the oldest `old` positions of it at
    another place."""
    part, unit = like.part, problem.machine.unit(like.unit)
    assert part.layer is not None
    option = Option(
        part, unit.name, like.home, like.mode, kv_home=kv[0], kv_unit=kv[1], kv_old=old, old_home=older[0],
        old_unit=older[1], prefill_unit=unit.name,
    )  # fmt: skip
    keep_weights(option, unit, part.nbytes, problem)
    _whole_part(problem, option, option.decode, unit, _tokens(problem))
    _whole_part(problem, option, option.prefill, unit, None)
    for kv_part in kv_parts(problem, option):
        held = problem.session.batch * kv_part.positions * part.kv_bytes_per_token
        option.holds = (*option.holds, (kv_part.home, "kv", held))
        _attend(problem, option, unit, kv_part)
    return option


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
        touched = math.ceil(part.asked_bytes(rows / reads) * min(each, part.top_k * rows))
    compute_part(problem, cost, unit, part, touched * reads, rows, passes)
    moved = touched if part.experts and tokens is not None else part.nbytes
    move_part(problem, cost, option.home, unit.tier, moved * passes, part)


def _attend(problem: Problem, option: Option, unit: ComputeUnit, kv: KVPart) -> None:
    """Scores and values of a part of the cache: read by its unit, moved to it first when it lies elsewhere."""
    session, layer, target = problem.session, option.part.layer, problem.machine.target
    assert layer is not None
    kv_unit = problem.machine.unit(kv.unit)
    read = session.batch * kv.seen * option.part.kv_bytes_per_token
    flops = session.batch * kv.seen * layer.attention.flops_per_pair(absorbed=True)
    element = problem.formats.float_format
    paid = price(Work(flops, element, ((kv_unit.tier, read),)), kv_unit, target)
    option.decode.wait(kv_unit.name, paid.bound, paid.seconds)
    window, prompt = layer.attention.window, session.prompt
    pairs = session.prompts * kv.pairs(window, prompt)
    share = kv.pairs(window, prompt) / attended_pairs(window, prompt)
    prompt_read = share * session.prompt_rows * session.passes / 2 * option.part.kv_bytes_per_token
    flops = pairs * layer.attention.flops_per_pair(absorbed=False)
    paid = price(Work(flops, element, ((kv_unit.tier, prompt_read),)), kv_unit, target)
    option.prefill.wait(kv_unit.name, paid.bound, paid.seconds)
    if kv.home != kv_unit.tier:
        for source, goal in problem.machine.way(kv.home, kv_unit.tier) or ():
            resource, seconds = transfer_time(target, source, goal, read)
            option.decode.beside(resource, seconds)
            full = session.batch * kv.positions * option.part.kv_bytes_per_token  # room for the whole context
            option.buffer = (*option.buffer, (goal, math.ceil(full / max(1, session.micro_batches))))
        _write_back(problem, option, kv, kv_unit.tier)
    elif kv_unit.name != unit.name:
        row = (layer.attention.heads * (layer.attention.head_dim + layer.attention.value_dim)) * 2
        row += layer.attention.kv_elements * 2
        if kv.seen:
            cross(problem, option.decode, unit.name, unit.tier, kv_unit.tier, session.batch * row, ways=1)
        if pairs:
            cross(problem, option.prefill, unit.name, unit.tier, kv_unit.tier, session.prompt_rows * row, ways=1)


def _write_back(problem: Problem, option: Option, kv: KVPart, tier: str) -> None:
    """Keys and values go to their place."""
    session = problem.session
    one = 1 if kv.seen or not kv.newer else 0  # what leaves the newer part, at each step
    fresh = (option.decode, session.batch * one), (option.prefill, session.prompts * kv.fresh(session.prompt))
    for cost, tokens in fresh:
        hops = problem.machine.way(kv.home, tier) or ()
        for goal, source in reversed(hops):
            try_bytes = tokens * option.part.kv_bytes_per_token
            store = problem.machine.target.store(goal) if problem.machine.target.tier(goal) is None else None
            if store is not None and store.write_rate() is None:
                continue
            resource, seconds = transfer_time(problem.machine.target, source, goal, try_bytes)
            cost.beside(resource, seconds)
