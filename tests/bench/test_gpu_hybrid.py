"""The bench of models larger than their device memory, on an emulated GPU: bytes as foretold, tokens the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import gpu_hybrid
from codegen import weight_pieces
from hw_targets import load
from passes.schedule.check_stream import check_stream
from runtime.artifact import open_artifact
from runtime.cuda.device import CudaDevice
from runtime.cuda.hybrid_weights import plan_of
from stratum.device_prediction import DeviceCase, decode_program, predict_device
from tests.runtime.cuda import test_hybrid, test_lowered_models
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import GridRunner
from tests.runtime.cuda.toy_model import open_checked


def written(tmp_path: Path, case: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_pieces, "DENSE_BYTES", 8192)
        return test_lowered_models.write_lowered(tmp_path / "artifact", case)


def test_a_run_beside_its_simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = "layers"
    path = written(tmp_path, case)

    def device() -> CudaDevice:
        return open_checked(EmulatedDriver(GridRunner(test_lowered_models.lowered(case)[1].kernels)))

    monkeypatch.setattr(gpu_hybrid, "COPY_BYTES", 1 << 16)
    monkeypatch.setattr(gpu_hybrid, "WARM_STEPS", 1)
    rows, same = gpu_hybrid.hybrid_rows(path, device, load("h100-sxm"), budget=90_000, steps=1, context=1)
    assert same is True and {row.what for row in rows} >= {"decode", "over the link"}
    assert all(row.predicted > 0 for row in rows[:2])
    assert rows[1].predicted == rows[1].measured > 0


def test_simulated_steps_are_sound(tmp_path: Path) -> None:
    """Proven; fewer hits and a slower link make a step longer, and what all fits moves nothing."""
    for case, budgets in (("sparse", (90_000, 1 << 20)),):
        artifact = open_artifact(written(tmp_path / case, case))
        assert artifact.gpu is not None
        found = []
        for budget in budgets:
            plan = plan_of(artifact, budget)
            one = DeviceCase(
                artifact.gpu, artifact.manifest.weights.pieces, plan, gpu_hybrid.with_link(load("h100-sxm"), 1e9),
                artifact.manifest.experts_per_token or 0, 16, 1, 0.5,
            )  # fmt: skip
            assert [d.message for d in check_stream(decode_program(one), one.target)] == []
            found.append(predict_device(one))
        assert [x.link_bytes for x in found] == sorted((x.link_bytes for x in found), reverse=True)
        assert [x.seconds for x in found] == sorted((x.seconds for x in found), reverse=True)
        assert found[-1].link_bytes == 0 < found[0].link_bytes


def test_without_a_model(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu_hybrid.main([str(tmp_path)]) == 2
    assert "not an artifact" in capsys.readouterr().err
    assert test_hybrid.CASES.keys() <= test_lowered_models.CASES.keys()
