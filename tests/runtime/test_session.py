"""Sessions against the fake artifact: ragged batches, splitting, every bound, threads, closing, forking, waits."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic, Session
from runtime.session import MemoryReport
from tests.runtime.fake_artifact import (
    BYTES_PER_POSITION,
    DEAD_WORKER_ID,
    DECODE_TOKENS,
    MAX_CONTEXT,
    PREFILL_TOKENS,
    VOCAB,
    WEIGHT_BYTES,
    default_files,
    fake_object,
    sequence_logits,
    write_artifact,
)

ROOT = Path(__file__).parents[2]


def run_sequence(session: Session, ids: list[int], slot: int = 0) -> np.ndarray:
    return session.step(ids, range(len(ids)), [slot] * len(ids), range(len(ids)))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_logits_at_every_position(artifact_path: Path, threads: int) -> None:
    ids = [(7 * i) % VOCAB for i in range(40)]
    with Session(artifact_path, threads=threads) as session:
        logits = run_sequence(session, ids)
        assert session.filled(0) == 40
    assert logits.dtype == np.float32 and logits.shape == (40, VOCAB)
    np.testing.assert_array_equal(logits, [sequence_logits(ids[: i + 1]) for i in range(40)])


@given(st.data())
def test_any_division_into_steps_gives_the_same_logits(artifact_path: Path, data: st.DataObject) -> None:
    """Several sequences, cut into ragged steps of any size and order, equal each sequence alone."""
    count = data.draw(st.integers(1, 3))
    token_ids = st.integers(0, DEAD_WORKER_ID - 1)
    sequences = [data.draw(st.lists(token_ids, min_size=1, max_size=25)) for _ in range(count)]
    with Session(artifact_path, threads=2, num_slots=3) as session:
        written = [0] * count
        while pending := [s for s in range(count) if written[s] < len(sequences[s])]:
            ids, positions, slots = [], [], []
            for sequence in data.draw(st.lists(st.sampled_from(pending), min_size=1, unique=True)):
                piece = data.draw(st.integers(1, len(sequences[sequence]) - written[sequence]))
                first = written[sequence]
                ids += sequences[sequence][first : first + piece]
                positions += range(first, first + piece)
                slots += [sequence] * piece
                written[sequence] += piece
            rows = data.draw(st.lists(st.integers(0, len(ids) - 1), unique=True))
            logits = session.step(ids, positions, slots, rows)
            assert logits.shape == (len(rows), VOCAB)
            for row, got in zip(rows, logits, strict=True):
                np.testing.assert_array_equal(got, sequence_logits(sequences[slots[row]][: positions[row] + 1]))


def test_program_choice_and_splitting(artifact_path: Path) -> None:
    with Session(artifact_path, threads=1) as session, session.profile() as profile:
        run_sequence(session, list(range(DECODE_TOKENS)))
        run_sequence(session, list(range(DECODE_TOKENS + 1)))
        run_sequence(session, list(range(2 * PREFILL_TOKENS + 1)))
    assert [(s.program.name, s.tokens) for s in profile.steps] == [
        ("decode", DECODE_TOKENS),
        ("prefill", DECODE_TOKENS + 1),
        ("prefill", PREFILL_TOKENS),
        ("prefill", PREFILL_TOKENS),
        ("decode", 1),
    ]


def test_going_back_overwrites(artifact_path: Path) -> None:
    with Session(artifact_path, threads=2) as session:
        run_sequence(session, [1, 2, 3, 4, 5])
        logits = session.step([9], [2], [0], [0])
        assert session.filled(0) == 3
        np.testing.assert_array_equal(logits[0], sequence_logits([1, 2, 9]))
        with pytest.raises(RuntimeDiagnostic, match="starts at position 4"):
            session.step([9], [4], [0], [0])


def test_empty_step_and_no_rows(artifact_path: Path) -> None:
    with Session(artifact_path, threads=1) as session:
        assert session.step([], [], [], []).shape == (0, VOCAB)
        assert session.step([1, 2], [0, 1], [0, 0], []).shape == (0, VOCAB)
        np.testing.assert_array_equal(session.step([3], [2], [0], [0])[0], sequence_logits([1, 2, 3]))


@pytest.mark.parametrize(
    ("ids", "positions", "slots", "rows", "message"),
    [
        ([VOCAB], [0], [0], [0], rf"ids\[0\] is {VOCAB}(.|\n)*0\.\.{VOCAB - 1}"),
        ([1, -1], [0, 1], [0, 0], [0], r"ids\[1\] is -1"),
        ([2**40], [0], [0], [0], r"ids\[0\] is 1099511627776"),
        ([2**70], [0], [0], [0], "'ids'"),
        ([1.5], [0], [0], [0], "'ids' has 1 dimensions of float64"),
        ([[1]], [0], [0], [0], "'ids' has 2 dimensions"),
        ([True], [0], [0], [0], "'ids' has 1 dimensions of bool"),
        ([1, [2]], [0], [0], [0], "'ids' is not a list of integers"),
        ([1], [100], [0], [0], r"positions\[0\] is 100(.|\n)*0\.\.99"),
        ([1], [-1], [0], [0], r"positions\[0\] is -1"),
        ([1], [0], [2], [0], r"slots\[0\] is 2(.|\n)*0\.\.1"),
        ([1], [0], [0], [1], r"rows\[0\] is 1"),
        ([1, 2], [0, 1], [0, 0], [1, 1], "names a row of logits twice"),
        ([1, 2], [0], [0, 0], [0], "2 ids, 1 positions and 2 slots"),
        ([1], [1], [0], [0], r"starts at position 1(.|\n)*position 0 or an earlier one"),
        ([1, 2], [0, 2], [0, 0], [0], r"continues with position 2(.|\n)*position 1"),
        ([1, 2], [0, 0], [0, 0], [0], "continues with position 0"),
        ([1, 2, 3], [0, 0, 3], [0, 1, 1], [0], "slot 1 continues with position 3"),
    ],
)
def test_bounds(artifact_path: Path, ids: list, positions: list, slots: list, rows: list, message: str) -> None:
    with Session(artifact_path, threads=1, max_context=100, num_slots=2) as session:
        with pytest.raises(RuntimeDiagnostic, match=message):
            session.step(ids, positions, slots, rows)
        # the refusal left the session as it was
        np.testing.assert_array_equal(session.step([5], [0], [1], [0])[0], sequence_logits([5]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threads": 0}, "cannot run on 0 threads"),
        ({"threads": 100000}, "cannot run on 100000 threads"),
        ({"max_context": 0}, "a context of 0 positions"),
        ({"max_context": MAX_CONTEXT + 1}, f"expected: 1 to {MAX_CONTEXT}"),
        ({"num_slots": 0}, "cannot make 0 sequence slots"),
    ],
)
def test_options_are_checked(artifact_path: Path, options: dict, message: str) -> None:
    before = threading.active_count()
    with pytest.raises(RuntimeDiagnostic, match=message):
        Session(artifact_path, **options)
    assert threading.active_count() == before


def test_default_threads_follow_the_affinity(artifact_path: Path) -> None:
    with Session(artifact_path) as session:
        assert 1 <= session.threads <= len(os.sched_getaffinity(0))


def test_memory_report_and_release(artifact_path: Path) -> None:
    with Session(artifact_path, threads=1, num_slots=4) as session:
        capacity = -(-MAX_CONTEXT // 64) * 64
        report = session.memory()
        assert report == MemoryReport(WEIGHT_BYTES, capacity * 4 * BYTES_PER_POSITION, 0, 4096)
        for slot in range(4):
            run_sequence(session, list(range(30)), slot)
        committed = session.memory().kv_committed
        assert 0 < committed <= report.kv_reserved
        assert session.release(2) >= 0  # 4 KiB a layer, not page-aligned: nothing or little comes back
        assert session.filled(2) == 0
        np.testing.assert_array_equal(session.step([1], [0], [2], [0])[0], sequence_logits([1]))
        logits = session.step([7], [30], [3], [0])  # the neighbours kept their content
        np.testing.assert_array_equal(logits[0], sequence_logits([*range(30), 7]))
        assert "KV cache" in str(report) and "weights 0.0 MiB" in str(report)
        with pytest.raises(RuntimeDiagnostic, match="slot 4 does not exist"):
            session.release(4)


def workers() -> int:
    return sum(thread.name.startswith("stratum-worker") for thread in threading.enumerate())


def test_close_ends_the_threads(artifact_path: Path) -> None:
    before = workers()
    session = Session(artifact_path, threads=3)
    run_sequence(session, [1])
    assert workers() == before + 2
    session.close()
    session.close()
    assert workers() == before
    with pytest.raises(RuntimeDiagnostic, match="the session is closed"):
        session.step([1], [0], [0], [0])
    with pytest.raises(RuntimeDiagnostic, match="the session is closed"):
        session.memory()
    with pytest.raises(RuntimeDiagnostic, match="the session is closed"):
        session.release(0)


def test_dropping_the_session_ends_the_threads(artifact_path: Path) -> None:
    before = workers()
    session = Session(artifact_path, threads=2)
    run_sequence(session, [1])
    gone = weakref.ref(session)
    del session
    gc.collect()
    assert gone() is None
    assert workers() == before


def test_an_exception_in_the_block_ends_the_threads(artifact_path: Path) -> None:
    before = workers()
    with pytest.raises(KeyError), Session(artifact_path, threads=2):
        raise KeyError("user code")
    assert workers() == before


def test_steps_from_several_threads_take_turns(artifact_path: Path) -> None:
    wrong: list[int] = []
    with Session(artifact_path, threads=2, num_slots=4) as session:

        def serve(slot: int) -> None:
            ids = [slot]
            for position in range(60):
                logits = session.step([ids[-1]], [position], [slot], [0])[0]
                if not np.array_equal(logits, sequence_logits(ids)):
                    wrong.append(slot)
                ids.append((ids[-1] + slot + 1) % 40)

        callers = [threading.Thread(target=serve, args=(slot,)) for slot in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    assert wrong == []


def run_script(script: str, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script, *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


def test_exit_without_close(artifact_path: Path) -> None:
    """A script that forgets to close ends promptly, also by an exception, with nothing on standard error."""
    done = run_script(
        "import sys; from runtime import Session; s = Session(sys.argv[1], threads=2);"
        "s.step([1], [0], [0], [0]); print('fine')",
        artifact_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "fine\n", "")


def test_a_forked_child_is_told(artifact_path: Path) -> None:
    """Forking is not supported by the threads; the child says so instead of hanging, and both exit cleanly."""
    script = """
import os, sys
from runtime import RuntimeDiagnostic, Session
session = Session(sys.argv[1], threads=2)
session.step([1], [0], [0], [0])
child = os.fork()
if child == 0:
    try:
        session.step([1], [1], [0], [0])
    except RuntimeDiagnostic as fault:
        print("child:", fault.message, flush=True)
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
session.step([1], [1], [0], [0])
print("parent: fine")
"""
    done = run_script(script, artifact_path)
    assert done.returncode == 0, done.stderr
    assert "child: the session was opened before this process was forked" in done.stdout
    assert done.stdout.endswith("parent: fine\n")


@pytest.mark.slow
def test_a_worker_that_never_arrives(tmp_path: Path) -> None:
    """The barrier's wait is bounded: the step fails with a diagnostic, the session refuses to go on, closing works."""
    path = write_artifact(tmp_path / "a", files={**default_files(), "code/step.host.o": fake_object(wait_limit_s=1)})
    with Session(path, threads=2) as session:
        run_sequence(session, [1, 2, 3])
        with pytest.raises(RuntimeDiagnostic, match="a worker thread failed to arrive in time"):
            run_sequence(session, [DEAD_WORKER_ID])
        with pytest.raises(RuntimeDiagnostic, match="stopped after a failed step"):
            run_sequence(session, [1])


@pytest.mark.slow
def test_a_stuck_worker_does_not_keep_the_process(tmp_path: Path) -> None:
    """Closing gives up on a thread that hangs in native code and keeps its memory: when it wakes up it finds it.

    The process exits also while such a thread hangs.
    """
    path = write_artifact(tmp_path / "a", files={**default_files(), "code/step.host.o": fake_object(wait_limit_s=1)})
    script = """
import sys, threading
import runtime.team
from runtime import RuntimeDiagnostic, Session
from tests.runtime.fake_artifact import STUCK_WORKER_ID
runtime.team._JOIN_SECONDS = 0.2
session = Session(sys.argv[1], threads=2)
try:
    session.step([STUCK_WORKER_ID], [0], [0], [0])
except RuntimeDiagnostic as fault:
    print(fault.message)
session.close()
if sys.argv[2] == "stays":
    for thread in threading.enumerate():
        if thread is not threading.current_thread():
            thread.join()
"""
    with ThreadPoolExecutor(2) as both:
        ends = list(both.map(lambda how: run_script(script, path, how), ("leaves", "stays")))
    for done in ends:
        assert done.returncode == 0, done.stderr
        assert "a worker thread failed to arrive in time" in done.stdout
