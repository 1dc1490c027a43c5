"""Keys and values that a GPU has no room for: a context that is asked for puts those of some layers into the host's
memory, as a plan says, and the run says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import stratum
from runtime import host
from runtime.cuda import driver as cuda_driver
from runtime.cuda.session import CudaSession
from runtime.cuda.step_memory import scratch_bytes
from runtime.errors import RuntimeDiagnostic
from stratum import host_kv_choice, process_account
from stratum.device_prices import Gpu
from stratum.model import Model
from stratum.process_account import DoesNotFit
from stratum.process_room import SLACK_BYTES, TABLES_SHARE
from tests.runtime.cuda import test_host_kv as attention
from tests.runtime.cuda import test_lowered_models as models
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.emulated_kernels import GridRunner

CASE = "host_kv8"
GRANULE = 1 << 8
CONTEXT = models.CONTEXT
PROCESS = 100 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_lowered(tmp_path_factory.mktemp("kv8") / "artifact", CASE, attention=(attention.LEVEL,))


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> EmulatedDriver:
    made = EmulatedDriver(GridRunner(models.lowered(CASE)[1].kernels), granule=GRANULE)
    monkeypatch.setattr(cuda_driver, "import_driver", lambda: made)
    monkeypatch.setattr(process_account, "resident_bytes", lambda: PROCESS)
    return made


def on_gpu(model: Model) -> CudaSession:
    assert isinstance(model.session, CudaSession)
    return model.session


def planned(monkeypatch: pytest.MonkeyPatch, choose: Callable[[Gpu], tuple[int, ...] | None]) -> list[int]:
    """The plan's word by its budget; the list has the budgets that were asked for."""
    budgets: list[int] = []

    def _planned(artifact: object, gpu: Gpu, *rest: object) -> tuple[int, ...] | None:
        budgets.append(gpu.free_bytes)
        return choose(gpu)

    monkeypatch.setattr(host_kv_choice, "_planned", _planned)
    return budgets


def test_a_context_that_does_not_fit(path: Path, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is planned where all fits, or where no context is asked for; a plan that is too large is made again."""
    budgets = planned(monkeypatch, lambda gpu: (1,) if len(budgets) < 2 else (0, 1))
    with stratum.load(path, device="cuda", max_context=CONTEXT) as model:
        session = on_gpu(model)
        assert session.host_kv is None and not budgets
        kv = session.gpu.kv.nbytes(1, CONTEXT)
        least = session.manifest.weights.bytes + scratch_bytes(session.gpu, session.vocab_size)
    for share, layers, count in ((0.6, 1, 1), (0.2, 2, 2)):
        budgets.clear()
        limit = round((least + share * kv) * 16 / 15)
        with stratum.load(path, device="cuda", max_context=CONTEXT, device_memory=limit) as model:
            session = on_gpu(model)
            report = session.host_kv
            assert report is not None and report.layers == layers and len(budgets) == count
            held = session._held.device
            assert held is not None and held.used_bytes() <= limit
            session.step([5, 9], [0, 1], [0, 0], [1])
            assert held.used_bytes() <= limit and report.up_bytes > 0
        with stratum.load(path, device="cuda", device_memory=limit) as model:
            assert on_gpu(model).host_kv is None and len(budgets) == count
    assert driver.leaks() == []


def test_where_nothing_fits(path: Path, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the plan, then not in the process: the least that would do is named, and does."""
    planned(monkeypatch, lambda gpu: None)
    monkeypatch.setattr(host_kv_choice, "SPARE_BYTES", 0)
    with stratum.load(path, device="cuda", max_context=CONTEXT) as model:
        session = on_gpu(model)
        limit = session.manifest.weights.bytes + scratch_bytes(session.gpu, session.vocab_size)
    tight = (PROCESS + SLACK_BYTES + 1000) * TABLES_SHARE // (TABLES_SHARE - 1)
    with pytest.raises(DoesNotFit, match="keys and values of the cache lie in the rest") as caught:
        stratum.load(path, device="cuda", max_context=CONTEXT, device_memory=limit, memory=tight)
    with stratum.load(
        path, device="cuda", max_context=CONTEXT, device_memory=limit, memory=caught.value.minimum
    ) as model:
        report = on_gpu(model).host_kv
        assert report is not None and report.layers == 2
    with pytest.raises(RuntimeDiagnostic, match="the model does not fit"):
        stratum.load(path, device="cuda", max_context=CONTEXT, device_memory=limit // 2)
    assert driver.leaks() == []


def test_cpus_without_code_keep_nothing(path: Path, driver: EmulatedDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "host_features", frozenset)
    budgets = planned(monkeypatch, lambda gpu: (0, 1))
    with stratum.load(path, device="cuda", max_context=CONTEXT, device_memory=1 << 20) as model:
        assert on_gpu(model).host_kv is None and not budgets
