"""Where models run: `--device`, what `auto` takes and why, and what goes with one device only."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import stratum
import stratum.building
from hw_targets import calibrate
from hw_targets.calibrate import Calibration
from ir.diagnostics import DiagnosticError
from runtime.cuda import driver as cuda_driver
from runtime.cuda.driver import NoDevice
from runtime.cuda.session import CudaSession
from runtime.errors import RuntimeDiagnostic
from stratum.cli import main
from stratum.device_choice import choose_device
from stratum.model import Model
from tests.runtime.cuda.emulated_driver import EmulatedDriver
from tests.runtime.cuda.toy_model import emulated_driver, write_toy
from tests.runtime.fake_artifact import greedy_tokens, write_artifact
from tests.stratum.tiny_model import write_model


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy(tmp_path_factory.mktemp("toy") / "artifact")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., EmulatedDriver]:
    """Makes a GPU that is found as a real one would be."""

    def make(**options: Any) -> EmulatedDriver:
        made = emulated_driver(**options)
        monkeypatch.setattr(cuda_driver, "import_driver", lambda: made)
        return made

    return make


def test_auto_takes_what_an_artifact_was_built_for(toy: Path, tmp_path: Path) -> None:
    found = choose_device(toy, "auto")
    assert (found.device, found.why) == ("cuda", "the artifact was built for h100")
    built = write_artifact(tmp_path / "fake")
    assert choose_device(built, "auto").device == "cpu"


def test_a_directory_is_built_for_the_gpu_that_is_found(checkpoint: Path, gpu: Callable[..., EmulatedDriver]) -> None:
    for capability, target in ((90, "cuda-sm90a"), (89, "cuda"), (100, "cuda")):
        gpu(capability=capability)
        assert choose_device(checkpoint, "cuda").target == target


def test_auto_asks_the_gpu(checkpoint: Path, gpu: Callable[..., EmulatedDriver], monkeypatch: Any) -> None:
    driver = gpu()
    slow = Calibration(2, 1e7, 1e8)
    monkeypatch.setattr(calibrate, "cached", lambda threads: slow)
    found = choose_device(checkpoint, "auto")
    assert found.device == "cuda" and found.why.startswith("emulated GPU would make ")
    assert "tokens/s with all weights in its 1 GiB, the CPU " in found.why and "\n" not in found.why
    found = choose_device(checkpoint, "auto", device_memory=1000)
    assert found.device == "cpu" and "does not fit into 0.977 KiB of emulated GPU, even when" in found.why
    assert driver.leaks() == []
    gpu(devices=0)
    assert choose_device(checkpoint, "auto").why == "the NVIDIA driver finds no GPU"

    def missing() -> None:
        raise NoDevice("the package cuda-bindings is not installed")

    monkeypatch.setattr(cuda_driver, "import_driver", missing)
    found = choose_device(checkpoint, "auto")
    assert (found.device, found.why) == ("cpu", "the package cuda-bindings is not installed")


def test_options_decide_too(checkpoint: Path) -> None:
    assert choose_device(checkpoint, "auto", memory="1GiB", plan=None).why == "--memory is not for GPUs"
    assert choose_device(checkpoint, "auto", target="host").device == "cpu"
    with pytest.raises(DiagnosticError, match="--kv-dir, --plan are not for GPUs"):
        choose_device(checkpoint, "cuda", kv_dir="x", plan="y")
    with pytest.raises(DiagnosticError, match="--device-memory goes with --device cuda"):
        choose_device(checkpoint, "cpu", device_memory=5)
    with pytest.raises(DiagnosticError, match="--missed-experts goes with --device cuda"):
        stratum.load(checkpoint, missed_experts="fetch")
    with pytest.raises(DiagnosticError, match="missed experts: 'often'"):
        stratum.load(checkpoint, device="cuda", missed_experts="often")
    with pytest.raises(DiagnosticError, match="unknown device 'tpu'"):
        choose_device(checkpoint, "tpu")


def test_a_model_on_a_gpu(toy: Path, gpu: Callable[..., EmulatedDriver]) -> None:
    driver = gpu()
    with stratum.load(toy, device="cuda", max_context=100, missed_experts="fetch") as model:
        assert isinstance(model.session, CudaSession) and model.session.max_context == 100
        assert [event.token for event in stratum_tokens(model, [1, 2, 3], 5)] == greedy_tokens([1, 2, 3], 5)
    assert driver.leaks() == []
    with pytest.raises(RuntimeDiagnostic, match="the CPU computes nothing in this run: all weights are on the GPU"):
        stratum.load(toy, device="cuda", threads=2)


def stratum_tokens(model: Model, prompt: list[int], count: int) -> list[Any]:
    """Greedy tokens; the toy has no tokenizer."""
    from runtime.generation import GenerationParams, generate

    return list(generate(model.session, prompt, GenerationParams(max_tokens=count)))


def test_bench_on_a_gpu(toy: Path, gpu: Callable[..., EmulatedDriver], capsys: pytest.CaptureFixture[str]) -> None:
    driver = gpu()
    arguments = ["bench", str(toy), "--device", "cuda", "-p", "20", "-n", "3", "-r", "1", "--device-memory", "64MiB"]
    assert main(arguments) == 0
    out, err = capsys.readouterr()
    assert "| stratum emulated GPU |" in out and "tg3, emulated GPU" in err
    assert "what a copy within emulated GPU was measured to do: 20.0 GB/s read and written" in out
    assert driver.leaks() == []


def test_nothing_is_built_for_a_gpu_that_is_not_there(
    checkpoint: Path, gpu: Callable[..., EmulatedDriver], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(devices=0)
    monkeypatch.setattr(stratum.building, "build", None)
    with pytest.raises(NoDevice, match="finds no GPU"):
        stratum.load(checkpoint, device="cuda")


def test_a_prompt_cache_stays_on_the_cpu(toy: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["run", str(toy), "hello", "--device", "cuda", "--prompt-cache", str(tmp_path / "cache")]) == 2
    assert "--prompt-cache is not for GPUs" in capsys.readouterr().err
    assert choose_device(tmp_path, "auto", prompt_cache="x").device == "cpu"


def test_a_machine_without_gpu_says_so(
    toy: Path, gpu: Callable[..., EmulatedDriver], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(capability=75)
    assert main(["run", str(toy), "hello", "--device", "cuda"]) == 2
    assert "emulated GPU is sm_75" in capsys.readouterr().err
