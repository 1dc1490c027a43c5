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
from passes.place.expert_options import expert_ways
from passes.place.machine import Machine
from passes.place.option import (
    NEAR,
    RESIDENT,
    STREAMED,
    Option,
    PhaseCost,
    compute_part,
    cross,
    keep_weights,
    move_part,
)
from passes.place.parts import Part
from passes.place.problem import Problem
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
    return [option for option in found if all(_allowed(pin.group, pin.where, option, machine) for pin in pins)]


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
        for at_prefill in _prefill_units(problem, unit, mode):
            option = Option(part, unit.name, home, mode, prefill_unit=at_prefill.name)
            keep_weights(option, unit, part.nbytes, problem)
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
            keep_weights(option, unit, part.nbytes, problem)
            option.holds = (*option.holds, (kv_home, "kv", held))
            _whole_part(problem, option, option.decode, unit, _tokens(problem))
            _whole_part(problem, option, option.prefill, unit, None)
            _attend(problem, option, unit, kv_unit)
            yield option


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
        touched = math.ceil(part.expert_bytes * min(each, part.top_k * rows))
    compute_part(problem, cost, unit, part, touched * reads, rows, passes)
    moved = touched if part.experts and tokens is not None else part.nbytes
    move_part(problem, cost, option.home, unit.tier, moved * passes, part)


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


def attended_pairs(window: int, prompt: int) -> float:
    """Pairs of a token and one it attends to in a causal prompt."""
    if not window or window >= prompt:
        return prompt * (prompt + 1) / 2
    return window * (window + 1) / 2 + (prompt - window) * window
