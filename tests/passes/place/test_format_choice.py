"""Formats as decisions: exact against brute force, within the budget of quality, never worse than one throughout."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frontends.model_shape import ModelShape
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.format_loss import ESTIMATED, Losses, MeasuredLosses
from passes.place.format_menu import menu_of, uniform_quality
from passes.place.formats import Formats, formats_of
from passes.place.machine import machine_of
from passes.place.milp import solve_counts
from passes.place.outcome import evaluate
from passes.place.parts import parts_of
from passes.place.pins import parse_pin
from passes.place.placement import Placement, layer_numbers
from passes.place.plan_recipe import recipe_of_plan
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, choices_of, replay, solve
from passes.quantize.recipe import load_recipe, read_recipe
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan
from tests.passes.place.machines import MIB, dense, sparse, target
from tests.passes.place.test_solve import GAP, every_choice

USE = Session(context=256, prompt=64, generate=64)
NAMES = ("w4a8-g32", "w3", "w8a8")


def problem(
    shape: ModelShape,
    machine: Target,
    *,
    losses: Losses = ESTIMATED,
    most_loss: float | None = None,
    least_bits: float | None = None,
) -> Problem:
    asked = formats_of(NAMES[0])
    menu = menu_of(NAMES, asked, shape, losses, most_loss=most_loss, least_bits=least_bits)
    return Problem(shape, machine_of(machine), asked, USE, menu=menu)


def check(found: Solution) -> None:
    base, plan = found.problem, found.placement
    assert base.menu is not None and plan.quality is not None and found.outcome.fits
    assert base.menu.most_loss is None or plan.quality.loss <= base.menu.most_loss * (1 + 1e-6)
    assert base.menu.least_bits is None or plan.quality.bits >= base.menu.least_bits * (1 - 1e-6)
    assert found.greedy is None or found.outcome.objective <= found.greedy * (1 + 1e-9)
    sizes = {
        (f.name, part.group, i): part.nbytes
        for f in base.menu.choices
        for part in parts_of(base.shape, f)
        for i in part.layers or (-1,)
    }
    total = 0
    for entry in plan.groups:
        each = [sizes[entry.recipe, entry.group, i] for i in layer_numbers(entry.layers) or [-1]]
        assert entry.nbytes == sum(each)
        total += sum(each)
    assert sum(t.weights for t in plan.tiers) == total
    assert Placement.from_json(plan.to_json()) == plan
    back = replay(dataclasses.replace(base, menu=base.menu.unbounded()), plan)
    assert math.isclose(back.outcome.objective, found.outcome.objective, rel_tol=1e-9)
    assert back.placement.quality is not None and math.isclose(back.placement.quality.loss, plan.quality.loss)


@pytest.mark.parametrize(("layers", "bound"), [(2, {}), (1, {"least_bits": 4.0}), (1, {"most_loss": 0.01})])
def test_equals_brute_force(layers: int, bound: dict[str, Any]) -> None:
    base = problem(dense(layers), target(dram=int(1.25 * layers * MIB), gpu=False), **bound)
    options = choices_of(base)
    pinned = [[o for o in found if o.kv_home in ("", "dram")] for found in options]
    fitting = []
    for choice in every_choice(pinned):
        losses = sum(o.part.loss * n for o, n in choice)
        bits = 8 * sum(o.part.weight_bytes * n for o, n in choice) / sum(o.part.weights * n for o, n in choice)
        assert base.menu is not None
        kept = losses <= (base.menu.most_loss or 9.0) * (1 + 1e-9) and bits >= (base.menu.least_bits or 0.0)
        outcome = evaluate(base, choice)
        if kept and outcome.fits:
            fitting.append(outcome.objective)
    found = solve_counts(base, pinned)
    assert (found is None) == (not fitting)
    if found is not None:
        assert min(fitting) <= evaluate(base, found.choice).objective * (1 + 1e-6)
        assert evaluate(base, found.choice).objective <= min(fitting) * GAP


@settings(max_examples=4, deadline=None)
@given(
    st.one_of(st.builds(dense, st.integers(1, 6)), st.builds(sparse, st.integers(1, 4), st.sampled_from([4, 16]))),
    st.sampled_from([1, 2, 4, 64]),
    st.sampled_from([2, 3, 5, 40]),
    st.booleans(),
    st.sampled_from([{}, {"least_bits": 3.8}, {"most_loss": 0.05}]),
)
def test_random_plans(shape: ModelShape, vram: int, dram: int, gpu: bool, bounds: dict[str, Any]) -> None:
    machine = target(vram=vram * MIB, dram=dram * MIB, gpu=gpu)
    base = problem(shape, machine, **bounds)
    try:
        found = solve(base)
    except NoFit:
        return
    check(found)
    try:
        plan = placed_plan(found.problem, found.choice)
    except DiagnosticError as fault:
        assert "stream through it at once" in str(fault)
    else:
        room = dict(found.problem.machine.room)
        assert [d.message for d in check_stream(plan.program, found.problem.machine.target, room)] == []
    # More to choose from within the same bounds is never slower.
    assert base.menu is not None
    fewer = dataclasses.replace(base, menu=dataclasses.replace(base.menu, choices=base.menu.choices[:2]))
    try:
        assert found.outcome.objective <= solve(fewer).outcome.objective * GAP
    except NoFit:
        pass


def test_formats_are_used_where_they_help() -> None:
    """Within the loss of 4 bits throughout, a drive that binds gets narrower experts and attention pays for it."""
    shape = sparse(4, experts=16)
    base = problem(shape, target(gpu=False, dram=4 * MIB))
    found = solve(base)
    check(found)
    used = {(g.group, g.recipe) for g in found.placement.groups}
    assert ("experts", "w3") in used and ("attention", "w8a8") in used
    uniform = solve(dataclasses.replace(base, menu=None))
    assert found.outcome.objective < uniform.outcome.objective
    assert found.placement.quality is not None
    assert found.placement.quality.loss <= found.placement.quality.asked


def test_a_format_can_be_pinned() -> None:
    base = problem(dense(4), target(), least_bits=4.0)
    pins = tuple(parse_pin(t, base.shape, base.machine, NAMES) for t in ("mlp=w8a8", "layers.0-1.attention=w3"))
    found = solve(dataclasses.replace(base, pins=pins))
    check(found)
    assert {g.recipe for g in found.placement.groups if g.group == "mlp"} == {"w8a8"}
    assert {g.recipe for g in found.placement.groups if g.layers == "0-1" and g.group == "attention"} == {"w3"}
    with pytest.raises(DiagnosticError, match="nothing named 'w2a8'"):
        parse_pin("mlp=w2a8", base.shape, base.machine, NAMES)


_TENSORS = {
    "attention": ("self_attn.q_proj", "attention.q"),
    "mlp": ("mlp.down_proj", "mlp.down"),
    "experts": ("mlp.experts.3.up_proj", "experts.up"),
}


@pytest.mark.parametrize("shape", [dense(5), sparse(5)], ids=["dense", "sparse"])
def test_the_recipe_of_a_plan_stores_what_it_says(shape: ModelShape) -> None:
    found = solve(problem(shape, target(gpu=False, dram=5 * MIB), least_bits=4.1))
    assert len({g.recipe for g in found.placement.groups if g.layers}) > 1
    recipe = read_recipe(recipe_of_plan(found.placement).to_toml(), "plan.toml")
    for entry in found.placement.groups:
        if entry.group == "head":
            assert str(recipe.choice("lm_head.weight", "head").format) == entry.format
        for layer in layer_numbers(entry.layers):
            tail, role = _TENSORS[entry.group]
            choice = recipe.choice(f"model.layers.{layer}.{tail}.weight", role)
            assert str(choice.format) == entry.format
            assert choice == load_recipe(entry.recipe).choice("", role)
    assert recipe.choice("model.layers.0.mlp.gate.weight", "router").format is None
    # Planned anew with that recipe, the model has the same bytes in the same formats.
    parts = parts_of(shape, Formats("chosen", recipe))
    again = {(p.group, i): (p.nbytes, p.format) for p in parts for i in p.layers or (-1,)}
    chosen = {(g.group, i): g.format for g in found.placement.groups for i in layer_numbers(g.layers) or [-1]}
    assert {key: format for key, (_, format) in again.items()} == chosen
    assert sum(nbytes for nbytes, _ in again.values()) == sum(g.nbytes for g in found.placement.groups)
    one = solve(dataclasses.replace(found.problem, menu=None)).placement
    assert recipe_of_plan(one) == load_recipe(NAMES[0])
    with pytest.raises(DiagnosticError, match="no recipe to write"):
        recipe_of_plan(dataclasses.replace(one, recipe=""))


def sensitivities(path: Path, layers: int, losses: dict[str, float], sensitive: int) -> Path:
    """Of a dense model; one layer loses ten times as much as the others."""
    lines = ["not JSON", json.dumps({"group": 3})]
    for layer, tail in itertools.product(range(layers), ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj")):
        for format, loss in losses.items():
            entry = {"group": f"model.layers.{layer}.{tail}", "candidate": f"{format} x bf16"}
            lines.append(json.dumps({**entry, "loss": loss * (10 if layer == sensitive else 1)}))
    for layer, tail in itertools.product(range(layers), ("mlp.gate_proj+up_proj", "mlp.down_proj")):
        for format, loss in losses.items():
            entry = {"group": f"model.layers.{layer}.{tail}", "candidate": f"{format} x bf16"}
            lines.append(json.dumps({**entry, "loss": loss * (10 if layer == sensitive else 1)}))
    for format, loss in losses.items():
        lines.append(json.dumps({"group": "lm_head", "candidate": format, "loss": loss}))
    path.write_text("\n".join(lines))
    return path


def test_measured_losses_keep_bits_where_they_matter(tmp_path: Path) -> None:
    by_format = {f"q{bits}_sym<group=32, scale=f16>": 4.0**-bits for bits in (3, 4, 6, 8)}
    measured = MeasuredLosses.read(sensitivities(tmp_path / "s.jsonl", 6, by_format, sensitive=3))
    base = problem(dense(6), target(gpu=False, dram=64 * MIB), losses=measured, most_loss=0.3)
    found = solve(base)
    check(found)
    assert found.placement.quality is not None and found.placement.quality.source == "measured, s.jsonl"
    narrow = [i for g in found.placement.groups if g.recipe == "w3" for i in layer_numbers(g.layers)]
    assert narrow and 3 not in narrow
    short = MeasuredLosses(measured.source, {k: v for k, v in measured.table.items() if k[1] != 2})
    with pytest.raises(DiagnosticError, match="of layer 2"):
        problem(dense(6), target(), losses=short)
    with pytest.raises(DiagnosticError, match="no measured losses"):
        (tmp_path / "empty").write_text("{}")
        MeasuredLosses.read(tmp_path / "empty")
    with pytest.raises(DiagnosticError, match="cannot be read"):
        MeasuredLosses.read(tmp_path / "none")


def test_estimates_fall_with_bits() -> None:
    shape = dense(2)
    menu = menu_of(("w2a8", "w3", "w4a8-g32", "w6a8", "w8a8", ""), formats_of("w2a8"), shape)
    losses = [uniform_quality(menu, shape, n).loss for n in menu.names]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 1e-8
    assert [uniform_quality(menu, shape, n).bits for n in menu.names[-2:]] == [8.5, 16.0]


def test_what_is_no_choice_is_refused(tmp_path: Path) -> None:
    shape, asked = dense(2), formats_of("w4a8-g32")
    named = tmp_path / "named.toml"
    named.write_text('[[rule]]\nmatch = ".*up.*"\nformat = "bf16"\n')
    cases: tuple[tuple[tuple[str, ...], dict[str, Any], str], ...] = (
        (("w4a8-g3",), {}, "there is no recipe"),
        ((str(named),), {}, "chooses by names of tensors"),
        (("w3",), {"most_loss": 1e-9}, "loses as little as"),
        (("w3",), {"least_bits": 9.0}, "has 9 bits a weight"),
        (("w2a8", "w3", "w5a8", "w6a8", "w8a8", "nf4", "fp8", "mxfp4", "k4"), {}, "10 formats to choose among"),
    )
    for names, bounds, words in cases:
        with pytest.raises(DiagnosticError, match=words):
            menu_of(names, asked, shape, **bounds)
    plan = solve(problem(shape, target())).placement
    edited = dataclasses.replace(plan, groups=tuple(dataclasses.replace(g, recipe="w2a8") for g in plan.groups))
    with pytest.raises(DiagnosticError, match="stores embedding as 'w2a8'"):
        replay(problem(shape, target()), edited)
