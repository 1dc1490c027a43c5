"""Caches divided within a layer: never slower than whole layers, exact to the byte, proven and simulated as planned."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from frontends.shape_library import load_shape
from hw_targets import load
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError
from passes.place.formats import formats_of
from passes.place.kv_division import BLOCK
from passes.place.kv_parts import attended_pairs, kv_parts
from passes.place.machine import machine_of
from passes.place.option import Option
from passes.place.pins import parse_pin
from passes.place.placement import PlacedKV
from passes.place.problem import Problem, Session
from passes.place.solve import NoFit, Solution, replay, solve
from passes.schedule.check_stream import check_stream
from passes.schedule.placed_plan import placed_plan, prompt_plan, step_seconds
from stratum.cli import main
from stratum.plan_request import PlanRequest
from stratum.planning import make_plan
from tests.passes.place.machines import MIB, dense, sparse, target
from tests.passes.place.test_solve import check_plan

GIB = 1 << 30


def problem(machine: Target, layers: int = 4, *pins: str, experts: int = 0, **session: int) -> Problem:
    """A small model with a long context: its cache is a good part of it."""
    use = {"context": 2048, "prompt": 1024, "generate": 256, **session}
    shape = sparse(layers, experts) if experts else dense(layers)
    base = Problem(shape, machine_of(machine), formats_of("w8a8"), Session(**use))
    return dataclasses.replace(base, pins=tuple(parse_pin(pin, shape, base.machine) for pin in pins))


def halves(found: Solution) -> list[Option]:
    return [option for option, _ in found.choice if option.kv_old]


@settings(max_examples=4, deadline=None)
@given(
    vram=st.integers(4, 24), dram=st.integers(6, 40), gpu=st.booleans(), link=st.sampled_from([3e7, 3e8]),
    layers=st.integers(1, 3), experts=st.sampled_from([0, 4]),
    prompt=st.sampled_from([64, 1024, 1900]),
)  # fmt: skip
def test_never_slower_than_whole_layers(
    vram: int, dram: int, gpu: bool, link: float, layers: int, experts: int, prompt: int
) -> None:
    """All that is true of every plan is true of divided ones; more memory is never slower."""
    machine = target(vram=vram << 19, dram=dram << 19, gpu=gpu, link=link)
    base = problem(machine, layers, experts=experts, prompt=prompt, generate=128, chunk=8)
    try:
        whole = solve(dataclasses.replace(base, divide_kv=False))
    except NoFit:
        assume(False)
        return
    found = solve(base)
    check_plan(found)
    assert found.outcome.objective <= whole.outcome.objective * (1 + whole.gap + found.gap + 2e-3)
    more = dataclasses.replace(base, machine=base.machine.with_room("dram", base.machine.room_of("dram") + 2 * MIB))
    assert solve(more).outcome.objective <= found.outcome.objective * 1.006
    for option in halves(found):
        parts = kv_parts(found.problem, option)
        assert sum(part.positions for part in parts) == base.session.context and parts[0].positions >= 1
        assert sum(part.pairs(0, prompt) for part in parts) == pytest.approx(attended_pairs(0, prompt))


def test_a_part_of_a_layer_fills_what_is_left() -> None:
    """With a little more memory a little less is read, where whole layers gain nothing."""
    divided: list[float] = []
    whole: list[float] = []
    for extra in range(4):
        base = problem(target(gpu=False, dram=5 * MIB + extra * 40_000), 4, chunk=8)
        found = solve(base)
        assert halves(found)
        divided.append(found.outcome.objective)
        whole.append(solve(dataclasses.replace(base, divide_kv=False)).outcome.objective)
        used = next(tier for tier in found.outcome.tiers if tier.name == "dram")
        assert used.room - used.total < 3 * BLOCK * 512  # full, but for less than a block or two
    assert divided == sorted(divided, reverse=True) and divided[-1] < divided[0]
    assert all(less < more for less, more in zip(divided, whole, strict=True)) and len(set(whole)) < len(whole)


@pytest.mark.parametrize(("share", "old"), [("0.5", 1024), ("25%", 512), ("1", 0)])
def test_pinned_shares(share: str, old: int) -> None:
    """Of every layer so much lies there, proven and simulated, and a given-back plan is the same."""
    base = problem(target(vram=24 * MIB), 3, f"kv=dram:{share}")
    found = solve(base)
    check_plan(found)
    assert {option.kv_old for option, _ in found.choice if option.part.group == "attention"} == {old}
    assert (
        sum(e.nbytes for e in found.placement.kv if e.tier == "dram")
        == sum(e.nbytes for e in found.placement.kv) * (old or 2048) // 2048
    )
    for plan in (placed_plan(found.problem, found.choice, 2).program, prompt_plan(found.problem, found.choice)):
        assert [d.message for d in check_stream(plan, base.machine.target, dict(base.machine.room))] == []
    seconds = step_seconds(found.problem, found.choice)
    # Some layers' keys are brought, others attended to by the cores, while the link rests for want of buffers.
    assert 1 - 1e-9 <= seconds / found.outcome.decode.seconds < 1.25


def test_what_is_old_is_read_only_by_longer_texts() -> None:
    """While a text fits the newest part, nothing is read from the older one."""
    times = {}
    for prompt in (256, 768, 1500):
        found = solve(problem(target(gpu=False), 2, "kv=ssd:0.5", prompt=prompt, generate=64))
        parts = [kv_parts(found.problem, option) for option in halves(found)]
        times[prompt] = dict(found.outcome.decode.busy).get("ssd read", 0.0)
        assert all(old.seen == max(0, prompt + 32 - 1024) for old, _ in parts)
    assert times[256] == times[768] == 0.0 < times[1500]


def test_a_window_may_be_divided_as_its_whole_context() -> None:
    """A runtime keeps all positions of layers with a window: of those a step reads, what the newest part does not have
    is elsewhere."""
    base = problem(target(gpu=False), 3, "kv=ssd:0.5")
    shape = dense(3, model_type="mistral", sliding_window=512)
    base = dataclasses.replace(base, shape=shape, pins=())
    kv = {tier: PlacedKV("0-2", tier, "cores", "bf16", 0, 0) for tier in ("dram", "ssd")}
    plan = solve(base).placement
    for near, old in ((128, 384), (448, 64), (1024, 0)):
        parts = [dataclasses.replace(kv[tier], positions=n) for tier, n in (("dram", near), ("ssd", 2048 - near))]
        found = replay(base, dataclasses.replace(plan, kv=tuple(parts)))
        assert {option.kv_old for option, _ in found.choice if option.kv_home} == {old}


def test_bad_divisions_are_named() -> None:
    base = problem(target(gpu=False), 3, "kv=ssd:0.5")
    for pin, words in (("experts=dram:0.5", "only keys and values"), ("kv=dram:1.5", "no share"),
                       ("kv=gpu:0.5", "nothing named 'gpu'"), ("kv=dram:..", "no share")):  # fmt: skip
        with pytest.raises(DiagnosticError, match=words):
            parse_pin(pin, base.shape, base.machine)
    plan = solve(base).placement
    first, second = plan.kv
    for kv, words in (
        ((first, dataclasses.replace(second, positions=7)), "divides the cache of layers 0-2"),
        ((dataclasses.replace(first, tier="ssd"), second), "divides"),
        ((dataclasses.replace(first, unit="gpu"), second), "no such way"),
        ((PlacedKV("0-2", "dram", "cores", "bf16", 0, 1024), first, second), "divides"),
    ):
        with pytest.raises(DiagnosticError, match=words):
            replay(base, dataclasses.replace(plan, kv=kv))


def test_a_long_context_beside_a_gpu() -> None:
    """What whole layers leave of the GPU's memory is used: a step is shorter by a third."""
    machine = machine_of(load("rtx-4090"), budgets={"vram": 6 * GIB})
    use = Session(context=131072, prompt=65536, generate=128)
    base = Problem(load_shape("Llama-3.1-8B"), machine, formats_of("w4a8-g32"), use)
    found, whole = solve(base), solve(dataclasses.replace(base, divide_kv=False))
    assert found.outcome.decode.seconds < 0.7 * whole.outcome.decode.seconds


def test_the_command_says_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["plan", "Llama-3.1-8B", "--target", "rtx-4090", "--recipe", "w4a8-g32", "--ctx", "8192", "--quick"]
    assert main([*words, "--pin", "kv=dram:0.25", "-o", str(tmp_path / "plan.json")]) == 0
    assert "KV 75 % vram, 25 % dram; of divided layers the newest" in capsys.readouterr().out
    plan = json.loads((tmp_path / "plan.json").read_text())
    assert sorted(entry["positions"] for entry in plan["kv"]) == [2048, 6144]
    assert main([*words, "--plan", str(tmp_path / "plan.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kv"] == plan["kv"]


def test_a_divided_cache_says_what_filling_the_context_costs() -> None:
    """A step reads what is near until texts get long; a batch is not chosen for room that is reserved and not read."""
    request = PlanRequest("Llama-3.1-8B", "rtx-4090", "w4a8-g32", context=8192, batch=8, what_if=False, simulate=False)
    request = dataclasses.replace(request, budgets=(("vram", "8GiB"),))
    divided = make_plan(request).placement
    assert any(entry.positions for entry in divided.kv)
    assert divided.decode_at_context is not None and divided.decode_at_context > 2 * divided.decode.seconds
    chosen = make_plan(dataclasses.replace(request, batch=0)).placement
    assert chosen.decode_at_context is None and not any(entry.positions for entry in chosen.kv)
