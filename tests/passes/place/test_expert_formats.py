"""Formats of single experts: bytes by expert, exact against brute force, never worse than a format for each layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.model_shape import ModelShape
from frontends.shape_library import load_shape
from hw_targets.routing.synthetic import SESSION, synthetic_trace
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.cache_choice import TraceRates
from passes.place.expert_mix import ExpertMix, misses_by_rank
from passes.place.format_loss import ESTIMATED, Losses, MeasuredLosses
from passes.place.format_menu import menu_of
from passes.place.formats import Formats, formats_of
from passes.place.machine import machine_of
from passes.place.milp import FEW_NODES, solve_counts
from passes.place.outcome import evaluate
from passes.place.parts import Part, parts_of
from passes.place.pins import parse_pin
from passes.place.placement import PlacedExperts, Placement, layer_numbers
from passes.place.plan_recipe import recipe_of_plan
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, choices_of, replay, solve
from passes.quantize.expert_ranges import read_ranges
from passes.quantize.recipe import read_recipe
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan
from tests.passes.place.machines import MIB, sparse, target
from tests.passes.place.test_solve import GAP, every_choice

USE = Session(context=64, prompt=8, generate=56, chunk=8)
NAMES = ("w4a8-g32", "w2a8", "w8a8")
Uses = Mapping[int, Sequence[float]]


def problem(
    shape: ModelShape,
    machine: Target,
    uses: Uses,
    losses: Losses = ESTIMATED,
    names: Sequence[str] = NAMES[:2],
    **bounds: Any,
) -> Problem:
    asked = formats_of(names[0])
    menu = menu_of(names, asked, shape, losses, uses=uses, uses_source="test", **bounds)
    made = machine_of(machine)
    return Problem(shape, made, asked, USE, (parse_pin("kv=dram", shape, made),), menu=menu)


def alike(base: Problem) -> Problem:
    """The same, the experts of a layer in one format."""
    assert base.menu is not None
    return dataclasses.replace(base, menu=dataclasses.replace(base.menu, uses=()))


def zipf(shape: ModelShape, skew: float = 1.2) -> dict[int, list[float]]:
    """Other favourites in every layer."""
    count, layers = shape.layers[0].mlp.experts, range(len(shape.layers))
    return {layer: [1000 * (1 + (e + 3 * layer) % count) ** -skew for e in range(count)] for layer in layers}


def tight(**bounds: Any) -> Problem:
    """A drive that binds, and a loss between those of the two formats."""
    shape = sparse(2, experts=16)
    machine = target(gpu=False, dram=3 * MIB, disk=1e6)
    return problem(shape, machine, zipf(shape), **bounds or {"most_loss": 0.015})


@pytest.fixture(scope="module")
def found() -> Solution:
    return solve(tight(), FEW_NODES)


def sizes_by_expert(found: Solution) -> dict[int, list[int]]:
    """Bytes of every expert of every layer, from the entries of the plan alone."""
    menu, plan = found.problem.menu, found.placement
    assert menu is not None
    one = {
        (f.name, i): part.nbytes // part.experts
        for f in menu.choices
        for part in parts_of(found.problem.shape, f)
        for i in part.layers
        if part.experts
    }
    sizes: dict[int, list[int]] = {}
    for entry in plan.groups:
        for i in layer_numbers(entry.layers) if entry.group == "experts" else ():
            sizes[i] = [one[entry.recipe, i]] * found.problem.shape.layers[i].mlp.experts
    for named in plan.expert_formats:
        for i in layer_numbers(named.layers):
            for first, last in read_ranges(named.experts) or ():
                for expert in range(first, last + 1):
                    sizes[i][expert] = one[named.recipe, i]
    return sizes


def check(found: Solution) -> None:
    base, plan = found.problem, found.placement
    assert base.menu is not None and plan.quality is not None and found.outcome.fits
    assert base.menu.most_loss is None or plan.quality.loss <= base.menu.most_loss * (1 + 1e-6)
    assert base.menu.least_bits is None or plan.quality.bits >= base.menu.least_bits * (1 - 1e-6)
    sizes = sizes_by_expert(found)
    for entry in plan.groups:
        if entry.group == "experts":
            assert entry.nbytes == sum(sum(sizes[i]) for i in layer_numbers(entry.layers))
    assert sum(t.weights for t in plan.tiers) == sum(g.nbytes for g in plan.groups)
    slots = [(g.slots, i) for g in plan.groups if g.mode == "cached" for i in layer_numbers(g.layers)]
    assert sum(t.cache for t in plan.tiers) == sum(sum(sorted(sizes[i])[-n:]) for n, i in slots)
    assert Placement.from_json(plan.to_json()) == plan
    back = replay(dataclasses.replace(base, menu=base.menu.unbounded()), plan)
    assert math.isclose(back.outcome.objective, found.outcome.objective, rel_tol=1e-9)
    assert back.placement.quality is not None and math.isclose(back.placement.quality.loss, plan.quality.loss)
    assert [(t.name, t.used) for t in back.outcome.tiers] == [(t.name, t.used) for t in found.outcome.tiers]


@settings(max_examples=5, deadline=None)
@given(st.data())
def test_random_plans(data: st.DataObject) -> None:
    """The checker accepts them, bounds are kept, and one format for each layer is never better."""
    shape = sparse(data.draw(st.integers(1, 2)), experts=data.draw(st.sampled_from([2, 4, 16])))
    count = shape.layers[0].mlp.experts
    picks = st.lists(st.integers(0, 200), min_size=count, max_size=count)
    uses = {layer: data.draw(picks) for layer in range(len(shape.layers))}
    bounds: dict[str, Any] = data.draw(st.sampled_from([{}, {"least_bits": 3.0}, {"most_loss": 0.015}]))
    machine = target(dram=data.draw(st.sampled_from([1, 2, 3])) * MIB, gpu=False, disk=1e6)
    base = problem(shape, machine, uses, **bounds)
    try:
        made = solve(base, FEW_NODES)
    except NoFit:
        with pytest.raises(NoFit):
            solve(alike(base), FEW_NODES)
        return
    check(made)
    plan = placed_plan(made.problem, made.choice)
    room = dict(made.problem.machine.room)
    assert [d.message for d in check_stream(plan.program, made.problem.machine.target, room)] == []
    try:
        assert made.outcome.objective <= solve(alike(base), FEW_NODES).outcome.objective * (1 + 1e-9)
    except NoFit:
        pass


@pytest.mark.parametrize("bound", [{}, {"least_bits": 3.0}, {"most_loss": 0.008}])
def test_equals_brute_force(bound: dict[str, Any]) -> None:
    shape = sparse(1, experts=4)
    base = problem(shape, target(dram=int(1.2 * MIB), gpu=False, disk=1e6), zipf(shape), **bound)
    options = choices_of(base)
    assert any(o.part.mix is not None for ways in options for o in ways)
    menu, fitting = base.menu, []
    assert menu is not None
    for choice in every_choice(options):
        lost = sum(o.part.loss * n for o, n in choice)
        bits = 8 * sum(o.part.weight_bytes * n for o, n in choice) / sum(o.part.weights * n for o, n in choice)
        kept = lost <= (menu.most_loss or 9.0) * (1 + 1e-9) and bits >= (menu.least_bits or 0.0)
        outcome = evaluate(base, choice)
        if kept and outcome.fits:
            fitting.append(outcome.objective)
    best = solve_counts(base, options)
    assert best is not None
    assert min(fitting) <= evaluate(base, best.choice).objective * (1 + 1e-6)
    assert evaluate(base, best.choice).objective <= min(fitting) * GAP


def test_alike_experts_share_a_format() -> None:
    """Without differences there is nothing to gain, so that the plan is that of a format for each layer."""
    base = tight()
    assert base.menu is not None
    even = tuple((layer, (7.0,) * 16) for layer in range(2))
    same = dataclasses.replace(base, menu=dataclasses.replace(base.menu, uses=even))
    assert all(part.mix is None for ways in same.variants() for part in ways)
    one, other = solve(alike(base), FEW_NODES), solve(same, FEW_NODES)
    assert math.isclose(other.outcome.objective, one.outcome.objective, rel_tol=1e-9)
    assert other.placement.groups == one.placement.groups and other.placement.expert_formats == ()


def test_popular_experts_are_wider_and_that_is_faster(found: Solution) -> None:
    """Within the same loss; who is picked most differs by layer."""
    check(found)
    assert found.outcome.objective < solve(alike(found.problem), FEW_NODES).outcome.objective * 0.8
    uses = zipf(found.problem.shape)
    wide = {i: e.experts for e in found.placement.expert_formats for i in layer_numbers(e.layers)}
    assert wide
    for layer, experts in wide.items():
        favourite = max(range(16), key=lambda e: uses[layer][e])
        assert any(a <= favourite <= b for a, b in read_ranges(experts) or ())


@given(st.integers(2, 24), st.data())
def test_a_mix_counts_expert_by_expert(count: int, data: st.DataObject) -> None:
    ranks = data.draw(st.lists(st.integers(0, 2), min_size=count, max_size=count))
    chances = sorted(data.draw(st.lists(st.floats(0.001, 0.999), min_size=count, max_size=count)), reverse=True)
    sizes = (900, 400, 100)
    mix = ExpertMix(("a", "b", "c"), sizes, tuple(ranks), tuple(chances), (tuple(range(count)),))
    each = [sizes[at] for at in ranks]
    assert mix.nbytes == sum(each) and sum(mix.counts) == count
    assert [mix.largest(n) for n in (1, count)] == [max(each), sum(each)]
    assert math.isclose(mix.asked(1), sum(p * b for p, b in zip(chances, each, strict=True)) / sum(chances))
    assert math.isclose(mix.asked(1e9), sum(each) / count, rel_tol=1e-6)
    hit = data.draw(st.floats(0.05, 0.95))
    misses = misses_by_rank(tuple(chances), hit)
    assert math.isclose(sum(misses), (1 - hit) * sum(chances), rel_tol=1e-6)
    assert all(m <= p for m, p in zip(misses, chances, strict=True))
    assert min(each) - 1e-9 <= mix.missed(misses) <= max(each) + 1e-9
    named = dict(mix.named(0))
    assert all(named[name] == tuple(e for e in range(count) if ranks[e] == at) for at, name in enumerate(("a", "b")))


def test_a_trace_says_who_is_missing() -> None:
    """Misses by rank add up to those of the replay, and the rate is the same as ever."""
    trace = synthetic_trace(SESSION, experts=16, top_k=2, layers=3, tokens=60)
    rates = TraceRates(trace, "lru", "layer")
    orders = tuple(tuple(np.random.default_rng(i).permutation(16).tolist()) for i in range(3))
    by_rank = rates.by_rank((0, 1, 2), orders, 6)
    decoded = int(trace.decode.sum()) * 3 * 2
    assert math.isclose(1 - sum(by_rank) / decoded, rates(16, 2, 6, 1), rel_tol=1e-9)
    alone = rates.by_rank((1,), (orders[1],), 6)
    assert all(a <= b for a, b in zip(alone, by_rank, strict=True)) and sum(alone) < sum(by_rank)


def measured(path: Path, layers: int, experts: int, worst: int) -> MeasuredLosses:
    """Of a mixture: one expert errs thirty times as much as the others; all are met alike."""
    lines = []
    for layer in range(layers):
        for tail in ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.experts.gate_up", "mlp.experts.down"):
            for bits in (2, 4):
                entry = {"group": f"model.layers.{layer}.{tail}", "loss": 4.0**-bits}
                if "experts" in tail:
                    entry["experts"] = [30.0 if e == worst else 1.0 for e in range(experts)]
                    entry["uses"] = [10.0] * experts
                lines.append({**entry, "candidate": f"q{bits}_sym<group=32, scale=f16> x bf16"})
    heads = [(f"q{bits}_sym<group=32, scale=f16>", 4.0**-bits) for bits in (2, 4, 6, 8)]
    lines += [{"group": "lm_head", "candidate": text, "loss": loss} for text, loss in heads]
    path.write_text("\n".join(map(json.dumps, lines)))
    return MeasuredLosses.read(path)


def test_measured_losses_find_the_experts_that_need_bits(tmp_path: Path) -> None:
    shape = sparse(2, experts=8)
    losses = measured(tmp_path / "s.jsonl", 2, 8, worst=5)
    assert {layer: len(uses) for layer, uses in losses.uses().items()} == dict.fromkeys(range(2), 8)
    base = problem(shape, target(gpu=False, dram=64 * MIB), losses.uses(), losses, most_loss=0.12)
    mixes = [part.mix for ways in base.variants() for part in ways if part.mix is not None]
    assert mixes and all(5 in experts for mix in mixes for _, experts in mix.named(0))
    made = solve(base, FEW_NODES)
    check(made)
    assert "5" in {entry.experts for entry in made.placement.expert_formats}
    part = next(p for p in parts_of(shape, formats_of("w2a8")) if p.group == "experts")
    for layer, each in enumerate(losses.of_experts(shape, part, formats_of("w2a8"), {})):
        assert math.isclose(sum(each), losses.of_part(shape, part, formats_of("w2a8"))[layer])
        assert each.index(max(each)) == 5 and math.isclose(each[5], 30 * each[0])


def test_the_recipe_of_a_plan_has_its_bytes(found: Solution) -> None:
    """Planned anew with the recipe that is saved, every layer is as large, and each expert has its format."""
    shape = found.problem.shape
    recipe = read_recipe(recipe_of_plan(found.placement).to_toml(), "plan.toml")
    parts = parts_of(shape, Formats("chosen", recipe))
    assert sum(p.nbytes * p.count for p in parts) == sum(g.nbytes for g in found.placement.groups)
    sizes = sizes_by_expert(found)
    experts: dict[int, Part] = {i: p for p in parts if p.group == "experts" for i in p.layers}
    assert {i: p.nbytes for i, p in experts.items()} == {i: sum(s) for i, s in sizes.items()}
    texts: dict[int, set[str]] = {}
    for layer, of_layer in sizes.items():
        name = f"model.layers.{layer}.mlp.experts.0.up_proj.weight"
        for expert, size in enumerate(of_layer):
            texts.setdefault(size, set()).add(str(recipe.choice(name, "experts.up", expert).format))
    assert [texts[size] for size in sorted(texts)] == [
        {"q2_sym<group=32, scale=f16>"},
        {"q4_sym<group=32, scale=f16>"},
    ]


def test_a_share_of_experts_can_be_pinned() -> None:
    base = tight(names=NAMES, least_bits=2.6)
    shape = base.shape
    pin = parse_pin("experts=w8a8:0.25", shape, base.machine, NAMES, by_expert=True)
    made = solve(dataclasses.replace(base, pins=(*base.pins, pin)), FEW_NODES)
    check(made)
    counts = [sum(b - a + 1 for a, b in read_ranges(e.experts) or ()) for e in made.placement.expert_formats]
    assert set(counts) == {4} and {e.recipe for e in made.placement.expert_formats} == {"w8a8"}
    assert sorted(i for e in made.placement.expert_formats for i in layer_numbers(e.layers)) == [0, 1]
    for text, by_expert, words in (
        ("experts=w8a8:0.25", False, "share a format"),
        ("experts=dram:0.25", True, "nothing named 'dram'"),
        ("experts=w8a8:1.5", True, "is no share"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            parse_pin(text, shape, base.machine, NAMES, by_expert=by_expert)
    texts = ("experts=w8a8:0.75", "weights=resident")
    pins = tuple(parse_pin(text, shape, base.machine, NAMES, by_expert=True) for text in texts)
    with pytest.raises(NoFit, match="not with what is pinned"):
        solve(dataclasses.replace(base, pins=pins), FEW_NODES)


def test_an_edited_plan_is_computed_anew(found: Solution) -> None:
    base, plan = found.problem, found.placement
    assert base.menu is not None and plan.quality is not None
    free = dataclasses.replace(base, menu=base.menu.unbounded())
    every = dataclasses.replace(plan, expert_formats=(PlacedExperts("0-1", "0-15", "w4a8-g32"),))
    with pytest.raises(NoFit, match="the plan needs"):
        replay(dataclasses.replace(free, machine=base.machine.with_room("dram", 1 << 20)), every)
    large = dataclasses.replace(free, machine=base.machine.with_room("dram", 1 << 30))
    wider = replay(large, every).placement
    assert wider.quality is not None
    assert wider.quality.bits > plan.quality.bits and wider.quality.loss < plan.quality.loss
    narrow = replay(large, dataclasses.replace(plan, expert_formats=())).placement
    assert narrow.quality is not None and narrow.quality.loss > plan.quality.loss
    for entry, words in (
        (PlacedExperts("0", "16", "w4a8-g32"), "names experts '16' of layer 0"),
        (PlacedExperts("9", "1", "w4a8-g32"), "of layer 9"),
        (PlacedExperts("0", "x", "w4a8-g32"), "names experts 'x'"),
        (PlacedExperts("0", "1", "w6a8"), "stored as 'w6a8'"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            replay(large, dataclasses.replace(plan, expert_formats=(entry,)))
    with pytest.raises(DiagnosticError, match="lists none to choose among"):
        replay(dataclasses.replace(base, menu=None), plan)


def test_gpus_keep_experts_alike() -> None:
    """Only CPUs have kernels: no way of a GPU, nor one with a helper, is offered for a layer of several formats."""
    shape = sparse(2, experts=8)
    options = choices_of(problem(shape, target(), zipf(shape)))
    mixed = [o for found in options for o in found if o.part.mix is not None]
    assert mixed and {o.unit for o in mixed} == {"cores"} and {o.helper for o in mixed} == {""}
    assert {o.prefill_unit for o in mixed} == {"cores"}


def test_real_models_have_tables() -> None:
    """Of layers with other favourites ranks, not numbers, are what they share."""
    shape = load_shape("OLMoE-1B-7B-0924")
    base = problem(shape, target(gpu=False, dram=512 * MIB), zipf(shape))
    (ways,) = [ways for ways in base.variants() if ways[0].experts]
    mixed = [part for part in ways if part.mix is not None]
    assert mixed and all(len(part.losses) == 16 for part in mixed)
    for part in mixed:
        assert part.mix is not None and part.nbytes == part.mix.nbytes == part.weight_bytes
        assert sorted(part.mix.orders[3]) == list(range(64)) and part.mix.orders[3] != part.mix.orders[4]
        (name, experts), *_ = part.mix.named(3)
        assert len(experts) == part.mix.counts[0] and name == part.mix.recipes[0]
