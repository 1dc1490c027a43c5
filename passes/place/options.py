"""Every way to keep and compute a part, each with what it takes: seconds of both phases, bytes of every tier.

    for option in options_of(problem, part): option.decode.path, option.decode.streams, option.holds

Modes: `resident` (in the memory of the unit that computes), `streamed` (moved there for every pass), and for experts
`cached` and `split` (`passes.place.expert_options`). Attention chooses where its cache lies and who attends: the unit
itself, or the unit beside the cache.
"""

from __future__ import annotations

from collections.abc import Iterator

from hw_targets.target import ComputeUnit
from passes.place.attention_option import attention_option
from passes.place.expert_options import expert_ways, kernels_for
from passes.place.kv_division import with_share
from passes.place.machine import Machine
from passes.place.option import RESIDENT, STREAMED, Option, keep_weights
from passes.place.parts import Part
from passes.place.problem import NEAR, Problem
from passes.place.whole_part import whole_part


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
            whole_part(problem, option, option.decode, unit, problem.session.batch)
            whole_part(problem, option, option.prefill, at_prefill, None)
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
            for text in problem.kv_menu.texts if problem.kv_menu is not None else ("",):
                yield attention_option(problem, like, (kv_home, kv_unit.name), formats=(text, ""))


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
