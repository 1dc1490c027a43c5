"""The bench of models larger than their device memory, on an emulated GPU: bytes as foretold, tokens the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench import gpu_hybrid
from hw_targets import load
from ir.diagnostics import DiagnosticError
from passes.schedule.check_stream import check_stream
from runtime.artifact import open_artifact
from runtime.cuda.device import CudaDevice
from runtime.cuda.host_experts import HostLayer
from runtime.cuda.host_plan import STAGES, plan_host
from runtime.cuda.hybrid_weights import plan_of
from runtime.cuda.missed_experts import MODES, ExpertPrices
from runtime.cuda.session import gpu_step
from runtime.cuda.step_memory import pinned_bytes
from stratum.compare_run import Compared
from stratum.device_case import DeviceCase
from stratum.device_plan import decode_program
from stratum.device_prediction import predict_device
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.passing_model import CHOSEN, EXPERTS, PAGE, RUNNER, UNIT, PythonExperts, write_passing
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import VOCAB

LAYERS = [1, 3, 2, 3, 1, 2]
LEAST = PAGE + 2 * 3 * PAGE


def device() -> CudaDevice:
    return open_checked(EmulatedDriver(RUNNER))


def run(path: Path, budget: int, **options: Any) -> tuple[dict[str, Compared], bool | None]:
    (found,) = gpu_hybrid.hybrid_rows(path, device, load("h100-sxm"), budget=budget, context=2, **options)
    assert found.predicted.dispatch_seconds < found.predicted.seconds
    return {row.what: row for row in found.rows}, found.same


@pytest.fixture(autouse=True)
def small_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_hybrid, "COPY_BYTES", 1 << 16)


def test_a_run_beside_its_simulation(tmp_path: Path) -> None:
    """The simulated step moves and launches what the executed ones do: all that passes through, and one graph."""
    path = write_passing(tmp_path / "artifact", LAYERS)
    rows, same = run(path, LEAST, steps=3)
    assert same is True and list(rows) == ["decode", "over the link", "kernels", "graphs"]
    assert rows["decode"].predicted > 0 < rows["decode"].measured
    assert rows["over the link"].predicted == rows["over the link"].measured == sum(LAYERS) * PAGE / 1e6
    assert rows["graphs"].predicted == rows["graphs"].measured == 1
    assert rows["kernels"].predicted == rows["kernels"].measured == 0
    _, nothing = run(path, 1 << 20, steps=1)
    assert nothing is True


def test_a_run_with_the_disk_beside_its_simulation(tmp_path: Path) -> None:
    """Dense pieces for which pinned memory has no room are read in each step, here and in the simulation."""
    path = write_passing(tmp_path / "artifact", LAYERS)
    others = pinned_bytes(gpu_step(open_artifact(path)), VOCAB) + 16 * EXPERTS
    rows, same = run(path, LEAST, steps=4, host=others + 10 * PAGE)
    assert same is True and list(rows) == ["decode", "over the link", "from the disk", "kernels", "graphs"]
    for what in ("over the link", "from the disk"):  # what is on its way when a step ends is the next one's, or not
        assert abs(rows[what].predicted - rows[what].measured) * 4 <= STAGES * max(LAYERS) * PAGE / 1e6
    assert rows["over the link"].predicted == sum(LAYERS) * PAGE / 1e6 >= rows["from the disk"].predicted > 0
    for what in ("kernels", "graphs"):
        assert rows[what].predicted == rows[what].measured
    assert rows["kernels"].measured + rows["graphs"].measured > 3


def test_experts_that_are_found_are_not_moved(tmp_path: Path) -> None:
    path = write_passing(tmp_path / "artifact", [1, 0, 1, 0])
    budget = 3 * PAGE + 2 * 3 * UNIT
    rows, same = run(path, budget, steps=8)
    assert same is True and list(rows) == ["decode", "over the link", "kernels", "graphs", "experts found"]
    found = rows["experts found"].measured / 100
    assert rows["over the link"].measured == pytest.approx(2 * CHOSEN * (1 - found) * UNIT / 1e6)
    assert rows["over the link"].predicted == pytest.approx(rows["over the link"].measured)
    assert rows["graphs"].predicted == rows["graphs"].measured == 3
    others = pinned_bytes(gpu_step(open_artifact(path)), VOCAB) + 16 * EXPERTS
    rows, same = run(path, budget, steps=8, host=others + 3 * UNIT)
    assert same is True
    there = rows["experts in pinned memory"].measured / 100
    assert rows["from the disk"].measured == pytest.approx(2 * CHOSEN * (1 - found) * (1 - there) * UNIT / 1e6)
    assert rows["from the disk"].predicted == pytest.approx(rows["from the disk"].measured)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pinned", [None, 3])
def test_every_way_to_handle_missing_experts(tmp_path: Path, mode: str, pinned: int | None) -> None:
    """The simulated step launches, brings and computes what the executed ones do, from memory and from the disk."""
    path = write_passing(tmp_path / "artifact", [1, 0, 1, 0])
    buffers = 8 * CHOSEN * 16 + (1 << 12)  # what the CPU works on
    others = pinned_bytes(gpu_step(open_artifact(path)), VOCAB) + 16 * EXPERTS + buffers
    host = None if pinned is None else others + pinned * UNIT
    rows, same = run(
        path, 3 * PAGE + 2 * 3 * UNIT, steps=6, host=host, modes=(mode,), code_of=lambda _: PythonExperts()
    )
    assert same is True and ("by the CPU" in rows) == (mode != "fetch")
    for what in ("kernels", "graphs"):
        assert rows[what].predicted == rows[what].measured
    missing = 2 * CHOSEN * (1 - rows["experts found"].measured / 100)
    drawn = 0.0 if mode == "fetch" else 0.2  # experts a step: which copies come in time varies, misses are drawn
    if mode == "cpu":
        assert missing == pytest.approx(rows["by the CPU"].measured)
        assert rows["by the CPU"].predicted == pytest.approx(missing, abs=drawn)
    if mode == "fetch":
        assert rows["over the link"].predicted == pytest.approx(rows["over the link"].measured)
    if pinned is not None:
        assert rows["from the disk"].predicted == pytest.approx(rows["from the disk"].measured, abs=drawn * UNIT / 1e6)


def test_simulated_steps_are_sound(tmp_path: Path) -> None:
    """Proven; less memory of either kind makes a step longer, fewer hits too, and what all fits moves nothing."""
    target = gpu_hybrid.with_disk(gpu_hybrid.with_link(load("h100-sxm"), 1e8), 2e7)
    for number, layers in enumerate((LAYERS, [2, 0, 1, 0])):
        artifact = open_artifact(write_passing(tmp_path / str(number), layers))
        assert artifact.gpu is not None
        found, pieces, least = [], artifact.manifest.weights.pieces, LEAST + number * 2 * CHOSEN * UNIT
        for budget, hit, host in (
            (least, 0.0, 9 * PAGE), (least, 0.0, 1 << 20), (least, 0.5, 1 << 20), (1 << 20, 0.5, 9 * PAGE),
        ):  # fmt: skip
            plan = plan_of(artifact, budget)
            below = plan_host(pieces, plan, host)
            case = DeviceCase(artifact.gpu, pieces, plan, target, CHOSEN, 16, 1, hit, below, 0.5)
            layers = tuple(HostLayer(n, "f", 8, 8, 8, CHOSEN, (0, -1, 0, -1)) for n, _ in plan.slots)
            for prices in (ExpertPrices(1e8, 1e8, 1.0, 1e-6, 2e7), ExpertPrices(1e8, 1e7), ExpertPrices(1e7, 1e9)):
                for mode in MODES:
                    other = replace(case, missed=mode, computing=layers, prices=prices)
                    assert [d.message for d in check_stream(decode_program(other), other.machine)] == []
                    predicted = predict_device(other)
                    assert predicted.later <= predicted.computed and (predicted.computed == 0 or mode != "fetch")
                    less = (predicted.computed - predicted.later) * UNIT
                    assert predicted.link_bytes == pytest.approx(predict_device(case).link_bytes - less)
            found.append(predict_device(case))
        assert found[0].link_bytes >= found[1].link_bytes >= found[2].link_bytes > found[3].link_bytes == 0
        assert found[0].seconds > found[1].seconds >= found[2].seconds > found[3].seconds
        assert found[0].read_bytes > found[1].read_bytes == found[3].read_bytes == 0
        plan = plan_of(artifact, least)
        below = plan_host(pieces, plan, 9 * PAGE)
        with pytest.raises(DiagnosticError, match="has no drive"):
            driveless = replace(target, storage=())
            predict_device(DeviceCase(artifact.gpu, pieces, plan, driveless, CHOSEN, host=below))


def test_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_hybrid.main([str(tmp_path)]) == 2
    assert "not an artifact" in capsys.readouterr().err
