"""Formats of the cache by where its parts lie: within the loss, never slower than one format, exact to the byte."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from passes.place.formats import formats_of
from passes.place.kv_formats import MEASURED, kv_format, kv_menu_of, kv_mixed
from passes.place.kv_losses import kv_loss
from passes.place.machine import machine_of
from passes.place.pins import parse_pin
from passes.place.placement import Placement, layer_numbers
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, replay, solve
from passes.quantize.recipe import load_recipe
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan
from stratum.cli import main
from stratum.plan_request import PlanRequest
from stratum.planning import make_plan
from tests.passes.place.machines import dense, sparse, target

LONG = PlanRequest(
    "Llama-3.1-8B", "ddr5-laptop", "w4a8-g32", context=16384, batch=1, prompt=12000, what_if=False, simulate=False,
)  # fmt: skip


def check_bytes(found: Solution) -> None:
    """Positions times the bytes of one in the format that the entry names; nothing is lost beyond the bound."""
    problem, plan = found.problem, found.placement
    menu, session = problem.kv_menu, problem.session
    assert menu is not None and plan.kv_quality is not None
    covered = dict.fromkeys(range(len(problem.shape.layers)), 0)
    lost = 0.0
    for entry in plan.kv:
        held = 0
        for number in layer_numbers(entry.layers):
            layer = problem.shape.layers[number]
            whole = layer.kv_tokens(session.context)
            positions = entry.positions or whole
            covered[number] += positions
            held += session.batch * positions * menu.at(entry.format).formats.kv_bytes(layer)
            lost += menu.at(entry.format).loss * positions / whole / len(covered)
        assert entry.nbytes == held
    assert all(n == problem.shape.layers[i].kv_tokens(session.context) for i, n in covered.items())
    assert sum(e.nbytes for e in plan.kv) == sum(t.kv for t in plan.tiers)
    assert math.isclose(plan.kv_quality.loss, lost, rel_tol=1e-9, abs_tol=1e-15)
    assert menu.most_loss is None or lost <= menu.most_loss * (1 + 1e-6)


@settings(max_examples=4, deadline=None)
@given(
    vram=st.integers(4, 24), dram=st.integers(6, 40), gpu=st.booleans(), layers=st.integers(1, 3),
    most=st.sampled_from([0.0, 2e-4, 1e-3, 1.0]), prompt=st.sampled_from([64, 1024]), experts=st.sampled_from([0, 4]),
)  # fmt: skip
def test_never_slower_than_one_format(
    vram: int, dram: int, gpu: bool, layers: int, most: float, prompt: int, experts: int
) -> None:
    shape = sparse(layers, experts) if experts else dense(layers)
    base = Problem(
        shape, machine_of(target(vram=vram << 19, dram=dram << 19, gpu=gpu)), formats_of("w8a8"),
        Session(context=2048, prompt=prompt, generate=128, chunk=8),
    )  # fmt: skip
    menu = kv_menu_of(("bf16", "kv8", "kv4"), base.formats, shape, most)
    single: list[Solution] = []
    for choice in menu.choices:
        if choice.loss <= most:
            try:
                single.append(solve(dataclasses.replace(base, formats=choice.formats)))
            except NoFit:
                continue
    try:
        found = solve(dataclasses.replace(base, kv_menu=menu))
    except NoFit:
        assert not single
        assume(False)
        return
    check_bytes(found)
    for one in single:
        assert found.outcome.objective <= one.outcome.objective * (1 + one.gap + found.gap + 2e-3)
    back = replay(found.problem, Placement.from_json(found.placement.to_json()))
    assert math.isclose(back.outcome.objective, found.outcome.objective, rel_tol=1e-9)
    assert back.placement.kv == found.placement.kv


@pytest.mark.parametrize("name", ["bf16", "kv8", "kv4"])
def test_one_format_is_the_plan_of_its_recipe(name: str) -> None:
    one = make_plan(dataclasses.replace(LONG, kv_formats=(name,))).placement
    recipe = "w4a8-g32" if name == "bf16" else f"w4a8-g32,{name}"
    assert one == make_plan(dataclasses.replace(LONG, recipe=recipe)).placement


def test_parts_of_a_layer_may_differ() -> None:
    """What the bound leaves goes where bytes cost most; such a plan can be judged and edited, not built."""
    shape, machine = dense(3), machine_of(target(vram=6 << 20, dram=40 << 20, link=3e7))
    base = Problem(shape, machine, formats_of("w8a8"), Session(context=2048, prompt=1024, generate=256, chunk=8))
    menu = kv_menu_of(("bf16", "kv8"), base.formats, shape, 1.7e-4)
    found = solve(dataclasses.replace(base, kv_menu=menu))
    check_bytes(found)
    assert kv_mixed(found.placement) and {e.format for e in found.placement.kv} == set(menu.texts)
    program = placed_plan(found.problem, found.choice, 2).program
    assert [d.message for d in check_stream(program, machine.target, dict(machine.room))] == []
    lost = sum(kv_loss(found.problem, option) * count for option, count in found.choice)
    assert 0.5 * 1.7e-4 <= lost <= 1.7e-4 * (1 + 1e-6)
    # Edited: all of it in 8 bits, by the name that recipes have.
    edited = dataclasses.replace(
        found.placement, kv=tuple(dataclasses.replace(e, format="kv8") for e in found.placement.kv)
    )
    free = dataclasses.replace(found.problem, kv_menu=kv_menu_of(("bf16", "kv8"), base.formats, shape, None))
    back = replay(free, edited)
    check_bytes(back)
    assert back.placement.kv_quality is not None
    assert math.isclose(back.placement.kv_quality.loss, MEASURED["kv8"], rel_tol=1e-9)
    with pytest.raises(DiagnosticError, match="none of the formats of the plan"):
        replay(free, dataclasses.replace(edited, kv=tuple(dataclasses.replace(e, format="kv3") for e in edited.kv)))


def test_pins_hold_and_are_named() -> None:
    shape, machine = dense(3), machine_of(target(vram=16 << 20, dram=40 << 20))
    base = Problem(shape, machine, formats_of("w8a8"), Session(context=2048, prompt=1024, generate=64, chunk=8))
    menu = kv_menu_of(("bf16", "kv8"), base.formats, shape, 1.0)
    for text in ("kv=dram", "kv=near", "kv=dram:0.5"):
        found = solve(dataclasses.replace(base, kv_menu=menu, pins=(parse_pin(text, shape, machine),)))
        check_bytes(found)
        assert text == "kv=near" or "dram" in {e.tier for e in found.placement.kv}
    small = dataclasses.replace(base, machine=machine.with_room("vram", 1 << 20), kv_menu=menu)
    pins = (parse_pin("kv=vram", shape, machine), parse_pin("head=vram", shape, machine))
    with pytest.raises(NoFit, match="not with what is pinned") as refused:
        solve(dataclasses.replace(small, pins=pins))
    assert refused.value.pins


def test_formats_that_are_worse_in_all_are_left_out() -> None:
    shape = dense(2)
    menu = kv_menu_of(("kv8", "bf16", "kv8", "kv4"), formats_of("w8a8"), shape, 1.0)
    assert [c.name for c in menu.choices] == ["kv8", "bf16", "kv4"]
    assert menu.at("kv8").text == load_recipe("kv8").kv and kv_format("bf16", formats_of("w8a8,kv8")).text == "bf16"
    wide = shape.layers[0]
    assert menu.at("kv4").formats.kv_bytes(wide) < menu.at("kv8").formats.kv_bytes(wide)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"kv_formats": ("bf16", "kv8")}, "without a bound of what they may lose"),
        ({"kv_formats": ("kv3",)}, "no format of a cache with a measured loss"),
        ({"kv_formats": ("kv4",), "max_loss": 1e-4}, "loses as little as"),
        ({"kv_formats": ("kv8", "kv4"), "max_loss": 1e-4}, "loses as little as"),
        ({"kv_formats": ("kv8",), "recipe": "w8a8,kv4"}, "says the format of the cache, too"),
        ({"kv_formats": ("kv8", "kv4"), "formats": ("w8a8",), "recipe": "w8a8", "max_loss": 4e-4}, "lose more than"),
    ],
)
def test_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(DiagnosticError, match=said):
        make_plan(dataclasses.replace(LONG, **changes))


def test_files_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One format throughout names its recipe and can be built; several are a plan only, which is said."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps({
        "model_type": "llama", "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 512, "vocab_size": 1024, "max_position_embeddings": 4096,
    }))  # fmt: skip
    of_it = ["plan", str(config), "--target", "ddr5-laptop", "--quick"]
    asked = [*of_it, "--recipe", "w8a8", "--ctx", "4096", "--kv-formats", "bf16,kv8"]
    plan, recipe, edited = tmp_path / "plan.json", tmp_path / "chosen.toml", tmp_path / "edited.json"
    assert main([*asked, "--max-loss", "0.01", "-o", str(plan), "--save-recipe", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert "build it with --recipe w8a8,kv8" in said and "plan only" not in said
    fields = json.loads(plan.read_text())
    assert fields["recipe"] == "w8a8,kv8" and fields["kv_quality"]["formats"] == ["bf16", "kv8"]
    assert load_recipe(str(recipe)).kv == load_recipe("kv8").kv
    near = fields["kv"][0]
    fields["kv"] = [{**near, "layers": "0", "format": "bf16"}, {**near, "layers": "1-2", "format": "kv8"}]
    plan.write_text(json.dumps(fields))
    assert main([*of_it, "--plan", str(plan), "-o", str(edited)]) == 0
    assert "plan only" in capsys.readouterr().out
    made = Placement.from_json(edited.read_text())
    assert kv_mixed(made) and [e.format for e in made.kv] == ["bf16", load_recipe("kv8").kv]
    assert made.kv[0].nbytes == 4096 * 2 * 2 * 64 * 2
    assert main([*of_it, "--plan", str(edited), "--save-recipe", str(recipe)]) == 2
    assert "several formats" in capsys.readouterr().err
