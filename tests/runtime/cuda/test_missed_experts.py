"""Experts that are not in a GPU's memory, computed by the CPU where that is sooner: which, and with what numbers.

With kernels of Python, whose CPU computes the same numbers exactly, outputs are those of a device that has room for
everything wherever experts are computed; with native code they are so within the rounding of bf16.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import passes.place.missed_experts as planned
from runtime import host
from runtime.artifact import Artifact, open_artifact
from runtime.cuda.device import Device
from runtime.cuda.driver import DeviceFault, OutOfDeviceMemory
from runtime.cuda.host_code import HostObjects
from runtime.cuda.host_experts import HostProgram, open_host
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.missed_experts import AUTO, CPU, FETCH, ExpertPrices, Missed, SpareLink, divide, read_order
from runtime.cuda.session import CudaSession
from runtime.cuda.step_memory import scratch_bytes
from runtime.cuda.weights import WeightStore
from runtime.errors import RuntimeDiagnostic
from tests.runtime.cuda import test_lowered_models as models
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.emulated_kernels import GridRunner
from tests.runtime.cuda.passing_model import CHOSEN, PAGE, RUNNER, UNIT, PythonExperts, write_passing
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import VOCAB

NEVER, EVEN, ALWAYS = ExpertPrices(1e9, 1.0), ExpertPrices(1e9, 1e9, 0.5, 0.0, 3e8), ExpertPrices(1.0, 1e9)

# -- which -------------------------------------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 9), max_size=8), st.sampled_from([0.2, 1.0, 1.7, 5.0]), st.sampled_from([0.0, 0.3, 1.0]),
    st.sampled_from([0.0, 0.5, 3.0]),
)  # fmt: skip
def test_the_rule_is_that_of_plans(loads: list[int], host_bytes: float, share: float, start: float) -> None:
    prices = ExpertPrices(1.0, host_bytes, share, start)
    brought, there = planned.divide(
        loads, fetch=1.0, near=lambda tokens: 0.0, far=lambda tokens: prices.host_s(1, tokens), start=start
    )
    assert divide(loads, prices, 1) == (list(brought), list(there))


@given(
    st.lists(st.integers(1, 9), max_size=8), st.sampled_from([0.3, 1.0, 4.0]), st.sampled_from([0.0, 0.2, 1.0, 9.0]),
    st.data(),
)  # fmt: skip
def test_those_on_the_disk_come_later(loads: list[int], host_bytes: float, disk: float, data: st.DataObject) -> None:
    """Everyone goes somewhere, those in memory as if there were no others; of each of the others the side that it was
    given to is done with it first, reading included."""
    read = data.draw(st.lists(st.sampled_from(range(len(loads))), unique=True) if loads else st.just([]))
    prices = ExpertPrices(1.0, host_bytes, 0.5, 0.1, disk)
    brought, there = divide(loads, prices, 1, read)
    assert sorted([*brought, *there]) == list(range(len(loads)))
    near = [i for i in range(len(loads)) if i not in read]
    for found, alone in zip((brought, there), divide([loads[i] for i in near], prices, 1), strict=True):
        assert [i for i in found if i not in read] == [near[i] for i in alone]
    link = sum(1.0 for i in brought if i not in read)
    host = 0.1 + sum(prices.host_s(1, loads[i]) for i in there if i not in read)
    for number, index in enumerate(read_order(loads, read), 1):
        arrived = number / disk if disk else 0.0
        by_host, by_link = max(host, arrived) + prices.host_s(1, loads[index]), max(link, arrived) + 1.0
        assert (by_host <= by_link) == (index in there)
        host, link = (by_host, link) if index in there else (host, by_link)


def test_what_waits_for_the_disk_has_the_link_to_itself() -> None:
    """Two in memory are shared by link and CPU; where a slow disk brings one at a time, the link takes both."""
    prices = ExpertPrices(1.0, 1 / 1.2, disk_bytes_per_s=0.2)
    assert divide([1, 1], prices, 1) == ([0], [1])
    assert divide([1, 1], prices, 1, read=[0, 1]) == ([0, 1], [])


@given(st.lists(st.integers(0, 4), min_size=1, max_size=30), st.floats(0.1, 10), st.integers(0, 3))
def test_for_later_only_the_time_that_is_left(missing: list[int], host_bytes: float, room: int) -> None:
    spare, prices = SpareLink(), ExpertPrices(1.0, host_bytes)
    for count in missing:
        found = spare.count(prices, 1, [1] * count, 0, room)
        assert 0 <= found <= min(room, count)
    spare, found, busy = SpareLink(), 0, 0.0
    for count in missing:
        found += spare.count(prices, 1, [1] * count, 0, 99)
        busy += count * prices.host_s(1, 1)
        assert found <= busy + 1e-6


# -- kernels of Python: the same numbers exactly -----------------------------------------------------------------------

FAILING = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel")


def opened(
    path: Path, order: str, seed: int, budget: int, missed: Missed, pinned: int | None = None
) -> tuple[EmulatedDriver, CudaSession, PythonExperts]:
    """`pinned` bytes of host memory, of which tiles and what the CPU works on take some; the rest is on the disk."""
    driver, code = EmulatedDriver(RUNNER, order=order, seed=seed), PythonExperts()

    def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
        device.host_limit_bytes = None if pinned is None else 1 << 20
        return HybridWeights(
            device, stream, artifact, plan_of(artifact, budget), missed=missed, code=code,
            others_pinned=0 if pinned is None else (1 << 20) - pinned,
        )  # fmt: skip

    return driver, CudaSession(path, device=open_checked(driver), weights=some), code


def least(layers: list[int]) -> int:
    return sum(CHOSEN * UNIT for n in layers if not n) + 2 * PAGE * max([0, *layers]) + PAGE


def step_of(at: int, count: int, seed: int = 0) -> tuple[list[int], range, list[int], list[int]]:
    return [(7 * (at + i) + seed) % VOCAB for i in range(count)], range(at, at + count), [0] * count, [count - 1]


def of_everything(path: Path, steps: list[tuple[Any, ...]]) -> list[np.ndarray]:
    with CudaSession(path, device=open_checked(EmulatedDriver(RUNNER, order="eager"))) as session:
        return [session.step(*step) for step in steps]


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([0, 0, 1, 2]), min_size=2, max_size=4), st.integers(0, 3),
    st.sampled_from(["eager", "lazy", "shuffled"]), st.integers(0, 99),
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.sampled_from([Missed(CPU, EVEN), Missed(AUTO, EVEN), Missed(AUTO, ALWAYS), Missed(AUTO, NEVER), Missed(FETCH)]),
    st.tuples(st.sampled_from(FAILING), st.integers(0, 40)), st.sampled_from([None, 2, 4]),
)  # fmt: skip
def test_wherever_experts_are_computed(
    tmp_path: Path, layers: list[int], more: int, order: str, seed: int, counts: list[int], missed: Missed,
    fault: tuple[str, int], pinned: int | None,
) -> None:  # fmt: skip
    """Any model, budgets, order of work, batches and prices, experts pinned or on the disk; a call of the driver that
    fails changes nothing but its step."""
    path = tmp_path / "-".join(map(str, layers))
    if not path.exists():
        write_passing(path, layers)
    steps = [step_of(sum(counts[:i]), count, seed) for i, count in enumerate(counts)]
    whole = of_everything(path, steps)
    pinned = None if pinned is None else 3 * max(layers) * PAGE + pinned * UNIT + 2 * PAGE
    driver, session, code = opened(path, order, seed, least(layers) + more * UNIT, missed, pinned)
    with session:
        for step, want in zip(steps[:-1], whole, strict=False):
            np.testing.assert_array_equal(session.step(*step), want)
        driver.plant(fault[0], Status.CUDA_ERROR_INVALID_VALUE, skip=fault[1])
        with contextlib.suppress(DeviceFault):
            np.testing.assert_array_equal(session.step(*steps[-1]), whole[-1])
        driver.plant(fault[0], Status.CUDA_ERROR_INVALID_VALUE, times=0)
        np.testing.assert_array_equal(session.step(*steps[-1]), whole[-1])
        report = session.hybrid
        assert report is not None and report.computed == code.computed
        assert report.lookups - report.hits >= report.computed >= report.later
        if missed.mode == FETCH or missed.prices is NEVER:
            assert code.computed == 0 and report.same_bits
        if missed.mode == CPU and 0 in layers and pinned is None:
            assert code.computed > 0 and "computed by the CPU" in report.summary()
    assert driver.leaks() == [] and code.closed


def test_experts_come_for_later_while_the_cpu_computes(tmp_path: Path) -> None:
    """The same tokens again and again: the cache follows them, though every missing expert is the CPU's."""
    path, layers = write_passing(tmp_path / "model", [0, 0]), [0, 0]
    driver, session, _ = opened(path, "shuffled", 5, least(layers), Missed(CPU, EVEN))
    with session:
        hits = []
        for at in range(6):
            session.step([3], [at], [0], [0])
            assert session.hybrid is not None
            hits.append(session.hybrid.hits)
        assert session.hybrid is not None and session.hybrid.later > 0 and hits[-1] - hits[-2] == CHOSEN * len(layers)
    assert driver.leaks() == []


@pytest.mark.parametrize("calls", range(1, 60, 6))
def test_ctrl_c_leaves_the_books_right(tmp_path: Path, calls: int) -> None:
    path, layers = write_passing(tmp_path / "model", [0, 1]), [0, 1]
    steps = [step_of(0, 1), step_of(1, 1)]
    whole = of_everything(path, steps)
    driver, session, code = opened(path, "lazy", 1, least(layers), Missed(CPU, EVEN))
    with session:
        np.testing.assert_array_equal(session.step(*steps[0]), whole[0])
        driver.interrupt_at = sum(driver.calls.values()) + calls
        with contextlib.suppress(KeyboardInterrupt):
            session.step(*steps[1])
        driver.interrupt_at = -1
        np.testing.assert_array_equal(session.step(*steps[1]), whole[1])
    assert driver.leaks() == [] and code.closed


@pytest.mark.parametrize("name", ["cuMemHostAlloc", "cuEventCreate", "cuStreamCreate"])
def test_what_cannot_be_had_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    path = write_passing(tmp_path / "model", [0])
    for skip in range(8):
        driver, code = EmulatedDriver(RUNNER), PythonExperts()
        driver.plant(name, Status.CUDA_ERROR_OUT_OF_MEMORY, skip=skip)

        def some(device: Device, stream: Any, artifact: Artifact, code: PythonExperts = code) -> WeightStore:
            plan = plan_of(artifact, least([0]))
            return HybridWeights(device, stream, artifact, plan, missed=Missed(CPU, EVEN), code=code)

        with (
            contextlib.suppress(OutOfDeviceMemory, DeviceFault),
            CudaSession(path, device=open_checked(driver), weights=some),
        ):
            pass
        assert driver.leaks() == []


def test_a_team_that_fails_is_said_once(tmp_path: Path) -> None:
    """The step ends with what the CPU said; the next one is right."""
    path = write_passing(tmp_path / "model", [0])
    steps = [step_of(0, 1)]
    driver, session, code = opened(path, "lazy", 1, least([0]), Missed(CPU, EVEN))
    run = code.run

    def fails(*_: Any) -> None:
        raise RuntimeDiagnostic("the CPU's threads did not finish some experts in time")

    with session:
        code.run = fails  # type: ignore[method-assign]
        with pytest.raises(RuntimeDiagnostic, match="did not finish"):
            session.step(*steps[0])
        code.run = run  # type: ignore[method-assign]
        np.testing.assert_array_equal(session.step(*steps[0]), of_everything(path, steps)[0])
    assert driver.leaks() == []


# -- native code -------------------------------------------------------------------------------------------------------

SPARSE, ROUNDED = "experts", "rounded"
LEVEL = host.best_portable_target(host.host_features()) if host.host_architecture() == "x86_64" else "aarch64"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return models.write_lowered(tmp_path_factory.mktemp("native") / "artifact", SPARSE, levels=(LEVEL,))


@pytest.mark.parametrize(("case", "tolerance"), [(SPARSE, models.TOLERANCE), (ROUNDED, models.TOLERANCE_OF_BYTES)])
def test_native_experts_within_rounding(artifact: Path, tmp_path: Path, case: str, tolerance: float) -> None:
    """All missing experts by the CPU's own code, beside a device that has room for everything; rows in bf16, and rows
    that are rounded to 8 bits."""
    if case != SPARSE:
        artifact = models.write_lowered(tmp_path / "artifact", case, levels=(LEVEL,))
    steps = [models.batch((0, 0, 2)), models.batch((0, 2, 1), (1, 0, 1))]
    found: dict[bool, list[np.ndarray]] = {}
    for on_cpu in (False, True):
        driver = EmulatedDriver(GridRunner(models.lowered(case)[1].kernels), order="lazy", seed=2)

        def some(device: Device, stream: Any, of: Artifact) -> WeightStore:
            plan = plan_of(of, 1 << 30)
            experts = plan.slots[0][0]
            unit = of.manifest.weights.pieces[experts].unit
            less = plan_of(of, plan.device_bytes - unit)  # a slot less: two tokens at once
            return HybridWeights(device, stream, of, less, missed=Missed(CPU), code=open_host(of, threads=2))

        with CudaSession(
            artifact, device=open_checked(driver), num_slots=models.SLOTS, weights=some if on_cpu else None
        ) as session:
            found[on_cpu] = [session.step(*step.arrays) for step in steps]
            if on_cpu:
                report = session.hybrid
                assert report is not None and report.computed > 0 and not report.same_bits
                assert report.prices is not None and min(report.prices) > 0
        assert driver.leaks() == []
    for got, want in zip(found[True], found[False], strict=True):
        assert np.abs(got - want).max() <= tolerance * np.abs(want).max()


def test_threads_of_the_cpu(artifact: Path) -> None:
    """Theirs that compute experts; refused, with the reason, where the CPU computes nothing."""
    found = open_artifact(artifact)
    step = found.gpu
    assert step is not None
    scratch = scratch_bytes(step, models.VOCAB)

    def opened(limit: int | None, **options: Any) -> tuple[EmulatedDriver, CudaSession]:
        driver = EmulatedDriver(GridRunner(models.lowered(SPARSE)[1].kernels), granule=1 << 12)
        return driver, CudaSession(artifact, device=open_checked(driver, limit), max_context=16, **options)

    less = scratch + found.manifest.weights.bytes - 1
    driver, session = opened(less, threads=3)
    with session:
        assert session.hybrid is not None and session.threads == session.hybrid.host_threads == 3
    assert driver.leaks() == []
    for limit, options, why in (
        (None, {"threads": 2}, "all weights are on the GPU"),
        (less, {"threads": 2, "missed_experts": "fetch"}, "--missed-experts fetch"),
        (less, {"threads": 0}, "0 threads"),
    ):
        with pytest.raises(RuntimeDiagnostic, match=why):
            opened(limit, **options)


def test_the_code_of_this_cpu_is_found(artifact: Path) -> None:
    program = HostProgram.of(open_artifact(artifact))
    assert program.code.file_for(host.host_architecture(), host.host_features()) == f"code/experts.{LEVEL}.o"
    assert program.code.file_for(host.host_architecture(), frozenset()) == ""
    assert program.code.file_for("riscv64", host.host_features()) == ""
    files = program.code.files
    both = HostObjects((*files, ("code/plain.o", files[0][1], ())))
    assert both.file_for(host.host_architecture(), frozenset()) == "code/plain.o"


@pytest.mark.parametrize(
    ("field", "change"),
    [
        ("gpu.experts is no object", lambda e: [1]),
        ("layers", lambda e: {**e, "layers": 3}),
        ("piece", lambda e: {**e, "layers": [{**e["layers"][0], "piece": 99}]}),
        ("columns", lambda e: {**e, "layers": [{**e["layers"][0], "columns": 0}]}),
        ("places", lambda e: {**e, "layers": [{**e["layers"][0], "places": [0, 1 << 40, 0, 0]}]}),
        ("places", lambda e: {**e, "layers": [{**e["layers"][0], "places": [0]}]}),
        ("x_bytes", lambda e: {**e, "layers": [{**e["layers"][0], "x_bytes": 3}]}),
        ("rounds", lambda e: {**e, "layers": [{**e["layers"][0], "rounds": "yes"}]}),
        ("features", lambda e: {**e, "code": [{**e["code"][0], "features": "all"}]}),
        ("no file", lambda e: {**e, "code": [{**e["code"][0], "file": "code/other.o"}]}),
        ("cannot be loaded", lambda e: {**e, "layers": [{**e["layers"][0], "function": "other"}]}),
    ],
)
def test_damaged_manifests(artifact: Path, field: str, change: Callable[[Any], Any]) -> None:
    """One diagnostic, before anything of it runs."""
    found = open_artifact(artifact)
    gpu: Any = found.manifest.raw["gpu"]
    damaged = replace(found.manifest, raw={**found.manifest.raw, "gpu": {**gpu, "experts": change(gpu["experts"])}})
    with pytest.raises(RuntimeDiagnostic, match=field):
        open_host(replace(found, manifest=damaged), threads=1)
