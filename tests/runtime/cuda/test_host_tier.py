"""The disk behind pinned memory: faults of reads end in one message and change no bit afterwards, budgets hold, steps
are captured as far as the host decides nothing in them."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.cuda.driver import DeviceFault
from runtime.cuda.host_plan import LOAD_BYTES, STAGES, plan_host
from runtime.cuda.hybrid_plan import plan_hbm
from runtime.cuda.session import CudaSession
from runtime.cuda.step_memory import pinned_bytes
from runtime.errors import RuntimeDiagnostic
from tests.runtime.cuda.emulated_driver import EmulatedDriver, Status
from tests.runtime.cuda.passing_model import CHOSEN, EXPERTS, PAGE, RUNNER, UNIT, write_passing
from tests.runtime.cuda.test_hybrid import PIECES, passing, pieces_of
from tests.runtime.cuda.toy_model import open_checked
from tests.runtime.fake_artifact import VOCAB

LAYERS = [2, 0, 1, 3, 1, 2, 0, 3]
DEVICE = PAGE + 6 * PAGE + 2 * CHOSEN * UNIT  # the least that does
PINNED = STAGES * 3 * PAGE + 2 * UNIT
STEPS = [([5, 9], [0, 1], [0, 0], [1]), ([3], [2], [0], [0]), ([7], [3], [0], [0])]


@settings(max_examples=80, deadline=None)
@given(PIECES, st.integers(0, 60), st.integers(0, 60), st.integers(1, 3))
def test_plans_of_pinned_memory_keep_their_budget(
    sizes: list[tuple[str, int, int]], room: int, budget: int, per_token: int
) -> None:
    """What does not stay on the device is in the image, or comes from the disk; the least that is named does; more
    memory leaves no more on the disk."""
    pieces = pieces_of(sizes)
    try:
        hbm = plan_hbm(pieces, room * PAGE, per_token)
    except RuntimeDiagnostic as fault:
        hbm = plan_hbm(pieces, int(str(fault.expected).split("at least ")[1].split()[0]), per_token)
    try:
        plan = plan_host(pieces, hbm, budget * PAGE)
    except RuntimeDiagnostic as fault:
        least = int(str(fault.expected).split("at least ")[1].split()[0])
        assert least > budget * PAGE
        plan, budget = plan_host(pieces, hbm, least), -(-least // PAGE)
    assert plan.host_bytes <= max(budget, 2) * PAGE and plan.host_bytes % PAGE == 0
    parts = [(at, at + pieces[piece].bytes) for piece, at in plan.image]
    parts += [(plan.stages_at + n * plan.stage_bytes, plan.stages_at + (n + 1) * plan.stage_bytes)
              for n in range(plan.stages)]  # fmt: skip
    parts += [(plan.slots_at, plan.slots_at + plan.slots * plan.slot_bytes)] * bool(plan.slots)
    parts.sort()
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(parts))
    assert not parts or parts[-1][1] <= plan.host_bytes
    lacking = [piece for piece, slots in hbm.slots if slots * pieces[piece].unit < pieces[piece].bytes]
    assert sorted((*dict(plan.image), *plan.from_disk)) == sorted((*hbm.streamed, *lacking))
    assert all(pieces[piece].bytes <= plan.stage_bytes for piece in plan.staged)
    assert all(pieces[piece].unit <= plan.slot_bytes for piece in plan.cached)
    more = plan_host(pieces, hbm, (budget + 3) * PAGE)
    assert sum(pieces[p].bytes for p in more.staged) <= sum(pieces[p].bytes for p in plan.staged)
    everything = plan_host(pieces, hbm)
    assert everything.from_disk == () and everything.host_bytes <= max(LOAD_BYTES, sum(p.bytes for p in pieces))


class Disk:
    """`os.preadv` with faults: `errors` before reads that do, `short` of every read, the file gone at the end."""

    def __init__(self) -> None:
        self.errors, self.error = 0, errno.EIO
        self.short = self.ended = False
        self.interrupt_in = -1  # reads until Ctrl-C is pressed

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        self.interrupt_in -= 1
        if self.interrupt_in == 0:
            os.kill(os.getpid(), signal.SIGINT)
        if self.errors > 0:
            self.errors -= 1
            raise OSError(self.error, os.strerror(self.error))
        if self.ended:
            return 0
        views = [buffers[0][: max(PAGE, len(buffers[0]) // 2)]] if self.short else buffers
        return os.preadv(descriptor, views, offset)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_passing(tmp_path / "artifact", LAYERS)


def tokens_of(session: CudaSession) -> list[np.ndarray]:
    return [session.step(*step) for step in STEPS]


def whole(path: Path) -> list[np.ndarray]:
    with passing(path, "eager", 0, None)[1] as session:
        return tokens_of(session)


def test_what_comes_from_the_disk(path: Path) -> None:
    """Counted, and no other bits; the file may be gone once it is open."""
    disk = Disk()
    driver, session = passing(path, "lazy", 0, DEVICE, PINNED, disk)
    expected = whole(path)
    with session:
        (path / "weights" / "weights.bin").unlink()
        disk.short = True
        disk.errors = 2  # tried again
        for got, want in zip(tokens_of(session), expected, strict=True):
            np.testing.assert_array_equal(got, want)
        report = session.hybrid
        assert report is not None and report.host_bytes <= PINNED and report.retries == 2
        dense = sum(LAYERS) * PAGE
        # The first pieces of the next step are there, or on their way.
        assert report.steps * dense <= report.dense_bytes <= (report.steps + 1) * dense
        assert report.read_bytes >= report.dense_bytes - dense and report.reads > 0
        assert report.disk_bytes == dense + 2 * EXPERTS * UNIT
        assert report.host_lookups == report.lookups - report.hits > report.host_hits
        text = report.summary()
        assert "lie on the disk only" in text and "2 reads tried again" in text and "in pinned memory" in text
    assert driver.leaks() == []


@pytest.mark.parametrize("what", ["errors", "ended"])
def test_a_disk_that_fails_ends_a_step(path: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one message; when it is well again the same step gives what it should."""
    monkeypatch.setattr("runtime.weight_reader._PAUSES_S", (0, 0, 0))
    expected, disk = whole(path), Disk()
    driver, session = passing(path, "shuffled", 3, DEVICE, PINNED, disk)
    with session:
        np.testing.assert_array_equal(session.step(*STEPS[0]), expected[0])
        disk.errors, disk.ended = (1 << 30 if what == "errors" else 0), what == "ended"
        for _ in range(2):
            with pytest.raises(RuntimeDiagnostic, match=r"cannot be read at byte|end at byte") as caught:
                for _ in range(3):  # what was there already may do for one
                    session.step(*STEPS[1])
            assert "weights.bin" in str(caught.value.where)
        disk.errors, disk.ended = 0, False
        for step, want in zip(STEPS[1:], expected[1:], strict=True):
            np.testing.assert_array_equal(session.step(*step), want)
    assert driver.leaks() == []


def test_pinned_memory_that_refuses_direct_reads(path: Path) -> None:
    """As some drivers' does: reads then go through the page cache."""
    disk = Disk()
    disk.errors, disk.error = 1, errno.EFAULT
    _, session = passing(path, "lazy", 0, DEVICE, PINNED, disk)
    with session:
        for got, want in zip(tokens_of(session), whole(path), strict=True):
            np.testing.assert_array_equal(got, want)


def test_ctrl_c_while_the_disk_reads(path: Path) -> None:
    expected = whole(path)
    for reads in range(1, 22, 4):
        disk = Disk()
        driver, session = passing(path, "lazy", 1, DEVICE, PINNED, disk)
        with session:
            disk.interrupt_in = reads
            with contextlib.suppress(KeyboardInterrupt):
                tokens_of(session)
            disk.interrupt_in = -1
            session.release(0)
            for got, want in zip(tokens_of(session), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        assert driver.leaks() == []


def tokens_by_one(session: CudaSession, count: int) -> list[np.ndarray]:
    return [session.step([7 * n % VOCAB], [n], [0], [0]) for n in range(count)]


def test_steps_are_captured_as_far_as_nothing_is_decided(tmp_path: Path) -> None:
    """A dense model whose rest is pinned: one graph a step, whatever lies in the window. Where the host reads routers:
    a graph of what lies between them."""
    dense = write_passing(tmp_path / "dense", [1, 3, 2, 3, 1, 2])
    sparse = write_passing(tmp_path / "sparse", [1, 1, 0, 1, 1, 0, 1])
    # begin, mix, mix, route | experts, mix, mix, route | experts, mix, head
    for path, budget, graphs in ((dense, PAGE + 6 * PAGE, 1), (sparse, PAGE + 5 * PAGE + 2 * 3 * UNIT, 3)):
        for order in ("lazy", "shuffled"):
            with passing(path, "eager", 0, None)[1] as session:
                expected = tokens_by_one(session, 4)
            driver, session = passing(path, order, 0, budget)
            with session:
                for got, want in zip(tokens_by_one(session, 4), expected, strict=True):
                    np.testing.assert_array_equal(got, want)
                report = session.hybrid
                assert report is not None and (report.graphs, report.launches) == (4 * graphs, 0)
                assert report.steps == 4 and session.executor.replayed == (4 if path == dense else 0)
                if path == dense:  # and the first piece of the step behind them
                    assert report.dense_bytes == 4 * 12 * PAGE + PAGE
            assert driver.leaks() == []


def test_a_captured_step_is_that_of_what_lies_in_the_window(tmp_path: Path) -> None:
    """A prompt that ends anywhere leaves any pieces there; the steps behind it have graphs of their own."""
    path = write_passing(tmp_path / "artifact", [1, 3, 2, 3, 1, 2])
    with passing(path, "eager", 0, None)[1] as session:
        expected = tokens_by_one(session, 4)
    for skip in range(7):
        driver, session = passing(path, "lazy", 0, PAGE + 6 * PAGE)
        with session:
            session.step(range(12), range(12), [0] * 12, [0])
            session.release(0)
            tokens_by_one(session, 3)
            driver.plant("cuLaunchKernel", Status.CUDA_ERROR_INVALID_VALUE, skip=skip)
            with contextlib.suppress(DeviceFault):
                session.step(range(12), range(3, 15), [0] * 12, [0])
            driver.plant("cuLaunchKernel", Status.CUDA_ERROR_INVALID_VALUE, times=0)
            np.testing.assert_array_equal(session.step([21], [3], [0], [0]), expected[3])
            driver.plant("cuGraphLaunch", Status.CUDA_ERROR_INVALID_VALUE)
            with pytest.raises(DeviceFault):
                session.step([5], [4], [0], [0])
            session.release(0)
            for got, want in zip(tokens_by_one(session, 4), expected, strict=True):
                np.testing.assert_array_equal(got, want)
        assert driver.leaks() == []


def test_more_experts_at_once_than_pinned_slots(tmp_path: Path) -> None:
    """They come in rounds, each when the copies of the one before are over."""
    path = write_passing(tmp_path / "artifact", [0, 1, 0])
    step = (range(2), range(2), [0, 0], [1])
    with passing(path, "eager", 0, None)[1] as session:
        whole = session.step(*step)
    for seed in range(3):
        driver, session = passing(path, "shuffled" if seed else "lazy", seed, 2 * PAGE + 2 * 4 * UNIT, 2 * UNIT)
        with session:
            np.testing.assert_array_equal(session.step(*step), whole)
            assert session.hybrid is not None and session.hybrid.host_slots == 2 < session.hybrid.host_lookups
        assert driver.leaks() == []


def test_a_session_under_both_budgets(path: Path) -> None:
    """All that is pinned is within the bound: inputs, logits and tiles too. What is too little is said; a model that
    fits the device comes through buffers as large as there is room for."""
    expected = whole(path)
    with passing(path, "eager", 0, None)[1] as session:
        scratch = session.memory().arena
    pinned = pinned_bytes(session.gpu, VOCAB)
    for host, memory in ((pinned + PINNED + 4096, scratch + DEVICE + 4 * PAGE + 4096), (pinned + (4 << 10), None)):
        driver = EmulatedDriver(RUNNER, granule=1 << 12)
        device = open_checked(driver, None if memory is None else memory * 16 // 15)
        with CudaSession(path, device=device, host_memory=host, max_context=16) as session:
            assert (session.hybrid is None) == (memory is None)
            for got, want in zip(tokens_of(session), expected, strict=True):
                np.testing.assert_array_equal(got, want)
            assert host - (8 << 10) <= device.pinned_bytes() <= host or memory is None
        assert driver.leaks() == []
    device = open_checked(EmulatedDriver(RUNNER, granule=1 << 12), (scratch + DEVICE + 4 * PAGE + 4096) * 16 // 15)
    with pytest.raises(RuntimeDiagnostic, match="pinned host memory are too few") as caught:
        CudaSession(path, device=device, host_memory=pinned + PAGE, max_context=16)
    assert "at least" in str(caught.value.expected)
