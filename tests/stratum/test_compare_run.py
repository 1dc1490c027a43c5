"""A plan beside a run of the same model: every phase and part has both figures; what cannot be run is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hw_targets.target import ComputeUnit, MemoryTier, Storage, StoragePoint, Target
from ir.diagnostics import DiagnosticError
from stratum import compare_run, measure_run, planning
from stratum.cli import main
from stratum.compare_run import Compared, compare, compared_text
from stratum.measure_run import Measured, Phase, parts_measured
from stratum.planning import PlanRequest, make_plan

HOST = Target(
    "host", "a host", "x86_64-unknown-linux-gnu", "x86-64", frozenset(),
    units=(ComputeUnit("cores", "cpu", "dram", cores=2, peak=(("f32", 1e11),), source="test"),),
    tiers=(MemoryTier("dram", 4 << 30, read_bandwidth=3e10, source="test"),),
    storage=(Storage("ssd", 1 << 40, (StoragePoint(1 << 20, 1, 1e9),), "test", tier="dram"),),
)  # fmt: skip


@pytest.fixture(autouse=True)
def stated_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine of the tests may not be calibrated: its figures are stated here."""
    load = planning.load_target
    monkeypatch.setattr(planning, "load_target", lambda name: HOST if name == "host" else load(name))


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a process of its own does, without starting one."""
    monkeypatch.setattr(compare_run, "measure_apart", apart)


def apart(artifact: Path, *, plan: Path | None, **request: object) -> Measured:
    answer = measure_run._answer({"artifact": str(artifact), "plan": str(plan) if plan else "", **request})
    prefill, decode = (Phase(**answer[name]) for name in ("prefill", "decode"))
    return Measured(prefill, decode, answer["peak_bytes"], answer["stream"], answer["kv_bytes"])


def asked(model: Path, **changes: object) -> PlanRequest:
    values: dict[str, object] = {"context": 64, "prompt": 16, "generate": 4, "what_if": False}
    return PlanRequest(str(model), **values | changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [1, 2])
def test_both_figures_of_every_part(moe_artifact: Path, in_this_process: None, batch: int) -> None:
    """Of a built model, also in batches."""
    request = asked(moe_artifact, batch=batch)
    rows = {(row.phase, row.what): row for row in compare(request, make_plan(request))}
    parts = [(phase, what) for phase in ("prefill", "decode") for what in (phase, "attention", "experts", "head")]
    others = [(phase, "other") for phase in ("prefill", "decode")]
    assert set(rows) == {*parts, *others}
    assert all(rows[part].predicted > 0 and rows[part].measured > 0 for part in parts)
    for phase in ("prefill", "decode"):  # a table that adds up, unless the profiled repetition was the slower one
        measured = sum(row.measured for (found, what), row in rows.items() if found == phase and what != phase)
        assert measured >= rows[phase, phase].measured * (1 - 1e-9)


def test_a_budget_is_compared_too(moe_directory: Path, in_this_process: None) -> None:
    """Of a directory, which is built first; what is executed is the plan."""
    request = asked(moe_directory, budgets=(("memory", "3GiB"),))
    rows = {(row.phase, row.what): row for row in compare(request, make_plan(request))}
    assert rows["decode", "read"].measured == 0 == rows["decode", "read"].predicted
    assert rows["decode", "experts found"].predicted == 100
    peak = rows["all", "peak memory"]
    assert peak.unit == "MB" and peak.predicted > 100 and " MB" in compared_text([peak])


def test_command(moe_artifact: Path, capsys: pytest.CaptureFixture[str], in_this_process: None) -> None:
    arguments = ["plan", str(moe_artifact), "--ctx", "64", "--prompt-tokens", "16", "--generate", "2", "--quick"]
    assert main([*arguments, "--compare-run"]) == 0
    out = capsys.readouterr().out
    assert "run on this machine" in out and "decode step" in out
    assert main([*arguments, "--compare-run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["schema", "plan", "rows"] and found["schema"] == "stratum.compare/1"
    assert list(found["rows"][0]) == ["phase", "what", "unit", "predicted", "measured"]
    assert found["plan"]["schema"] == "stratum.plan/1"
    assert main([*arguments, "--compare-run", "--target", "rtx-4090"]) == 2
    assert "not for this machine" in capsys.readouterr().err
    assert main(["plan", "TinyLlama-1.1B-Chat-v1.0", "--compare-run"]) == 2
    assert "has no weights to run" in capsys.readouterr().err


def test_a_process_of_its_own(moe_artifact: Path, tmp_path: Path) -> None:
    """It measures, or says why it cannot."""
    request = {"memory": None, "context": 64, "batch": 1, "prompt": 8, "generate": 2}
    found = measure_run.measure_apart(moe_artifact, plan=None, **request)  # type: ignore[arg-type]
    assert found.stream == "" and found.decode.seconds > 0 and found.peak_bytes > 1 << 20
    with pytest.raises(DiagnosticError, match="cannot be read"):
        measure_run.measure_apart(moe_artifact, plan=tmp_path / "none", **request)  # type: ignore[arg-type]


def test_places_become_groups() -> None:
    rows = [("model.layers.*.self_attn.q_proj", 2.0), ("model.layers.*.mlp.experts.*.up_proj", 4.0), ("lm_head", 6.0),
            ("model.layers.*.mlp.down_proj", 8.0), ("model.norm", 2.0), ("-", 1.0)]  # fmt: skip
    assert parts_measured(rows, 2) == {"attention": 1.0, "experts": 2.0, "head": 4.0, "mlp": 4.0}
    assert "+25%" in compared_text([Compared("prefill", "prefill", 1.25, 1.0)])
