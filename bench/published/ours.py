"""What our own cost model says where others published a figure: phases of a model that lies in given places.

Rooflines are taken without efficiencies and dispatch (`ideal`), so that ideal over published is the efficiency reached.
"""

from __future__ import annotations

import dataclasses

import hw_targets
from frontends.shape_library import load_shape
from hw_targets.cost_model import Work, price
from hw_targets.target import Target
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.milp import solve_counts
from passes.place.outcome import Outcome, evaluate
from passes.place.pins import parse_pin
from passes.place.problem import Problem, Session
from passes.place.solve import choices_of


def ideal(target: Target) -> Target:
    """The target at its stated peaks: no efficiency, no dispatch."""
    units = tuple(
        dataclasses.replace(u, efficiency=(), bandwidth_efficiency=None, launch_seconds=None, barrier_seconds=None)
        for u in target.units
    )
    links = tuple(dataclasses.replace(x, efficiency=None) for x in target.links)
    return dataclasses.replace(target, units=units, links=links)


def phases(
    model: str,
    target: str,
    recipe: str = "",
    *,
    pins: tuple[str, ...] = (),
    tensor: int = 1,
    roofline: bool = False,
    dtype: str = "f16",
    **session: int,
) -> Outcome:
    """Both phases of a model whose places are pinned; the rest as the solver puts it."""
    shape = load_shape(model)
    found = hw_targets.load(target)
    machine = machine_of(ideal(found) if roofline else found, tensor=tensor)
    use = Session(**{"context": 4096, "prompt": 512, "generate": 32, **session})
    problem = Problem(shape, machine, formats_of(recipe, dtype), use)
    problem = dataclasses.replace(problem, pins=tuple(parse_pin(p, shape, machine) for p in pins))
    solved = solve_counts(problem, choices_of(problem))
    assert solved is not None, f"{model} does not fit {target} with {pins}"
    return evaluate(problem, solved.choice)


def bytes_per_second(target: str, tier: str) -> float:
    """What one second of reading a tier gives, at its stated bandwidth."""
    found = ideal(hw_targets.load(target))
    unit = next(u for u in found.units if u.tier == tier)
    return 1.0 / price(Work(traffic=((tier, 1.0),)), unit, found).seconds
