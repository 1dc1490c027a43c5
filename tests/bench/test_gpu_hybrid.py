"""The bench of models larger than their device memory, on an emulated GPU: bytes as foretold, tokens the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu_hybrid
from hw_targets import load
from passes.schedule.check_stream import check_stream
from runtime.artifact import open_artifact
from runtime.cuda.device import CudaDevice
from runtime.cuda.hybrid_weights import plan_of
from stratum.device_prediction import DeviceCase, decode_program, predict_device
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.passing_model import CHOSEN, PAGE, RUNNER, UNIT, write_passing
from tests.runtime.cuda.toy_model import open_checked

LAYERS = [1, 3, 2, 3, 1, 2]
LEAST = PAGE + 2 * 3 * PAGE


def device() -> CudaDevice:
    return open_checked(EmulatedDriver(RUNNER))


def test_a_run_beside_its_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The simulated step moves what the executed ones do, and all that passes through in each of them."""
    path = write_passing(tmp_path / "artifact", LAYERS)
    monkeypatch.setattr(gpu_hybrid, "COPY_BYTES", 1 << 16)
    rows, same = gpu_hybrid.hybrid_rows(path, device, load("h100-sxm"), budget=LEAST, steps=3, context=2)
    assert same is True and [row.what for row in rows] == ["decode", "over the link"]
    assert rows[0].predicted > 0 < rows[0].measured
    assert rows[1].predicted == rows[1].measured == sum(LAYERS) * PAGE / 1e6
    _, nothing = gpu_hybrid.hybrid_rows(path, device, load("h100-sxm"), budget=1 << 20, steps=1, context=2)
    assert nothing is True


def test_experts_that_are_found_are_not_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_passing(tmp_path / "artifact", [1, 0, 1, 0])
    monkeypatch.setattr(gpu_hybrid, "COPY_BYTES", 1 << 16)
    budget = 3 * PAGE + 2 * 3 * UNIT
    rows, same = gpu_hybrid.hybrid_rows(path, device, load("h100-sxm"), budget=budget, steps=8, context=2)
    assert same is True and [row.what for row in rows] == ["decode", "over the link", "experts found"]
    assert rows[1].measured == pytest.approx(2 * CHOSEN * (1 - rows[2].measured / 100) * UNIT / 1e6)
    assert rows[1].predicted == pytest.approx(rows[1].measured)


def test_simulated_steps_are_sound(tmp_path: Path) -> None:
    """Proven; less memory makes a step longer, fewer hits too, and what all fits moves nothing."""
    target = gpu_hybrid.with_link(load("h100-sxm"), 1e8)
    for number, layers in enumerate((LAYERS, [2, 0, 1, 0])):
        artifact = open_artifact(write_passing(tmp_path / str(number), layers))
        assert artifact.gpu is not None
        found = []
        for budget, hit in ((LEAST + 2 * 2 * UNIT, 0.0), (LEAST + 2 * 2 * UNIT, 0.5), (1 << 20, 0.5)):
            plan = plan_of(artifact, budget)
            pieces = artifact.manifest.weights.pieces
            case = DeviceCase(artifact.gpu, pieces, plan, target, CHOSEN, 16, 1, hit)
            assert [d.message for d in check_stream(decode_program(case), case.target)] == []
            found.append(predict_device(case))
        assert found[0].link_bytes >= found[1].link_bytes > found[2].link_bytes == 0
        assert found[0].seconds >= found[1].seconds > found[2].seconds


def test_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_hybrid.main([str(tmp_path)]) == 2
    assert "not an artifact" in capsys.readouterr().err
