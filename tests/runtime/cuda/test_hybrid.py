"""Models larger than the device memory they may use: the same bits as with everything there, on an emulated GPU whose
streams may do their work in any order that events allow."""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from codegen import weight_pieces
from runtime.artifact import Artifact
from runtime.cuda.device import Device
from runtime.cuda.driver import DeviceFault
from runtime.cuda.host_plan import plan_host
from runtime.cuda.hybrid_plan import plan_hbm
from runtime.cuda.hybrid_weights import HybridWeights, plan_of
from runtime.cuda.session import CudaSession
from runtime.cuda.weights import WeightStore
from runtime.errors import RuntimeDiagnostic
from runtime.manifest import PieceInfo
from runtime.weight_reader import Pread
from tests.runtime.cuda import test_lowered_models as models
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.emulated_kernels import GridRunner
from tests.runtime.cuda.passing_model import CHOSEN, EXPERTS, PAGE, RUNNER, UNIT, write_passing
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import VOCAB

# -- plans -------------------------------------------------------------------------------------------------------------

PIECES = st.lists(
    st.one_of(
        st.builds(lambda n: ("dense", n * 4096, 0), st.integers(1, 9)),
        st.builds(lambda n, unit: ("experts", n * unit * 4096, unit * 4096), st.integers(2, 8), st.integers(1, 3)),
    ),
    min_size=1,
    max_size=9,
)


def pieces_of(sizes: list[tuple[str, int, int]]) -> list[PieceInfo]:
    found, at = [PieceInfo("rows", 0, 4096, 128, "table")], 4096
    for kind, nbytes, unit in sizes:
        found.append(PieceInfo(kind, at, nbytes, unit, f"at {at}"))
        at += nbytes
    return found


@settings(max_examples=60, deadline=None)
@given(PIECES, st.integers(0, 60), st.integers(1, 3))
def test_plans_keep_their_budget(sizes: list[tuple[str, int, int]], budget: int, per_token: int) -> None:
    """Everything has a place of its own; more memory makes no more pass through, and the least that is named does."""
    pieces = pieces_of(sizes)
    try:
        plan = plan_hbm(pieces, budget * 4096, per_token)
    except RuntimeDiagnostic as fault:
        least = int(str(fault.expected).split("at least ")[1].split()[0])
        assert least > budget * 4096
        plan = plan_hbm(pieces, least, per_token)
        budget = -(-least // 4096)
    assert plan.device_bytes <= budget * 4096
    count = dict(plan.slots)
    taken = [(at, at + (count[p] * pieces[p].unit if p in count else pieces[p].bytes)) for p, at in plan.offsets]
    taken += [(at, at + plan.window_bytes) for at in plan.window_offsets]
    taken.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(taken)) and taken[-1][1] <= plan.device_bytes
    assert sorted((*plan.resident, *plan.streamed, *count)) == list(range(len(pieces)))
    assert all(min(per_token, pieces[p].bytes // pieces[p].unit) <= n <= pieces[p].bytes // pieces[p].unit
               for p, n in plan.slots)  # fmt: skip
    more = plan_hbm(pieces, budget * 4096 + (4 << 12), per_token)
    assert len(more.streamed) <= len(plan.streamed)


# -- runs --------------------------------------------------------------------------------------------------------------

CASES = {
    "layers": (replace(models.SMALL, layers=2, q_heads=2, kv_heads=1), ()),
    "sparse": (models.CASES["experts"][0], models.CASES["experts"][1]),
}
models.CASES.update(CASES)


@pytest.fixture(scope="module", params=list(CASES))
def built(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """Small dense pieces, so that there is something to pass through."""
    case = request.param
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_pieces, "DENSE_BYTES", 8192)
        models.lowered(case)
    return case, models.write_lowered(tmp_path_factory.mktemp(case) / "artifact", case)


def opened(path: Path, case: str, order: str, budget: int | None) -> tuple[EmulatedDriver, CudaSession]:
    driver = EmulatedDriver(GridRunner(models.lowered(case)[1].kernels), order=order, seed=3)

    def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
        """With two thirds of what does not stay on the device pinned, the rest on the disk."""
        plan = plan_of(artifact, budget or 0)
        pieces = artifact.manifest.weights.pieces
        passing_bytes = sum(pieces[piece].bytes for piece, _ in plan_host(pieces, plan).image)
        device.host_limit_bytes = device.pinned_bytes() + passing_bytes * 2 // 3
        store = HybridWeights(device, stream, artifact, plan)
        device.host_limit_bytes = None
        return store

    make = None if budget is None else some
    return driver, CudaSession(path, device=open_checked(driver), num_slots=models.SLOTS, weights=make)


STEPS = (
    models.batch((0, 0, 3)),
    models.batch((0, 3, 1)),
)


def logits(path: Path, case: str, order: str, budget: int | None) -> tuple[list[np.ndarray], HybridWeights | None]:
    driver, session = opened(path, case, order, budget)
    with session:
        store = session._held.weights
        found = [session.step(*step.arrays) for step in STEPS]
    assert driver.leaks() == []
    return found, store if isinstance(store, HybridWeights) else None


@cache
def with_everything(path: Path, case: str) -> list[np.ndarray]:
    return logits(path, case, "eager", None)[0]


def least(path: Path, case: str) -> int:
    with pytest.raises(RuntimeDiagnostic, match="too few for the weights") as caught:
        logits(path, case, "eager", 1)
    return int(str(caught.value.expected).split("at least ")[1].split()[0])


def test_the_same_bits_under_the_least_budget(built: tuple[str, Path]) -> None:
    """Work done as late as may be."""
    case, path = built
    whole = with_everything(path, case)
    smallest = least(path, case)
    full = sum(p.nbytes for p in models.lowered(case)[1].file.pieces)
    found, store = logits(path, case, "lazy", smallest)
    assert store is not None and store.device_bytes <= smallest < full
    for got, want in zip(found, whole, strict=True):
        np.testing.assert_array_equal(got, want)
    assert store.report.link_bytes > 0 < store.report.disk_bytes and store.report.read_bytes > 0
    assert store.report.steps >= len(STEPS) and "over the link" in store.report.summary()


# -- every byte of every piece, in kernels of Python -------------------------------------------------------------------

TILES = 16 * EXPERTS  # their bytes
OTHERS_PINNED = 1 << 16  # tiles, inputs and logits have room in it
FAILING = ("cuMemcpyHtoDAsync", "cuMemcpyDtoHAsync", "cuEventRecord", "cuStreamWaitEvent", "cuLaunchKernel")


def passing(
    path: Path, order: str, seed: int, budget: int | None, host: int | None = None, preadv: Pread = os.preadv
) -> tuple[EmulatedDriver, CudaSession]:
    """A session whose weights have `budget` bytes of the device and `host` of pinned memory."""
    driver = EmulatedDriver(RUNNER, order=order, seed=seed)

    def some(device: Device, stream: Any, artifact: Artifact) -> WeightStore:
        device.host_limit_bytes = None if host is None else host + OTHERS_PINNED
        plan = plan_of(artifact, budget or 0)
        return HybridWeights(device, stream, artifact, plan, others_pinned=OTHERS_PINNED - TILES, preadv=preadv)

    return driver, CudaSession(path, device=open_checked(driver), weights=None if budget is None else some)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(st.sampled_from([0, 1, 1, 2, 3]), min_size=3, max_size=7),
    st.sampled_from([0.0, 0.0, 0.2, 0.5]),
    st.sampled_from(["eager", "lazy", "shuffled"]),
    st.integers(0, 99),
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.tuples(st.sampled_from(FAILING), st.integers(0, 25)),
    st.one_of(st.none(), st.floats(0, 1)),
)
def test_no_byte_is_late(
    tmp_path: Path, layers: list[int], share: float, order: str, seed: int, counts: list[int], fault: tuple[str, int],
    pinned: float | None,
) -> None:  # fmt: skip
    """Any model, budgets of the device and of pinned memory, order of work and batches; a call of the driver that fails
    changes nothing but its step."""
    path = tmp_path / "-".join(map(str, layers))
    if not path.exists():
        write_passing(path, layers)
    full = sum(n * PAGE or EXPERTS * UNIT for n in layers) + PAGE
    least = sum(CHOSEN * UNIT for n in layers if not n) + 2 * PAGE * max([0, *layers]) + PAGE
    budget = max(least, round(least + share * (full - least)))
    host = None
    if pinned is not None:
        below = 3 * PAGE * max([0, *layers]) + 2 * UNIT
        host = below + round(pinned * (full - below)) if full > below else below
    driver, session = passing(path, order, seed, budget, host)
    whole_driver, whole = passing(path, "eager", 0, None)
    with session, whole:
        assert session.hybrid is not None
        at = 0
        for number, count in enumerate(counts):
            ids = [(7 * (at + i) + seed) % VOCAB for i in range(count)]
            step = (ids, range(at, at + count), [0] * count, [count - 1])
            at += count
            if number == len(counts) - 1:
                driver.plant(fault[0], Status.CUDA_ERROR_INVALID_VALUE, skip=fault[1])
                try:
                    np.testing.assert_array_equal(session.step(*step), whole.step(*step))
                except DeviceFault:
                    driver.plant(fault[0], Status.CUDA_ERROR_INVALID_VALUE, times=0)
                driver.plant(fault[0], Status.CUDA_ERROR_INVALID_VALUE, times=0)
            np.testing.assert_array_equal(session.step(*step), whole.step(*step))
    assert driver.leaks() == [] and whole_driver.leaks() == []


def test_a_session_finds_out_by_itself(tmp_path: Path) -> None:
    """Bounded device memory that has no room for all weights."""
    path = write_passing(tmp_path / "artifact", [3, 0, 3, 3, 0, 3])
    step = ([5, 9], [0, 1], [0, 0], [1])
    with CudaSession(path, device=open_checked(EmulatedDriver(RUNNER, granule=1 << 12)), max_context=16) as session:
        assert session.hybrid is None
        whole, scratch, full = session.step(*step), session.memory().arena, session.memory().weights
    driver = EmulatedDriver(RUNNER, granule=1 << 12)
    limit = scratch + full - 1
    with CudaSession(path, device=open_checked(driver, limit), max_context=16) as session:
        assert session.hybrid is not None and session.memory().weights < full
        np.testing.assert_array_equal(session.step(*step), whole)
    assert driver.leaks() == []


def test_ctrl_c_leaves_the_books_of_weights_right(tmp_path: Path) -> None:
    """Anywhere in the calls of a step; the same step then gives the bits that it should."""
    path = write_passing(tmp_path / "artifact", [2, 0, 1, 3])
    step, budget = ([5, 9], [0, 1], [0, 0], [1]), PAGE + 6 * PAGE + CHOSEN * UNIT
    _, session = passing(path, "eager", 0, None)
    with session:
        whole = session.step(*step)
    for calls in range(1, 40, 4):
        driver, session = passing(path, "lazy", 1, budget)
        with session:
            driver.interrupt_at = sum(driver.calls.values()) + calls
            with contextlib.suppress(KeyboardInterrupt):
                session.step(*step)
            driver.interrupt_at = 0
            np.testing.assert_array_equal(session.step(*step), whole)
        assert driver.leaks() == []
