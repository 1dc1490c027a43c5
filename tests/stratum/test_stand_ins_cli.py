"""`--stand-ins` of build, run and eval: what they say, and what they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stratum
from ir.diagnostics import DiagnosticError
from passes.place.placement import Placement
from runtime.artifact import open_artifact
from runtime.await_info import AwaitInfo, StandInInfo
from runtime.manifest import KVInfo, Manifest, ProgramInfo, TargetInfo, WeightsInfo
from runtime.piece_info import PieceInfo
from runtime.process_memory import resident_bytes
from runtime.stream_plan import StreamPlan
from stratum import built_planning, planning, process_account
from stratum.cli import main
from stratum.planning import PlanRequest, make_plan
from stratum.stand_in_prediction import StandInUse, conversation, foretold, light_share
from tests.plain_code import plain_code
from tests.stratum.test_stream_placement import HOST
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, write_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("stand_ins_cli") / "model", QWEN3_MOE)


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    with plain_code():
        return stratum.build(model, model.parent / "both", stand_ins="w2a8")


def events(text: str) -> dict[str, dict[str, Any]]:
    return {event["event"]: event for event in map(json.loads, text.splitlines())}


def test_run_says_how_many_were_used(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    budget = str(resident_bytes() + (256 << 20))
    common = ["run", str(artifact), "some text", "-n", "3", "-t", "1", "-c", "64", "--memory", budget]
    assert main([*common, "--json", "--stand-ins", "0.3"]) == 0
    found = events(capfd.readouterr().out)
    assert found["chosen"]["streaming"]["stand_ins"] == 0.3
    said = found["streaming"]
    assert (said["stand_in_share"], said["stand_ins"], said["full_model"]) == (0.3, 0, True)  # everything fits
    assert main([*common, "--stand-ins", "0.3"]) == 0
    assert "no stand-in was used: the output is that of the full model" in capfd.readouterr().err
    assert main([*common, "--json"]) == 0
    assert events(capfd.readouterr().out)["streaming"]["full_model"]


def test_inspect_shows_them(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(artifact)]) == 0
    assert "  stand-ins   w2a8, " in capfd.readouterr().out
    assert main(["inspect", str(artifact), "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)
    assert facts["stand_ins"] == "w2a8" and 0 < facts["stand_in_bytes"] < facts["weights_bytes"]


def test_plans_leave_them_out(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were none, and they can be used with a plan of a file."""
    monkeypatch.setattr(planning, "load_target", lambda name: HOST)
    monkeypatch.setattr(process_account, "resident_bytes", lambda: 120 << 20)  # a worker has run many tests before
    request = PlanRequest(str(artifact), context=64, budgets=(("memory", "512MiB"),), what_if=False)
    planned = make_plan(request)
    assert planned.warnings == () and planned.placement.simulated_step is not None
    file = artifact.parent / "plan.json"
    file.write_text(planned.placement.to_json())
    with stratum.load(artifact, plan=file, stand_ins=0.3, threads=1) as loaded:
        assert loaded.session.streamer is not None
        kinds = [loaded.manifest.weights.pieces[n].kind for n in loaded.session.streamer.plan.resident]
        assert "stand_ins" not in kinds and "dense" in kinds
        assert len(loaded.generate("abc", max_tokens=3, temperature=0).token_ids) == 3


def test_what_they_would_buy_is_foretold(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them with a larger share, never a longer step or more bytes; nothing without the option."""
    monkeypatch.setattr(planning, "load_target", lambda name: HOST)
    monkeypatch.setattr(
        built_planning, "expected_hits", lambda planned, stream: 0.3
    )  # of so small a model all would fit
    request = PlanRequest(str(artifact), context=64, budgets=(("memory", "512MiB"),), what_if=False)
    assert make_plan(request).placement.stand_ins is None
    found = []
    for share in (0.05, 0.3, 1.0):
        placement = make_plan(replace(request, stand_ins=share)).placement
        use = placement.stand_ins
        assert use is not None and placement.simulated_step is not None and Placement.from_json(placement.to_json())
        assert use.step_seconds <= placement.simulated_step and use.read_bytes <= use.read_bytes_without
        found.append(use.used)
    assert 0 < found[0] < found[1] < found[2]
    with pytest.raises(DiagnosticError, match="share above 0"):
        make_plan(replace(request, stand_ins=2.0))
    with pytest.raises(DiagnosticError, match="--memory"):
        make_plan(replace(request, stand_ins=0.2, budgets=()))


def test_shares_are_those_of_a_trained_router() -> None:
    """docs/streaming.md: of 8 experts, 2 a token, 71.4 % missing; within three points of what was measured."""
    measured = {0.05: 5.8, 0.1: 11.7, 0.2: 19.6, 0.3: 25.6, 0.4: 30.2, 0.5: 35.7}
    for share, percent in measured.items():
        assert abs(100 * 0.714 * light_share(8, 2, share) - percent) < 3
    assert light_share(64, 8, 1.0) == 1.0 and light_share(8, 1, 0.9) == 0.0
    assert StandInUse(0.5, 1.0, 0.5, 1.0, "").read == StandInUse(0.5, 1.0, 0.5, 1.0, "").computed == 0.5
    assert StandInUse(0.5, 0.0, 0.5, 1.0, "").read == StandInUse(0.5, 1.0, 0.5, 0.0, "").computed == 1.0


def test_what_was_not_asked_for_yet_is_missing(artifact: Path) -> None:
    """Where all experts have room a run still begins with an empty cache; the longer it is the less that matters."""
    manifest = open_artifact(artifact).manifest
    found = []
    for share, prompt in ((0.2, 1), (0.6, 1), (0.6, 60)):
        counts = foretold(manifest, StreamPlan(1 << 30, (), expert_bytes=1 << 40, stand_ins=share), prompt, 100)
        assert counts is not None
        found.append(counts.stand_ins)
    assert 0 <= found[0] < found[1] and found[2] < found[1]
    assert foretold(manifest, StreamPlan(1 << 30, (), expert_bytes=1 << 40), 1, 100) is None


def test_drawn_weights_are_those_of_the_router_that_shares_are_drawn_from() -> None:
    """And they stay: of a token's two experts, which one is light is mostly a matter of which is popular."""
    trace = conversation(8, 2, 4, 0, 400, 1, 3)
    for share in (0.1, 0.2, 0.3):
        light = float(np.mean(trace.weights < share))
        assert abs(light - light_share(8, 2, share)) < 0.1
    uses = np.bincount(trace.experts[:, 0].ravel(), minlength=8)
    rare, often = int(uses.argmin()), int(uses.argmax())
    weight = [float(np.mean(trace.weights[:, 0][trace.experts[:, 0] == expert])) for expert in (rare, often)]
    assert weight[0] < 0.45 < 0.6 < weight[1]


def test_forecasts_of_a_trained_model() -> None:
    """docs/streaming.md has what runs of the example model used, 99 tokens behind a prompt, of 8 experts in 5 layers;
    taken as independent, light and missing gave 37 to 74 % of it."""
    measured = {(10, 0.1, 64): 106, (10, 0.2, 1): 178, (10, 0.3, 256): 273, (20, 0.1, 1): 60, (20, 0.2, 64): 113,
                (20, 0.3, 64): 159}  # fmt: skip
    pieces, at = [], 0
    for layer in range(5):
        for kind, unit in (("experts", 8192), ("stand_ins", 4096)):
            pieces.append(PieceInfo(kind, at, 8 * unit, unit, f"layers.{layer}.mlp.{kind}"))
            at += 8 * unit
    weights = WeightsInfo("w", at, (), tuple(pieces))
    awaits = tuple(AwaitInfo(2 * n, (), None, StandInInfo(2 * n + 1, 0)) for n in range(5))
    programs = (ProgramInfo("decode", "stratum_step_decode", 16, 1 << 20, (), awaits),)
    manifest = Manifest("", {}, 100, 4096, "bf16", TargetInfo("host", "", "", ()), programs,
                        KVInfo(1, 1, 1, "bf16", 4, 16), weights, {}, {}, 2)  # fmt: skip
    for (slots, share, prompt), used in measured.items():
        counts = foretold(manifest, StreamPlan(1 << 30, (), expert_bytes=slots * 8192, stand_ins=share), prompt, 99)
        assert counts is not None and 0.6 * used < counts.stand_ins < 1.4 * used


def test_a_run_says_what_was_foretold(artifact: Path, capfd: pytest.CaptureFixture[str]) -> None:
    manifest = open_artifact(artifact).manifest
    stream = StreamPlan(1 << 30, (), expert_bytes=1 << 16, stand_ins=0.3)
    counts = foretold(manifest, stream, 5, 10)
    assert counts is not None and 0 < counts.stand_ins < counts.lookups <= 2 * (8 + 10 * 2) + 4
    budget = str(resident_bytes() + (256 << 20))
    common = ["run", str(artifact), "some text", "-n", "3", "-t", "1", "-c", "64", "--memory", budget]
    assert main([*common, "--stand-ins", "0.3"]) == 0
    assert "of 16 experts foretold" in (said := capfd.readouterr().err) and "0 of 15 measured" in said
    assert main([*common, "--stand-ins", "0.3", "--json"]) == 0
    told = events(capfd.readouterr().out)["stand_ins"]
    assert told["foretold"]["stand_ins"] <= 4 and told["used"] == 0 and told["lookups"] > 0  # a few are not read yet


def test_eval_gives_the_text_token_by_token(artifact: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text").write_text("def read_file(path):\n" * 3)
    budget = str(resident_bytes() + (256 << 20))
    arguments = ["eval", str(artifact), "--text", str(tmp_path / "text"), "-c", "16", "--chunks", "1", "-t", "1"]
    arguments += ["--reference", str(artifact), "--memory", budget, "--stand-ins", "0.3"]
    assert main([*arguments, "--json"]) == 0
    done = events(capfd.readouterr().out)["done"]
    used, experts = done["stand_ins"]["used"], done["stand_ins"]["experts"]
    assert 0 < used < experts and not done["stand_ins"]["full_model"]  # the cache begins empty
    assert done["divergence"]["mean"] > 0
    assert main(arguments) == 0
    said = capfd.readouterr().out
    assert f"stand-ins   {used} experts of less than 0.3" in said and "not that of the full model; of" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stand_ins": 0.2}, "everything is"),
        ({"stand_ins": 0.0, "memory": "1GiB"}, "share above 0"),
        ({"stand_ins": 1.5, "memory": "1GiB"}, "share above 0"),
        ({"stand_ins": float("nan"), "memory": "1GiB"}, "share above 0"),
    ],
)
def test_runs_that_cannot_be(artifact: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        stratum.load(artifact, **options)


def test_no_prompt_cache_beside_stand_ins(artifact: Path, tmp_path: Path) -> None:
    budget = resident_bytes() + (256 << 20)
    with (
        stratum.load(artifact, memory=budget, stand_ins=0.2) as loaded,
        pytest.raises(DiagnosticError, match="not both"),
    ):
        loaded.generate("abc", prompt_cache=tmp_path / "cache")


def test_builds_that_cannot_be(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    dense = write_model(tmp_path / "dense", LLAMA)
    for path, options, message in (
        (dense, {"stand_ins": "w2a8"}, "no experts that others could stand in for"),
        (model, {"stand_ins": "w2a9"}, "there is no recipe 'w2a9'"),
        (model, {"stand_ins": "w2a8", "pipeline": "cpu"}, "each decides the passes"),
        (model, {"stand_ins": "w8a8", "recipe": "w2a8"}, "no smaller than the experts"),
        (model, {"stand_ins": "w2a8", "recipe": "w2a8"}, "no smaller than the experts"),
        (model, {"stand_ins": "none"}, "no smaller than the experts"),
    ):
        with pytest.raises(DiagnosticError, match=message):
            stratum.build(path, out, **options)  # pyright: ignore[reportArgumentType]
        assert not out.exists()
