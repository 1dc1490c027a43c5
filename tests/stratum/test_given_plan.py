"""Plans that were edited: what cannot be meant is refused by name, what is computed from the rest is computed anew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ir.diagnostics import DiagnosticError
from passes.place.placement import Placement
from stratum.planning import PlanRequest, make_plan

TIERS = PlanRequest(
    "OLMoE-1B-7B-0924", "rtx-4090", "w4a8-g32", budgets=(("vram", "2GiB"),), what_if=False, simulate=False
)
DEVICES = PlanRequest("Qwen3-30B-A3B", "8xh100", what_if=False)


@pytest.fixture(scope="module")
def plans() -> dict[str, str]:
    return {name: make_plan(asked).placement.to_json() for name, asked in (("tiers", TIERS), ("devices", DEVICES))}


def given(folder: Path, asked: PlanRequest, plan: dict[str, Any]) -> Placement:
    file = folder / "plan.json"
    file.write_text(json.dumps(plan))
    budgets = asked.budgets
    return make_plan(
        PlanRequest(asked.model, asked.target, budgets=budgets, plan=file, what_if=False, simulate=False)
    ).placement


@pytest.mark.parametrize(
    ("where", "change", "words"),
    [
        ("session", {"batch": 0}, r"\$.session.batch"),
        ("session", {"chunk": -1}, r"\$.session.chunk"),
        ("session", {"depth": 1 << 40}, r"\$.session.depth"),
        ("session", {"prompt": 5000}, "session.prompt is 5000, more than the context"),
        ("session", {"context": 5000}, "more than what allenai/OLMoE-1B-7B-0924 takes"),
        ("session", {"micro_batches": 2}, "more than the batch"),
        ("degrees", {"vocabulary": 0}, r"\$.degrees.vocabulary"),
        ("degrees", {"tensor": 2}, "cannot be spread so: tensor 2"),
        (("groups", 1), {"layers": "0-99"}, "layers 0 to 15"),
        (("groups", 1), {"layers": "0,0"}, "layer 0 of attention is named twice"),
        (("groups", 1), {"group": "attn"}, "there is no group 'attn'"),
        (("groups", 1), {"slots": -1}, "slots"),
        (("kv", 0), {"positions": 64}, "and the others nowhere"),
    ],
)
def test_what_no_plan_can_mean_is_named(
    tmp_path: Path, plans: dict[str, str], where: str | tuple[str, int], change: dict[str, Any], words: str
) -> None:
    plan = json.loads(plans["tiers"])
    entry = plan[where] if isinstance(where, str) else plan[where[0]][where[1]]
    if "positions" in change:
        plan["kv"] = [{**entry, "layers": "0-15", "positions": 0}]
        entry = plan["kv"][0]
    entry |= change
    with pytest.raises(DiagnosticError, match=words):
        given(tmp_path, TIERS, plan)


def test_bytes_and_formats_are_not_taken_from_the_file(tmp_path: Path, plans: dict[str, str]) -> None:
    made, plan = Placement.from_json(plans["tiers"]), json.loads(plans["tiers"])
    for entry in (*plan["groups"], *plan["kv"]):
        entry |= {"nbytes": 5, "format": "none"}
    again = given(tmp_path, TIERS, plan)
    assert (again.groups, again.kv) == (made.groups, made.kv)
    assert again.decode.seconds == pytest.approx(made.decode.seconds)
    for tier in again.tiers:
        assert tier.weights == sum(g.nbytes for g in again.groups if g.tier == tier.name)
        assert tier.kv == sum(kv.nbytes for kv in again.kv if kv.tier == tier.name)


def test_plans_over_devices(tmp_path: Path, plans: dict[str, str]) -> None:
    plan = json.loads(plans["devices"])
    assert given(tmp_path, DEVICES, plan).decode == Placement.from_json(plans["devices"]).decode
    plan["degrees"] |= {"tensor": 4, "data": 2, "expert": 4, "vocabulary": 1}
    other = given(tmp_path, DEVICES, plan)
    assert other.degrees.expert == 4 and other.decode != Placement.from_json(plans["devices"]).decode
    for wrong in ({"tensor": 3}, {"expert": 3}, {"vocabulary": 3}, {"data": 64}):
        with pytest.raises(DiagnosticError, match="cannot be spread so"):
            given(tmp_path, DEVICES, {**plan, "degrees": {**plan["degrees"], **wrong}})
    plan["groups"][1] |= {"tier": "dram"}
    with pytest.raises(DiagnosticError, match="keeps everything in their own memory, not attention in dram"):
        given(tmp_path, DEVICES, plan)
