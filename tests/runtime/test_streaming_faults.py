"""Weights on disk while the disk, the file or the user interfere: the same bits, or a diagnostic and no more."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest

from runtime import open_artifact, weight_reader
from runtime.errors import RuntimeDiagnostic
from runtime.memory import PAGE_BYTES
from runtime.weight_reader import WeightReader
from tests.runtime.interrupts import interrupted
from tests.runtime.streamed_models import FAMILIES, assert_same, batches, least_plan, logits, opened

pytestmark = pytest.mark.slow


def patience(seconds: float) -> Callable[[], None]:
    """Raises when it is called so late: what waits for ever must fail."""
    end_s = time.monotonic() + seconds

    def look() -> None:
        assert time.monotonic() < end_s, "nobody came"

    return look


class Disk:
    """os.preadv with faults planted: `plan(number of the call)` gives an errno, a number of bytes, or None.

    Errors strike the first read at each place only when they are `once`, so that trying again helps.
    """

    def __init__(self, plan: Callable[[int], int | tuple[str, int] | None], *, once: bool = False) -> None:
        self.plan, self.calls, self.once = plan, 0, once
        self._struck: dict[int, None] = {}
        self._lock = threading.Lock()

    def __call__(self, descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        with self._lock:
            number = self.calls
            self.calls += 1
        fault = self.plan(number)
        if isinstance(fault, int) and not (self.once and offset in self._struck):
            self._struck[offset] = None
            raise OSError(fault, os.strerror(fault))
        if isinstance(fault, tuple):
            kind, size = fault
            if kind == "end":
                return 0
            return os.preadv(descriptor, [buffers[0][:size]], offset)
        return os.preadv(descriptor, buffers, offset)


@pytest.mark.parametrize(
    "plan",
    [
        lambda n: errno.EIO if n % 3 == 1 else None,
        lambda n: errno.EINTR if n % 2 else None,
        lambda n: ("short", 4096) if n % 2 else None,
        lambda n: errno.EINVAL if n == 2 else None,  # the file system refuses O_DIRECT
        lambda n: ("short", 100) if n == 3 else None,
    ],
    ids=["eio", "interrupted", "short", "no-direct", "short-inside-a-page"],
)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_faults_that_pass_change_nothing(
    streamed: dict[str, Path], expected: dict, name: str, plan: Callable[[int], object]
) -> None:
    disk = Disk(plan, once=True)  # type: ignore[arg-type]
    with (
        patch("runtime.weight_reader._PAUSES_S", (0, 0, 0)),
        opened(streamed[name], least_plan(streamed[name]), preadv=disk) as session,
    ):
        assert_same(logits(session, batches(1)), expected[name, 1])
    assert disk.calls > 10


def test_weights_in_a_memory_file_system(streamed: dict[str, Path], expected: dict) -> None:
    """Older kernels refuse O_DIRECT there, newer ones take it: the same bits either way."""
    shared = Path("/dev/shm")
    if not shared.is_dir() or not os.access(shared, os.W_OK) or not hasattr(os, "O_DIRECT"):
        pytest.skip("there is no /dev/shm to write to")
    path = streamed["llama"]
    with tempfile.TemporaryDirectory(prefix="stratum-test-", dir=shared) as folder:
        there = shutil.copytree(path, Path(folder) / "model")
        try:
            os.close(os.open(there / "weights" / "weights.bin", os.O_RDONLY | os.O_DIRECT))
            takes = True
        except OSError:
            takes = False
        descriptor = os.open(there / "weights" / "weights.bin", os.O_RDONLY)
        try:
            assert weight_reader._direct(descriptor) == (descriptor, takes)
        finally:
            os.close(descriptor)
        with opened(there, least_plan(there)) as session:
            assert_same(logits(session, batches(1)), expected["llama", 1])


@pytest.mark.parametrize(
    ("fault", "message"),
    [(errno.EIO, "cannot be read at byte"), (errno.ENXIO, "cannot be read"), (("end", 0), "the weights end at byte")],
)
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_faults_that_stay_end_the_step_and_no_more(
    streamed: dict[str, Path], expected: dict, name: str, fault: object, message: str
) -> None:
    """One diagnostic that names the file; when the disk is well again the session goes on, with the same bits."""
    ill = threading.Event()
    disk = Disk(lambda n: fault if ill.is_set() else None)  # type: ignore[arg-type,return-value]
    steps = batches(2)
    with (
        patch("runtime.weight_reader._PAUSES_S", (0, 0, 0)),
        opened(streamed[name], least_plan(streamed[name]), preadv=disk) as session,
    ):
        assert_same(logits(session, steps[:2]), expected[name, 2][:2])
        ill.set()
        for _ in range(2):
            with pytest.raises(RuntimeDiagnostic, match=message) as caught:
                session.step(*steps[2])
            assert "weights.bin" in caught.value.where and caught.value.hint
        ill.clear()
        assert_same(logits(session, steps[2:]), expected[name, 2][2:])


def test_experts_that_could_not_be_read_are_read_again(streamed: dict[str, Path], expected: dict) -> None:
    """Whatever else arrived, and although the cache counts them as there."""
    path, steps = streamed["qwen3_moe"], batches(2)
    experts = [piece for piece in open_artifact(path).manifest.weights.pieces if piece.kind == "experts"]
    ill = threading.Event()

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if ill.is_set() and any(piece.offset <= offset < piece.offset + piece.bytes for piece in experts):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return os.preadv(descriptor, buffers, offset)

    plan = least_plan(path, expert_bytes=sum(piece.bytes for piece in experts))
    with patch("runtime.weight_reader._PAUSES_S", (0, 0, 0)), opened(path, plan, preadv=preadv) as session:
        for step, wanted in zip(steps, expected["qwen3_moe", 2], strict=True):
            if step is steps[0]:
                ill.set()
                with pytest.raises(RuntimeDiagnostic, match="cannot be read at byte"):
                    session.step(*step)
                ill.clear()
            np.testing.assert_array_equal(session.step(*step), wanted)


def test_a_file_cut_while_it_is_read(streamed: dict[str, Path], tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "cut.stratum"
    shutil.copytree(streamed["llama"], path)
    with opened(path, least_plan(path)) as session:
        session.step([1], [0], [0], [0])
        os.truncate(path / "weights" / "weights.bin", 4096)
        with pytest.raises(RuntimeDiagnostic, match="the weights end at byte"):
            for at in range(1, 4):
                session.step([1], [at], [0], [0])


def test_a_file_that_is_written_to_while_it_is_read(streamed: dict[str, Path], tmp_path: Path) -> None:
    """Its tokens would be those of no model."""
    path = tmp_path / "other.stratum"
    shutil.copytree(streamed["llama"], path)
    file = path / "weights" / "weights.bin"
    with opened(path, least_plan(path)) as session:
        session.step([1], [0], [0], [0])
        with file.open("r+b") as handle:
            handle.seek(file.stat().st_size // 2)
            handle.write(bytes(100))
        os.utime(file, ns=(0, 0))  # clocks of file systems are coarse
        for _ in range(2):
            with pytest.raises(RuntimeDiagnostic, match="was written to while it was read") as caught:
                session.step([1], [1], [0], [0])
            assert "weights.bin" in caught.value.where
    with opened(path, least_plan(path)) as session:
        session.step([1], [0], [0], [0])


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_an_interrupt_while_waiting(streamed: dict[str, Path], expected: dict, name: str) -> None:
    """Ctrl-C in the middle of a step, at every read of it: the step ends, the next one is right."""
    steps = batches(3)
    at = -1

    def plan(number: int) -> None:
        if number == at:
            signal.raise_signal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else os.kill(
                os.getpid(), signal.SIGINT
            )

    disk = Disk(plan)  # type: ignore[arg-type]
    with opened(streamed[name], least_plan(streamed[name]), preadv=disk) as session:
        session.step(*steps[0])
        interrupted = 0
        for offset in (0, 1, 2, 5, 9):
            at = disk.calls + offset
            try:
                session.step(*steps[1])
            except KeyboardInterrupt:
                interrupted += 1
        at = -1
        assert interrupted
        assert_same(logits(session, steps[1:]), expected[name, 3][1:])


def opened_reader(folder: Path, pages: int, preadv: Callable[..., int] = os.preadv, threads: int = 1) -> WeightReader:
    """Of a file of pages, each full of its number."""
    file = folder / "file"
    file.write_bytes(b"".join(bytes([number]) * PAGE_BYTES for number in range(pages)))
    memory = np.frombuffer(mmap.mmap(-1, pages * PAGE_BYTES), np.uint8)  # on a page
    descriptor = os.open(file, os.O_RDONLY)
    return WeightReader(
        str(file), descriptor, memory.nbytes, memory, threads=threads, request_bytes=PAGE_BYTES, preadv=preadv
    )


def test_urgent_reads_go_before_what_waits(tmp_path: Path) -> None:
    """In the order in which they were asked for."""
    order: list[int] = []
    begun, free = threading.Event(), threading.Event()

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        order.append(offset // PAGE_BYTES)
        begun.set()
        free.wait()
        return os.preadv(descriptor, buffers, offset)

    started_s = time.perf_counter()
    reader = opened_reader(tmp_path, 8, preadv)
    try:
        jobs = [reader.submit([(0, 3 * PAGE_BYTES)], "later")]
        begun.wait()
        jobs += [
            reader.submit([(at * PAGE_BYTES, 2 * PAGE_BYTES)], "now", urgent=urgent)
            for at, urgent in ((3, False), (5, True))
        ]
        free.set()
        for job in jobs:
            job.wait(meanwhile=patience(120))
        assert 0 < reader.counters.busy_s <= time.perf_counter() - started_s
    finally:
        free.set()
        reader.close()
    assert list(dict.fromkeys(order)) == [0, 5, 6, 1, 2, 3, 4]  # once more where direct reads are refused


@pytest.mark.parametrize("direct", [True, False])
def test_what_is_read_through_the_page_cache_does_not_stay_there(tmp_path: Path, direct: bool) -> None:
    """It would count against the budget a second time."""
    dropped: list[tuple[int, int]] = []
    disk = Disk(lambda n: errno.EINVAL if n == 0 and not direct else None, once=True)
    with patch("os.posix_fadvise", lambda descriptor, offset, nbytes, advice: dropped.append((offset, nbytes))):
        reader = opened_reader(tmp_path, 4, disk)
        try:
            reader.submit([(0, 4 * PAGE_BYTES)], "some").wait(meanwhile=patience(120))
            buffered = not reader.direct
        finally:
            reader.close()
    assert dropped == ([(at * PAGE_BYTES, PAGE_BYTES) for at in range(4)] if buffered else [])
    assert buffered or direct


def test_an_interrupt_at_any_moment_of_a_submission(tmp_path: Path) -> None:
    """Nobody waits for a read that no thread comes for, nor for a lock that nobody gives back."""
    reader = opened_reader(tmp_path, 8, threads=3)
    ranges = [(0, 3 * PAGE_BYTES), (4 * PAGE_BYTES, PAGE_BYTES)]
    try:
        for urgent in (False, True):
            at = 1
            while interrupted(at, lambda urgent=urgent: reader.submit(ranges, "some", urgent=urgent)):
                reader.drain()
                for _ in range(4):
                    time.sleep(0.001)  # until its threads sleep, mostly
                    reader.submit([(0, PAGE_BYTES)], "more").wait(meanwhile=patience(120))
                at += 1
            assert at > 20
    finally:
        reader.close()


def test_what_cannot_begin_leaves_nothing(streamed: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """No room for a second thread, and an interrupt where it begins."""
    begin, begun = threading.Thread.start, list[threading.Thread]()
    faults: dict[type[BaseException], str] = {
        RuntimeError: "no thread that reads could begin",
        KeyboardInterrupt: "begin",
    }
    before = set(os.listdir("/proc/self/fd"))
    for fault, message in faults.items():

        def start(thread: threading.Thread, fault: type[BaseException] = fault) -> None:
            if thread.name == "stratum-reader-1":
                raise fault("cannot begin")
            begun.append(thread)
            begin(thread)

        with monkeypatch.context() as patched:
            patched.setattr(threading.Thread, "start", start)
            with pytest.raises((RuntimeDiagnostic, KeyboardInterrupt), match=message):
                opened(streamed["llama"], least_plan(streamed["llama"]))
    for thread in begun:
        thread.join()
    assert len(begun) == 2 and set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("name", ["qwen3_moe"])
def test_an_interrupt_at_any_moment_of_a_step(streamed: dict[str, Path], expected: dict, name: str) -> None:
    """In the books of what is in memory, too."""
    steps = batches(3)
    moments = iter(range(5, 1 << 20, 157))
    with opened(streamed[name], least_plan(streamed[name], guesses=2)) as session:
        for step, wanted in zip(steps, expected[name, 3], strict=True):
            hits = 0
            while interrupted(next(moments) % 1201, lambda step=step: session.step(*step)) and hits < 4:
                hits += 1
            assert hits
            np.testing.assert_array_equal(session.step(*step), wanted)


def test_a_disk_slower_than_planned_is_told_of_once(streamed: dict[str, Path], expected: dict) -> None:
    """And fewer guesses are read; the tokens are the same."""
    path = streamed["qwen3_moe"]
    told: list[str] = []
    plan = least_plan(path, guesses=2, disk_bytes_per_s=10**12)
    with patch("runtime.disk_watch.LEAST_BYTES", 4096), patch("runtime.disk_watch.LEAST_S", 0):
        with opened(path, plan) as session:
            assert session.streamer is not None
            session.streamer.tell = told.append
            assert_same(logits(session, batches(1)), expected["qwen3_moe", 1])
            assert len(told) == 1 and "the plan counts on 1000.00" in told[0]
            assert session.streamer._books.most_guesses == 1
        with opened(path, plan) as session, pytest.warns(RuntimeWarning, match="the disk gives"):
            logits(session, batches(1))


def test_a_file_that_vanishes_is_still_open(streamed: dict[str, Path], expected: dict, tmp_path: Path) -> None:
    import shutil

    path = tmp_path / "gone.stratum"
    shutil.copytree(streamed["qwen3_moe"], path)
    with opened(path, least_plan(path)) as session:
        steps = batches(1)
        got = logits(session, steps[:1])
        shutil.rmtree(path)
        assert_same([*got, *logits(session, steps[1:])], expected["qwen3_moe", 1])


def test_nothing_is_left_behind(streamed: dict[str, Path]) -> None:
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    for _ in range(2):
        with opened(streamed["qwen3_moe"], least_plan(streamed["qwen3_moe"])) as session:
            session.step([1, 2], [0, 1], [0, 0], [1])
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before
