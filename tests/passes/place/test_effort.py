"""How much a plan may cost, counted and not timed: programs, their columns and the nodes of their search."""

from __future__ import annotations

import dataclasses

import pytest

from frontends.shape_library import load_shape
from hw_targets import load
from passes.place import milp
from passes.place.formats import formats_of
from passes.place.machine import machine_of
from passes.place.option import Option
from passes.place.outcome import evaluate
from passes.place.problem import Problem, Session
from passes.place.solve import choices_of, solve
from passes.place.tidy import tidied
from stratum.planning import PlanRequest, make_plan


def test_the_largest_model_on_a_machine_of_many_tiers(monkeypatch: pytest.MonkeyPatch) -> None:
    """671 billion parameters in 61 layers: as few columns as a model of a few, and few programs."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(milp, "_run", lambda rows, nodes, within: asked.append((len(rows.cost), nodes)) or (None, 1.0))
    made = make_plan(
        PlanRequest("DeepSeek-V3", target="instinfer-csd", simulate=False)
    )  # greedy, where no program is solved
    assert made.placement.tokens_per_second > 0
    assert 1 <= len(asked) <= 12 and max(columns for columns, _ in asked) <= 500
    assert sum(nodes for _, nodes in asked) <= milp.MANY_NODES + 11 * milp.FEW_NODES


@pytest.mark.parametrize("room", [8, 1])
def test_caches_do_not_move_where_that_buys_nothing(room: int) -> None:
    """Keys and values on a drive that nothing waits for go to memory, as far as it is free."""
    machine = machine_of(load("ddr5-laptop"))
    shape, formats = load_shape("TinyLlama-1.1B-Chat-v1.0"), formats_of("w4a8-g32")
    problem = Problem(shape, machine, formats, Session(context=2048, prompt=64, generate=8))
    choice = solve(problem).choice
    assert all(option.kv_home in ("", "dram") for option, _ in choice)
    options = choices_of(problem)
    away = {option.label: option for found in options for option in found if option.kv_home == machine.stores[0]}
    moved = tuple((_with_cache_on(away, option, machine.stores[0]), count) for option, count in choice)
    assert moved != choice
    needed = next(tier.total for tier in evaluate(problem, moved).tiers if tier.name == "dram")
    cache = sum(n for option, count in choice for _, what, n in option.holds if what == "kv") * len(shape.layers)
    tight = dataclasses.replace(problem, machine=machine.with_room("dram", needed + cache * room // 8))
    before, after = evaluate(tight, moved), evaluate(tight, tidied(tight, options, moved))
    assert after.fits and after.decode.seconds <= before.decode.seconds * (1 + 1e-9)
    home = next(tier for tier in after.tiers if tier.name == "dram")
    assert 0 < dict(home.used)["kv"] <= cache and (dict(home.used)["kv"] == cache) == (room == 8)


def _with_cache_on(away: dict[str, Option], option: Option, store: str) -> Option:
    """The option with its cache on the drive, attended to by the same unit."""
    label = option.label.replace(f"kv={option.kv_home}@", f"kv={store}@")
    return away.get(label, option)
