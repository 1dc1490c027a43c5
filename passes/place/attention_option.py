"""One way of attention: weights, and the cache in one memory or two, attended to by a unit; what both phases take.

attention_option(problem, like, ("dram", "cores"))     # weights as `like` has them, the cache in `dram` by `cores`
"""

from __future__ import annotations

import math

from hw_targets.cost_model import Work, price, transfer_time
from hw_targets.target import ComputeUnit
from passes.place.kv_parts import KVPart, attended_pairs, kv_parts
from passes.place.option import Option, cross, keep_weights
from passes.place.problem import Problem
from passes.place.whole_part import whole_part


def attention_option(
    problem: Problem, like: Option, kv: tuple[str, str], older: tuple[str, str] = ("", ""), old: int = 0,
    formats: tuple[str, str] = ("", ""),
) -> Option:  # fmt: skip
    """Weights as `like` has them, the cache at a place, attended to by a unit; the oldest `old` positions of it at
    another place. `formats`: of the newer and of the older positions, where plans choose them."""
    part, unit = like.part, problem.machine.unit(like.unit)
    assert part.layer is not None
    option = Option(
        part, unit.name, like.home, like.mode, kv_home=kv[0], kv_unit=kv[1], kv_old=old, old_home=older[0],
        old_unit=older[1], kv_format=formats[0], old_format=formats[1] if old else "", prefill_unit=unit.name,
    )  # fmt: skip
    keep_weights(option, unit, part.nbytes, problem)
    whole_part(problem, option, option.decode, unit, problem.session.batch)
    whole_part(problem, option, option.prefill, unit, None)
    for kv_part in kv_parts(problem, option):
        held = problem.session.batch * kv_part.positions * kv_part.row_bytes
        option.holds = (*option.holds, (kv_part.home, "kv", held))
        _attend(problem, option, unit, kv_part)
    return option


def _attend(problem: Problem, option: Option, unit: ComputeUnit, kv: KVPart) -> None:
    """Scores and values of a part of the cache: read by its unit, moved to it first when it lies elsewhere."""
    session, layer, target = problem.session, option.part.layer, problem.machine.target
    assert layer is not None
    kv_unit = problem.machine.unit(kv.unit)
    read = session.batch * kv.seen * kv.row_bytes
    flops = session.batch * kv.seen * layer.attention.flops_per_pair(absorbed=True)
    element = problem.formats.float_format
    paid = price(Work(flops, element, ((kv_unit.tier, read),)), kv_unit, target)
    option.decode.wait(kv_unit.name, paid.bound, paid.seconds)
    window, prompt = layer.attention.window, session.prompt
    pairs = session.prompts * kv.pairs(window, prompt)
    share = kv.pairs(window, prompt) / attended_pairs(window, prompt)
    prompt_read = share * session.prompt_rows * session.passes / 2 * kv.row_bytes
    flops = pairs * layer.attention.flops_per_pair(absorbed=False)
    paid = price(Work(flops, element, ((kv_unit.tier, prompt_read),)), kv_unit, target)
    option.prefill.wait(kv_unit.name, paid.bound, paid.seconds)
    if kv.home != kv_unit.tier:
        for source, goal in problem.machine.way(kv.home, kv_unit.tier) or ():
            resource, seconds = transfer_time(target, source, goal, read)
            option.decode.beside(resource, seconds)
            full = session.batch * kv.positions * kv.row_bytes  # room for the whole context
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
            try_bytes = tokens * kv.row_bytes
            store = problem.machine.target.store(goal) if problem.machine.target.tier(goal) is None else None
            if store is not None and store.write_rate() is None:
                continue
            resource, seconds = transfer_time(problem.machine.target, source, goal, try_bytes)
            cost.beside(resource, seconds)
