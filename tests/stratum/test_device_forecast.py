"""What `run` and `plan` say of a step on a GPU without room for all weights: one number, by the session's own plan."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hw_targets import load
from runtime.artifact import open_artifact
from runtime.cuda.host_plan import plan_host
from runtime.cuda.hybrid_weights import plan_of
from runtime.cuda.session import CudaSession, gpu_step
from runtime.cuda.step_memory import scratch_bytes
from runtime.errors import RuntimeDiagnostic
from stratum.device_forecast import forecast, forecast_for, forecast_of, forecast_of_plan
from stratum.device_prices import Gpu, machine_like
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.passing_model import CHOSEN, PAGE, RUNNER, UNIT, write_passing
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import VOCAB

POSITIONS = 16


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_passing(tmp_path_factory.mktemp("passing") / "artifact", [3, 0, 3, 3, 0, 3])


def test_run_and_plan_say_the_same(path: Path) -> None:
    """By the machine with such a GPU, for every budget and every way to handle missing experts."""
    artifact = open_artifact(path)
    everything = scratch_bytes(gpu_step(artifact), VOCAB) + artifact.manifest.weights.bytes
    for less, missed in ((1, "fetch"), (3 * PAGE, "auto"), (6 * PAGE, "cpu")):
        device = open_checked(EmulatedDriver(RUNNER, granule=1 << 12), everything - less)
        with CudaSession(path, device=device, max_context=POSITIONS, missed_experts=missed) as session:
            said = forecast_of(session)
            target = machine_like(Gpu(session.device_name, 0))
        planned = forecast_for(artifact, everything - less, target, positions=POSITIONS, missed=missed)
        assert said is not None and said == planned
        assert said.line().startswith("forecast: ") and f"by the prices of {target.name}" in said.line()
        assert said.prediction.seconds > 0 and said.prediction.link_bytes > 0
    with CudaSession(path, device=open_checked(EmulatedDriver(RUNNER)), max_context=POSITIONS) as session:
        assert forecast_of(session) is None
    assert forecast_for(artifact, everything, load("h100-sxm"), positions=POSITIONS) is None


def test_of_a_budget_of_a_tier(path: Path, tmp_path: Path) -> None:
    """As `plan` asks; what is no artifact for GPUs, or fits, has no forecast."""
    target, artifact = load("h100-sxm"), open_artifact(path)
    everything = scratch_bytes(gpu_step(artifact), VOCAB) + artifact.manifest.weights.bytes
    found = forecast_of_plan(path, target, {"hbm": everything - 1}, POSITIONS)
    assert found == forecast_for(artifact, everything - 1, target, positions=POSITIONS) != None  # noqa: E711
    for model, budgets, machine in (
        (path, {}, target), (tmp_path, {"hbm": everything - 1}, target),
        (path, {"hbm": everything - 1}, load("epyc-9654")),
    ):  # fmt: skip
        assert forecast_of_plan(model, machine, budgets, POSITIONS) is None
    with pytest.raises(RuntimeDiagnostic, match="too few for the weights"):
        forecast_of_plan(path, target, {"hbm": 1}, POSITIONS)


def test_less_memory_of_either_kind_takes_longer(path: Path) -> None:
    artifact, target = open_artifact(path), load("h100-sxm")
    pieces = artifact.manifest.weights.pieces
    seconds: list[Any] = []
    for experts, pinned in ((5, 1 << 20), (3, 1 << 20), (3, 2 * UNIT + 40 * PAGE), (2, 2 * UNIT + 9 * PAGE)):
        plan = plan_of(artifact, PAGE + 6 * PAGE + 2 * experts * UNIT)
        made = forecast(artifact, plan, target, host=plan_host(pieces, plan, pinned), missed="fetch")
        assert 0 < made.hit <= 1 and min(count for _, count in plan.slots) >= CHOSEN
        seconds.append(made.prediction.seconds)
    assert all(b > 0.99 * a for a, b in pairwise(seconds)) and seconds[-1] > 1.02 * seconds[0]
