"""`--memory` beside `--device cuda`: the whole process is bounded, and what neither memory has room for comes from the
disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stratum
from runtime.cuda import driver as cuda_driver
from runtime.cuda.session import CudaSession
from runtime.cuda.step_memory import pinned_bytes
from stratum import process_account
from stratum.cli import main
from stratum.process_account import DoesNotFit
from stratum.process_room import SLACK_BYTES, TABLES_SHARE
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.passing_model import CHOSEN, PAGE, RUNNER, UNIT, write_passing
from tests.runtime.fake_artifact import VOCAB

PROCESS = 100 << 20


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    made = EmulatedDriver(RUNNER, granule=1 << 12)
    monkeypatch.setattr(cuda_driver, "import_driver", lambda: made)
    monkeypatch.setattr(process_account, "resident_bytes", lambda: PROCESS)
    return made


def test_a_budget_of_the_process_goes_with_one_of_the_gpu(
    tmp_path: Path, driver: EmulatedDriver, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_passing(tmp_path / "artifact", [2, 0, 1, 3, 1, 2, 0, 3])
    step = ([5, 9], [0, 1], [0, 0], [1])
    with stratum.load(path, device="cuda", max_context=16) as model:
        assert isinstance(model.session, CudaSession) and model.session.hybrid is None
        whole, scratch = model.session.step(*step), model.session.memory().arena
        pinned = pinned_bytes(model.session.gpu, VOCAB) + 9 * PAGE + 3 * UNIT
    gpu = (scratch + 11 * PAGE + 2 * CHOSEN * UNIT) * 16 // 15
    budget = (PROCESS + SLACK_BYTES + pinned) * TABLES_SHARE // (TABLES_SHARE - 1)
    with stratum.load(path, device="cuda", max_context=16, device_memory=gpu, memory=budget) as model:
        assert isinstance(model.session, CudaSession)
        np.testing.assert_array_equal(model.session.step(*step), whole)
        report = model.session.hybrid
        assert report is not None and report.disk_bytes > 0 < report.read_bytes
        assert report.host_bytes <= pinned
    assert driver.leaks() == []
    with pytest.raises(DoesNotFit, match="weights pass through") as caught:
        stratum.load(path, device="cuda", max_context=16, device_memory=gpu, memory=budget - 8 * PAGE)
    least = caught.value.minimum
    with stratum.load(path, device="cuda", max_context=16, device_memory=gpu, memory=least) as model:
        np.testing.assert_array_equal(model.session.step(*step), whole)
    options = ["--device", "cuda", "--device-memory", str(gpu), "--memory"]
    assert main(["bench", str(path), *options, "64MiB", "-p", "2", "-n", "1"]) == 3
    assert "this process takes" in capsys.readouterr().err
    assert main(["bench", str(path), *options, str(budget), "-p", "4", "-n", "2", "-r", "1", "--no-calibration"]) == 0
    assert driver.leaks() == []
