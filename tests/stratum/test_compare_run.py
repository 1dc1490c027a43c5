"""A plan beside a run of the same model: every phase and part has both figures; what cannot be run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hw_targets.target import ComputeUnit, MemoryTier, Storage, StoragePoint, Target
from stratum import planning
from stratum.cli import main
from stratum.compare_run import Compared, compare, compared_text, parts_measured
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


def test_both_figures_of_every_part(moe_directory: Path) -> None:
    asked = PlanRequest(str(moe_directory), context=64, prompt=16, generate=4, what_if=False)
    rows = {row.what.strip(): row for row in compare(asked, make_plan(asked))}
    assert set(rows) >= {"prefill", "decode step", "attention", "experts", "head"}
    assert all(row.predicted > 0 and row.measured > 0 for row in rows.values())
    inner = sum(row.measured for what, row in rows.items() if what not in ("prefill", "decode step"))
    assert inner > 0.0


def test_a_budget_is_compared_too(moe_directory: Path) -> None:
    asked = PlanRequest(
        str(moe_directory), context=64, prompt=16, generate=4, what_if=False, budgets=(("memory", "3GiB"),)
    )
    rows = {row.what: row for row in compare(asked, make_plan(asked))}
    assert rows["read, a step"].measured >= 0 and rows["peak memory"].predicted > 100
    assert rows["peak memory"].unit == "MB" and " MB" in compared_text(list(rows.values()))


def test_command(moe_directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["plan", str(moe_directory), "--ctx", "64", "--prompt-tokens", "16", "--generate", "2", "--quick"]
    assert main([*arguments, "--compare-run"]) == 0
    out = capsys.readouterr().out
    assert "run on this machine" in out and "decode step" in out
    assert main([*arguments, "--compare-run", "--target", "rtx-4090"]) == 2
    assert "not for this machine" in capsys.readouterr().err
    assert main(["plan", "TinyLlama-1.1B-Chat-v1.0", "--compare-run"]) == 2
    assert "has no weights to run" in capsys.readouterr().err


def test_places_become_groups() -> None:
    rows = [("model.layers.*.self_attn.q_proj", 2.0), ("model.layers.*.mlp.experts.*.up_proj", 4.0), ("lm_head", 6.0),
            ("model.layers.*.mlp.down_proj", 8.0), ("model.norm", 2.0), ("-", 1.0)]  # fmt: skip
    assert parts_measured(rows, 2) == {"attention": 1.0, "experts": 2.0, "head": 4.0, "mlp": 4.0}
    assert "+25%" in compared_text([Compared("prefill", 1.25, 1.0)])
