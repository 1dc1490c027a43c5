"""Keys and values of some layers in the host's memory, with attention by the CPU's own kernels, beside a GPU that is
emulated: logits as the graph's interpreter has them, whatever layers they are, and memory as planned."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from codegen import weight_pieces
from codegen.nvptx.lower_to_grid import GridSpec
from ir.formats import BF16
from ir.interpreter import interpret
from runtime import host
from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import Device
from runtime.cuda.driver import DeviceFault
from runtime.cuda.host_kv import HostCacheTooSmall, HostKV, plan_host_kv
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.session import LEAST_CHUNK_BYTES, CudaSession, gpu_step
from runtime.cuda.step_memory import pinned_bytes
from runtime.cuda.weights import BUFFERS, WeightStore
from runtime.errors import RuntimeDiagnostic
from runtime.memory import PAGE_BYTES
from tests.codegen.harness import Batch
from tests.runtime.cuda import test_lowered_models as models
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.emulated_kernels import GridRunner
from tests.runtime.cuda.toy_model import open_checked

LEVEL = host.best_portable_target(host.host_features()) if host.host_architecture() == "x86_64" else "aarch64"
TINY = replace(models.SMALL, hidden=32, ffn=32, layers=2, q_heads=2, kv_heads=1, dim=16)
CASES = {
    "host_bf16": (replace(TINY, norms="row"), ()),
    "host_kv8": (replace(TINY, norms="head"), ("kv8",)),
    "host_kv4": (replace(TINY, dim=32), ("kv4",)),
}
models.CASES.update(CASES)
models.PROGRAMS.update(dict.fromkeys(("host_kv8", "host_kv4"), (GridSpec("decode_16", 16, 16),)))
TOLERANCES = {"host_bf16": 0.01, "host_kv8": 0.03, "host_kv4": 0.1}  # of the largest logit


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The artifact of a case, written once; small dense pieces, so that some can pass through."""

    @cache
    def of(case: str) -> Path:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(weight_pieces, "DENSE_BYTES", 8192)
            models.lowered(case)
        return models.write_lowered(tmp_path_factory.mktemp(case) / "artifact", case, attention=(LEVEL,))

    return of


def opened(path: Path, case: str, order: str = "shuffled", **options: Any) -> tuple[EmulatedDriver, CudaSession]:
    driver = EmulatedDriver(GridRunner(models.lowered(case)[1].kernels), order=order, seed=1)
    return driver, CudaSession(path, device=open_checked(driver), num_slots=models.SLOTS, **options)


def following(first: int, second: int) -> tuple[Batch, Batch]:
    """Two steps of both sequences behind so many positions; the second launches the segments of the first again."""
    a, b = (models.batch((0, first + i, 1), (1, second + i, 1)) for i in range(2))
    return a, b


PROMPTS = (models.batch((0, 0, 14), (1, 0, 3)), *following(14, 3))  # by the program of prompts
STEPS = (models.batch((0, 0, 5), (1, 0, 2)), *following(5, 2))


@pytest.mark.parametrize(
    ("case", "layers", "steps"),
    [("host_bf16", (1,), PROMPTS), ("host_kv8", (0, 1), STEPS[:2]), ("host_kv4", (0,), STEPS[:2])],
)
def test_logits_are_those_of_the_model(
    case: str, layers: tuple[int, ...], steps: tuple[Batch, ...], written: Callable[[str], Path]
) -> None:
    """Ragged prompts, decoding by captured segments; nothing of these layers lies on the device."""
    path = written(case)
    model, _ = models.lowered(case)
    states = model.states(models.SLOTS, models.CONTEXT, BF16.dtype)
    driver, session = opened(path, case, host_kv=layers)
    with session:
        for one in steps:
            got = session.step(*one.arrays)
            (want,) = interpret(model.step, one.arrays, weights=model.weights, states=states)
            assert np.abs(got - want).max() <= TOLERANCES[case] * np.abs(want).max()
        report, kv, here = session.host_kv, session.executor.kv, session._held.host
        assert report is not None and kv is not None and here is not None
        assert kv.plan.layers == 2 - len(layers) and session.executor.replayed == 0
        tokens = sum(len(one.ids) for one in steps)
        gpu: Any = open_artifact(path).manifest.raw["gpu"]
        rows = gpu["attention"]["layers"][0]
        assert report.up_bytes == tokens * len(layers) * rows["out_bytes"]
        assert report.down_bytes == tokens * 4 * (len(layers) * rows["columns"] + 2 * rows["angles"])
        assert f"{len(layers)} of 2 layers in host memory" in report.summary() and report.steps == len(steps)
        assert 0 < here.committed_bytes() <= -(-here.plan.cache_bytes // PAGE_BYTES) * PAGE_BYTES
    assert driver.leaks() == []


def test_weights_pass_through_beside_it(written: Callable[[str], Path]) -> None:
    """The same bits as with all weights on the device; a step that a fault ends is right when it is taken again."""
    case, found = "host_bf16", []
    for passing in (False, True):

        def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
            everything = plan_of(artifact, 1 << 30).device_bytes
            return HybridWeights(device, stream, artifact, plan_of(artifact, everything - 4096))

        driver, session = opened(written(case), case, "lazy", host_kv=(0,), weights=some if passing else None)
        with session:
            made = [session.step(*STEPS[0].arrays)]
            if passing:
                assert session.hybrid is not None and session.hybrid.link_bytes > 0
                driver.plant("cuMemcpyDtoHAsync", Status.CUDA_ERROR_INVALID_VALUE)
                with pytest.raises(DeviceFault):
                    session.step(*STEPS[1].arrays)
            found.append([*made, session.step(*STEPS[1].arrays)])
        assert driver.leaks() == []
    for got, want in zip(*found, strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_lost_device_ends_it(written: Callable[[str], Path]) -> None:
    """The session says so and can be closed; the CPU's threads end with it."""
    driver, session = opened(written("host_bf16"), "host_bf16", host_kv=(0, 1))
    with session:
        driver.plant("cuStreamSynchronize", Status.CUDA_ERROR_ILLEGAL_ADDRESS)
        with pytest.raises(DeviceFault):
            session.step(*models.batch((0, 0, 1)).arrays)
        with pytest.raises(RuntimeDiagnostic, match="stopped after a fault of the GPU"):
            session.step(*models.batch((0, 0, 1)).arrays)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("stratum-worker")]


def test_the_budget_of_the_host_is_kept(written: Callable[[str], Path]) -> None:
    """What is not pinned counts too; the least that is named does."""
    artifact = open_artifact(written("host_bf16"))
    plan = plan_host_kv(artifact, (0, 1), models.SLOTS, models.CONTEXT)
    assert plan is not None and plan_host_kv(artifact, (), 1, 1) is None
    assert plan.cache_bytes == plan.info.bytes_per_position * models.CONTEXT * models.SLOTS
    least = plan.plain_bytes + plan.pinned_bytes + pinned_bytes(gpu_step(artifact), models.VOCAB)
    least += BUFFERS * min(LEAST_CHUNK_BYTES, artifact.manifest.weights.bytes)
    with pytest.raises(HostCacheTooSmall, match="too few for the keys and values") as caught:
        opened(written("host_bf16"), "host_bf16", host_kv=(0, 1), host_memory=least - 1)
    assert caught.value.lacking == 1 and f"at least {least} bytes" in str(caught.value)
    driver, session = opened(written("host_bf16"), "host_bf16", host_kv=(0, 1), host_memory=least)
    with session:
        device = session._held.device
        assert device is not None and device.pinned_bytes() + plan.plain_bytes <= least
        assert session.memory().kv_committed == 0
    assert driver.leaks() == []


def test_what_cannot_be_done_is_refused(written: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    path = written("host_bf16")
    with pytest.raises(RuntimeDiagnostic, match="the CPU has no attention for layer 2"):
        opened(path, "host_bf16", host_kv=(2,))
    with pytest.raises(RuntimeDiagnostic, match="cannot run on 0 threads"):
        opened(path, "host_bf16", host_kv=(0,), threads=0)
    monkeypatch.setattr(host, "host_features", frozenset)
    with pytest.raises(RuntimeDiagnostic, match="no attention for this CPU"):
        opened(path, "host_bf16", host_kv=(0,))


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("gpu.attention is no object", lambda a: [1]),
        ("layers", lambda a: {**a, "layers": 3}),
        (r"layers\[0\].layer", lambda a: {**a, "layers": [{**a["layers"][0], "layer": 9}]}),
        ("columns", lambda a: {**a, "layers": [{**a["layers"][0], "columns": 0}]}),
        ("places", lambda a: {**a, "layers": [{**a["layers"][0], "places": a["layers"][0]["places"][:1]}]}),
        ("program", lambda a: _first_place(a, program="other")),
        ("first", lambda a: _first_place(a, first=1 << 20)),
        ("last", lambda a: _first_place(a, last=0)),
        ("does not fit its launches", lambda a: _first_place(a, first=0)),
        ("does not fit its launches", lambda a: {**a, "layers": [{**a["layers"][0], "columns": 1 << 20}]}),
        ("cannot be loaded", lambda a: _first_place(a, function="other")),
        ("bytes_per_position", lambda a: {**a, "cache": {**a["cache"], "bytes_per_position": -1}}),
        ("features", lambda a: {**a, "code": [{**a["code"][0], "features": "all"}]}),
        ("no file", lambda a: {**a, "code": [{**a["code"][0], "file": "code/other.o"}]}),
    ],
)
def test_damaged_manifests(field: str, change: Callable[[Any], Any], written: Callable[[str], Path]) -> None:
    """One diagnostic, before a step."""
    found = open_artifact(written("host_bf16"))
    gpu: Any = found.manifest.raw["gpu"]
    raw = {**found.manifest.raw, "gpu": {**gpu, "attention": change(gpu["attention"])}}
    artifact = replace(found, manifest=replace(found.manifest, raw=raw))
    device = open_checked(EmulatedDriver(GridRunner(models.lowered("host_bf16")[1].kernels)))
    stream = device.new_stream()
    with pytest.raises(RuntimeDiagnostic, match=field):
        plan = plan_host_kv(artifact, (0,), 1, 64)
        assert plan is not None
        HostKV(device, stream, artifact, plan)
    device.free_stream(stream)
    device.close()


def _first_place(attention: Any, **changed: Any) -> Any:
    """The manifest's part with other words for the first program of the first layer."""
    layer = attention["layers"][0]
    places = [{**layer["places"][0], **changed}, *layer["places"][1:]]
    return {**attention, "layers": [{**layer, "places": places}]}
