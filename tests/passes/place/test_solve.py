"""Placement: exact against brute force, never worse than greedy, monotone, honest about bytes and about what fits."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frontends.model_shape import ModelShape
from frontends.shape_library import load_shape
from hw_targets import load
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.formats import formats_of, next_down
from passes.place.machine import machine_of
from passes.place.milp import solve_counts
from passes.place.option import Option
from passes.place.outcome import Choice, evaluate
from passes.place.parallel import spreads
from passes.place.pins import parse_pin
from passes.place.placement import Placement
from passes.place.problem import Problem, Session, Slo
from passes.place.solve import NoFit, Solution, choices_of, feasible, least_budget, replay, solve
from tests.passes.place.machines import MIB, dense, sparse, target

GAP = 1.0041  # twice what the solver may leave open


def problem(shape: ModelShape, machine: Target, recipe: str = "", **session: int) -> Problem:
    use = {"context": 256, "prompt": 64, "generate": 64, **session}
    return Problem(shape, machine_of(machine), formats_of(recipe), Session(**use))


def pinned(base: Problem, *texts: str) -> Problem:
    return dataclasses.replace(base, pins=tuple(parse_pin(t, base.shape, base.machine) for t in texts))


def every_choice(options: list[list[Option]]) -> Iterator[Choice]:
    """All ways to give the layers of all parts to their options."""
    ways = []
    for found in options:
        picks = itertools.combinations_with_replacement(found, found[0].part.count)
        ways.append([tuple((o, run.count(o)) for o in dict.fromkeys(run, 0)) for run in picks])
    for combination in itertools.product(*ways):
        yield tuple(pair for part in combination for pair in part)


@pytest.mark.parametrize("dram", [2, 3, 5, 9])
@pytest.mark.parametrize("shape", [dense(3), sparse(2, experts=4)], ids=["dense", "sparse"])
def test_equals_brute_force(shape: ModelShape, dram: int) -> None:
    base = problem(shape, target(dram=dram * MIB, gpu=False))
    options = choices_of(base)
    fitting = [o for o in (evaluate(base, c) for c in every_choice(options)) if o.fits]
    found = solve_counts(base, options)
    assert (found is None) == (not fitting)
    if found is not None:
        best = min(o.objective for o in fitting)
        assert best <= evaluate(base, found.choice).objective * (1 + 1e-9)
        assert evaluate(base, found.choice).objective <= best * GAP


SHAPES = st.one_of(
    st.builds(dense, st.integers(1, 12), st.sampled_from([64, 256])),
    st.builds(sparse, st.integers(1, 8), st.sampled_from([4, 16, 32]), st.integers(1, 4), st.sampled_from([64, 128])),
)
TARGETS = st.builds(
    target,
    vram=st.integers(2, 64).map(lambda n: n * MIB),
    dram=st.integers(2, 128).map(lambda n: n * MIB),
    hbm_rate=st.floats(1e8, 1e10),
    dram_rate=st.floats(1e7, 1e9),
    link=st.floats(1e6, 1e9),
    disk=st.floats(1e6, 1e8),
    gpu=st.booleans(),
)
RECIPES = st.sampled_from(["", "w8a8", "w4a8-g32,kv8"])


def check_plan(found: Solution) -> None:
    """What is true of every plan."""
    shape, formats, plan = found.problem.shape, found.problem.formats, found.placement
    assert found.outcome.fits and 0.0 <= found.gap <= 1.0
    assert found.greedy is None or found.outcome.objective <= found.greedy * (1 + 1e-9)
    tensors = [t for layer in shape.layers for t in shape.tensors(layer)] + list(shape.outer_tensors())
    assert sum(g.nbytes for g in plan.groups) == sum(formats.nbytes(t) for t in tensors)
    assert sum(t.weights for t in plan.tiers) == sum(g.nbytes for g in plan.groups)
    session = found.problem.session
    held = sum(x.kv_tokens(session.context) * formats.kv_bytes(x) for x in shape.layers) * session.batch
    assert sum(e.nbytes for e in plan.kv) == sum(t.kv for t in plan.tiers) == held
    for phase in (plan.decode, plan.prefill):
        assert phase.seconds >= max(r.seconds for r in phase.resources) * (1 - 1e-9)
        assert phase.bound in {r.name for r in phase.resources}
    again = Placement.from_json(plan.to_json())
    assert again == plan
    back = replay(found.problem, again)
    assert math.isclose(back.outcome.objective, found.outcome.objective, rel_tol=1e-9)
    assert [t.total for t in back.outcome.tiers] == [t.peak for t in plan.tiers]


@given(SHAPES, TARGETS, RECIPES, st.sampled_from([1, 4]))
@settings(max_examples=25, deadline=None)
def test_random_plans(shape: ModelShape, machine: Target, recipe: str, batch: int) -> None:
    base = problem(shape, machine, recipe, batch=batch)
    try:
        found = solve(base)
    except NoFit:
        assert not feasible(base)
        return
    check_plan(found)


@given(SHAPES, TARGETS, st.sampled_from(["vram", "dram", "hbm_rate", "dram_rate", "link", "disk"]), st.floats(1.1, 8))
@settings(max_examples=20, deadline=None)
def test_more_is_never_slower(shape: ModelShape, machine: Target, what: str, factor: float) -> None:
    base = problem(shape, machine)
    try:
        before = solve(base).outcome.objective
    except NoFit:
        assume(False)
        return
    grown = {
        "vram": lambda t: _tiers(t, "vram", capacity_bytes=factor),
        "dram": lambda t: _tiers(t, "dram", capacity_bytes=factor),
        "hbm_rate": lambda t: _tiers(t, "vram", read_bandwidth=factor),
        "dram_rate": lambda t: _tiers(t, "dram", read_bandwidth=factor),
        "link": lambda t: dataclasses.replace(
            t, links=tuple(dataclasses.replace(x, bandwidth=(x.bandwidth or 0) * factor) for x in t.links)
        ),
        "disk": lambda t: dataclasses.replace(
            t,
            storage=tuple(
                dataclasses.replace(
                    s, points=tuple(dataclasses.replace(p, read_bandwidth=p.read_bandwidth * factor) for p in s.points)
                )
                for s in t.storage
            ),
        ),
    }[what](machine)
    after = solve(dataclasses.replace(base, machine=machine_of(grown))).outcome.objective
    assert after <= before * GAP


def _tiers(machine: Target, name: str, **factors: float) -> Target:
    def change(tier: object) -> object:
        assert dataclasses.is_dataclass(tier) and not isinstance(tier, type)
        values = {key: type(getattr(tier, key))(getattr(tier, key) * f) for key, f in factors.items()}
        return dataclasses.replace(tier, **values)

    return dataclasses.replace(machine, tiers=tuple(change(t) if t.name == name else t for t in machine.tiers))  # type: ignore[misc]


def test_a_unit_without_room_for_activations_computes_nothing() -> None:
    found = solve(problem(dense(4), target(vram=4096)))
    assert {g.unit for g in found.placement.groups} == {"cores"} and found.outcome.tier("vram").total == 0
    assert found.outcome.objective == pytest.approx(solve(problem(dense(4), target(gpu=False))).outcome.objective)
    assert replay(found.problem, found.placement).outcome == found.outcome
    with pytest.raises(NoFit, match="not with what is pinned"):
        solve(pinned(problem(dense(4), target(vram=4096)), "mlp=gpu"))
    bounded = problem(load_shape("TinyLlama-1.1B-Chat-v1.0"), load("pim-gpt"), "w8a8")  # 128 kB beside its adders
    assert {g.tier for g in solve(bounded).placement.groups} == {"gddr6"}


def test_what_fits_stays_where_it_is_fastest() -> None:
    found = solve(problem(dense(4), target()))
    assert {(g.tier, g.mode) for g in found.placement.groups if g.group != "embedding"} == {("vram", "resident")}
    assert found.placement.decode.bound == "vram read"


def test_what_does_not_fit_is_streamed_or_computed_beside() -> None:
    found = solve(problem(dense(12), target(vram=8 * MIB, link=1e6)))
    assert {(g.mode, g.unit) for g in found.placement.groups} >= {("resident", "gpu"), ("resident", "cores")}
    fast_link = solve(problem(dense(12), target(vram=8 * MIB, link=1e9, dram_rate=1e7)))
    assert any(g.mode == "streamed" and g.unit == "gpu" for g in fast_link.placement.groups)


def test_experts_are_cached_below_a_budget() -> None:
    base = problem(sparse(4, experts=32, top_k=2), target(gpu=False, dram=24 * MIB))
    found = solve(base)
    cache = found.placement.expert_cache
    assert cache is not None and cache.tier == "dram" and 0.2 < cache.hit_rate < 1.0
    assert found.outcome.decode.seconds < solve(pinned(base, "experts=streamed")).outcome.decode.seconds
    check_plan(found)


def test_pins_are_kept_and_the_rest_is_solved() -> None:
    base = problem(dense(6), target())
    found = solve(pinned(base, "kv=dram", "layers.0-1.mlp=cpu", "embedding=disk"))
    assert {e.tier for e in found.placement.kv} == {"dram"}
    first = [g for g in found.placement.groups if g.group == "mlp" and g.layers == "0-1"]
    assert [g.unit for g in first] == ["cores"]
    assert [g.tier for g in found.placement.groups if g.group == "embedding"] == ["ssd"]
    assert {g.unit for g in found.placement.groups if g.group == "mlp" and g.layers != "0-1"} == {"gpu"}
    check_plan(found)


def test_infeasible_pins_are_named() -> None:
    base = problem(dense(12), target(vram=4 * MIB))
    with pytest.raises(NoFit) as caught:
        solve(pinned(base, "kv=dram", "weights=vram"))
    assert caught.value.pins == ("'weights=vram'",) and "not with what is pinned" in str(caught.value)
    with pytest.raises(DiagnosticError, match="attention=split: target small has no such way"):
        solve(pinned(base, "attention=split"))
    for text, words in (
        ("experts", "is not a pin"),
        ("mlps=gpu", "did you mean 'mlp'"),
        ("mlp=gpux", "did you mean 'gpu'"),
        ("layers.4-99.mlp=gpu", "layers 0 to 11"),
        ("layers.1.head=gpu", "belongs to no layer"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            pinned(base, text)


def test_no_fit_says_what_would() -> None:
    base = problem(dense(4), target(gpu=False, dram=1 * MIB), context=4096)
    base = pinned(base, "kv=dram")
    with pytest.raises(NoFit) as caught:
        solve(base)
    base = dataclasses.replace(base, pins=())
    needed = least_budget(pinned(base, "kv=dram"), "dram")
    assert needed is not None
    enough = dataclasses.replace(base, machine=base.machine.with_room("dram", needed))
    assert feasible(pinned(enough, "kv=dram"))
    short = dataclasses.replace(base, machine=base.machine.with_room("dram", int(needed * 0.999) - 4096))
    assert not feasible(pinned(short, "kv=dram"))
    assert caught.value.pins == ("'kv=dram'",) or caught.value.least


def test_largest_context_fits_and_one_more_does_not() -> None:
    machine = dataclasses.replace(target(gpu=False, dram=6 * MIB), storage=())
    base = problem(dense(2), machine, context=1 << 16)
    with pytest.raises(NoFit) as caught:
        solve(base)
    context = caught.value.context
    assert context is not None and 1 < context < 1 << 16
    assert feasible(problem(dense(2), machine, context=context))
    assert not feasible(problem(dense(2), machine, context=context + 1))


def test_bounds_of_latency_are_kept() -> None:
    base = problem(dense(8), target(vram=4 * MIB))
    free = solve(base).outcome
    slower = dataclasses.replace(base, slo=Slo(tpot=free.decode.seconds * 1.5, ttft=free.prefill.seconds * 1.5))
    kept = solve(slower).outcome
    assert kept.decode.seconds <= free.decode.seconds * 1.5 and kept.prefill.seconds <= free.prefill.seconds * 1.5
    with pytest.raises(NoFit, match="as fast as asked for"):
        solve(dataclasses.replace(base, slo=Slo(tpot=free.decode.seconds / 100)))


def test_micro_batches_let_units_work_together() -> None:
    base = problem(dense(8), target(vram=4 * MIB, link=1e5, disk=1e5), batch=8)
    found = solve(base)
    alone = solve_counts(base, choices_of(base))
    assert alone is not None
    assert found.outcome.objective <= evaluate(base, alone.choice).objective * GAP
    assert found.placement.session.micro_batches >= 1


@pytest.mark.parametrize("shape", [dense(3), sparse(2, experts=4)], ids=["dense", "sparse"])
def test_prompts_that_pass_together_move_weights_once(shape: ModelShape) -> None:
    def prefill(prompts: int) -> float:
        base = problem(shape, target(dram=64 * MIB), batch=8, prompt=8, chunk=8, prompts=prompts)
        streamed = pinned(base, "weights=dram", "attention=gpu", "head=gpu", "kv=gpu")
        found = solve_counts(streamed, choices_of(streamed))
        assert found is not None
        return evaluate(streamed, found.choice).prefill.seconds

    alone, together = prefill(1), prefill(8)
    assert alone <= together < 8 * alone


def test_whole_experts_keep_one_device_busy_with_one() -> None:
    """Of one sequence, a layer lasts as long as a whole expert's bytes; cut experts share them."""
    shape = sparse(4, experts=4)
    cut, whole = (
        next(
            w.decode.seconds
            for w in spreads(shape, target(gpus=4, vram=256 * MIB), formats_of(""), Session(256, 1, 64, 64))
            if w.degrees.tensor == 4 and w.degrees.expert == expert
        )
        for expert in (1, 4)
    )
    assert cut < whole


def test_real_machine_quickly_bounded() -> None:
    import hw_targets

    base = Problem(load_shape("Qwen3-30B-A3B"), machine_of(hw_targets.load("rtx-4090")), formats_of("w4a8-g32"))
    found = solve(base)
    assert found.placement.decode.bound == "vram read" and found.gap <= 2e-3
    check_plan(found)
    down = next_down(base.formats)
    assert down is not None and down.name == "w3"
    assert solve(dataclasses.replace(base, formats=down)).outcome.objective < found.outcome.objective


def test_edited_plans() -> None:
    base = problem(dense(4), target())
    plan = solve(base).placement
    moved = dataclasses.replace(
        plan,
        groups=tuple(dataclasses.replace(g, tier="dram", unit="cores") if g.group == "mlp" else g for g in plan.groups),
    )
    again = replay(base, moved).placement
    assert again.decode.seconds > plan.decode.seconds and again.groups == moved.groups
    for change, words in (
        ({"groups": plan.groups[:-1]}, "says nothing of head"),
        ({"groups": tuple(dataclasses.replace(g, tier="ssd") for g in plan.groups)}, "no such way"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            replay(base, dataclasses.replace(plan, **change))
    small = dataclasses.replace(base, machine=base.machine.with_room("vram", 1 * MIB))
    with pytest.raises(NoFit, match="the plan needs"):
        replay(small, plan)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ('"schema": "stratum.plan/2"', "has the schema 'stratum.plan/2'"),
        ('"gap": "small"', "gap"),
        ('"slots": -1.5', "slots"),
        ('"mode": "floating"', "mode"),
        ('"tierx": "vram"', "unknown field 'tierx'"),
    ],
)
def test_faulty_plans_are_refused(change: str, words: str) -> None:
    text = solve(problem(dense(1), target())).placement.to_json()
    key = change.split('"')[1]
    old = next((x for x in text.splitlines() if f'"{key.rstrip("x") if key == "tierx" else key}":' in x), "")
    edited = text.replace(old.strip().rstrip(","), change, 1)
    assert edited != text
    with pytest.raises(DiagnosticError, match=words):
        Placement.from_json(edited, "plan.json")
    with pytest.raises(DiagnosticError, match="no JSON"):
        Placement.from_json(text[:-10], "plan.json")
