"""Sequences on disk: the same logits whatever was spilled when, and whatever the disk does meanwhile."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic, Session
from runtime.kv_chunks import BLOCKS, HEADER_BYTES, RecordName, record_bytes, record_fault, write_record
from runtime.kv_spill import KVSpill, SpillOptions
from runtime.load_or_compute import Prices
from tests.runtime.fake_artifact import BYTES_PER_POSITION, DEAD_WORKER_ID, MAX_CONTEXT, sequence_logits, write_artifact

Call = Callable[[int, Sequence[memoryview], int], int]


def opened(path: Path, slots: int = 3, **options: Any) -> tuple[Session, KVSpill]:
    session = Session(path, threads=1, num_slots=slots, kv_spill=SpillOptions(**options))
    assert session.kv_spill is not None
    return session, session.kv_spill


def extend(session: Session, slot: int, ids: list[int], count: int) -> None:
    """`count` more tokens of the sequence `ids` in `slot`, whose last logits must be right."""
    first = session.filled(slot)
    part = ids[first : first + count]
    logits = session.step(part, range(first, first + len(part)), [slot] * len(part), [len(part) - 1])
    np.testing.assert_array_equal(logits[0], sequence_logits(ids[: first + len(part)]))


def sequences(count: int) -> list[list[int]]:
    return [np.random.default_rng(slot).integers(0, DEAD_WORKER_ID, MAX_CONTEXT).tolist() for slot in range(count)]


class IllDisk:
    """System calls that now and then do less than they should, or fail: `faults` are taken one a call, None is none."""

    def __init__(self, faults: list[Any]) -> None:
        self.faults = faults

    def of(self, call: Call) -> Call:
        def called(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
            fault = self.faults.pop() if self.faults else None
            if isinstance(fault, int):
                raise OSError(fault, os.strerror(fault))
            if fault == "short" and len(buffers[0]) > 4096:
                return call(descriptor, [buffers[0][:4096]], at)
            return call(descriptor, buffers, at)

        return called


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_order_of_spills_and_faults_gives_the_same_logits(artifact_path: Path, data: st.DataObject) -> None:
    faults: list[Any] = [None, None, None, "short", errno.EIO, errno.EINTR]
    read, written = (IllDisk(data.draw(st.lists(st.sampled_from(faults), max_size=6))) for _ in range(2))
    least = 2 * 64 * BYTES_PER_POSITION
    limits = st.one_of(st.none(), st.integers(4 * least, 8 * least))
    session, spill = opened(
        artifact_path,
        limit_bytes=data.draw(limits),
        chunk=data.draw(st.sampled_from((0, 64, 128))),
        preadv=read.of(os.preadv),
        pwritev=written.of(os.pwritev),
    )
    texts = sequences(3)
    with session:
        for _ in range(data.draw(st.integers(1, 10))):
            slot = data.draw(st.integers(0, 2))
            what = data.draw(st.sampled_from(("extend", "extend", "spill", "release")))
            if what == "extend" and session.filled(slot) < MAX_CONTEXT:
                extend(session, slot, texts[slot], data.draw(st.integers(1, 90)))
            elif what == "spill":
                session.spill(slot)
                assert spill.is_away(slot) == (session.filled(slot) > 0)
            elif what == "release":
                session.release(slot)
                assert not spill.is_away(slot)


def test_a_limit_is_kept_by_the_sequences_that_waited_longest(artifact_path: Path) -> None:
    limit = 2 * 128 * BYTES_PER_POSITION
    session, spill = opened(artifact_path, slots=4, limit_bytes=limit, chunk=64)
    texts = sequences(4)
    with session:
        for slot in (0, 1, 2, 3, 0, 1):
            extend(session, slot, texts[slot], 50)
            extend(session, slot, texts[slot], 14)
        # 0 and 1 came back last (128 positions each); what does not fit beside them is away.
        assert [spill.is_away(slot) for slot in range(4)] == [False, False, True, True]
        report = spill.report()
        assert session.memory().kv_committed <= limit + 4 * 4096
        assert (
            report.spills >= 3
            and report.returns >= 1
            and report.bytes_read == report.returns * record_bytes(64 * BYTES_PER_POSITION)
        )
        assert "came back" in str(report)
        with pytest.raises(RuntimeDiagnostic, match="the 3 sequences of a step take"):
            session.step([1, 1, 1], [128, 128, 64], [0, 1, 2], [])
        extend(session, 2, texts[2], 10)  # nothing was lost


def test_a_sequence_that_begins_anew_is_not_read(artifact_path: Path) -> None:
    session, spill = opened(artifact_path)
    with session:
        extend(session, 1, sequences(2)[1], 100)
        assert session.spill(1) > 0 and session.spill(1) == 0
        assert session.spill(0) == 0  # nothing there
        session.step([5], [0], [1], [])
        assert not spill.is_away(1) and spill.report().bytes_read == 0
        np.testing.assert_array_equal(session.step([6], [1], [1], [0])[0], sequence_logits([5, 6]))


@pytest.mark.parametrize("fault", [errno.EIO, errno.ENXIO])
def test_what_cannot_be_read_is_computed_again(
    artifact_path: Path, fault: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.weight_reader._PAUSES_S", (0.0, 0.0, 0.0))
    disk = IllDisk([])
    session, spill = opened(artifact_path, preadv=disk.of(os.preadv), chunk=64)
    text = sequences(1)[0]
    with session:
        extend(session, 0, text, 150)
        session.spill(0)
        disk.faults = [fault] * 100
        extend(session, 0, text, 1)
        report = spill.report()
        assert report.recomputed == 150 and report.retries >= 3 and "after a fault" in str(report)
        assert "the spilled KV cache cannot be read" in report.faults[0]
        assert session.filled(0) == 151
        disk.faults = []
        session.spill(0)
        extend(session, 0, text, 20)
        assert spill.report().recomputed == 150


@pytest.mark.parametrize(("fault", "message"), [(errno.ENOSPC, "No space left"), (errno.EIO, "Input/output error")])
def test_what_cannot_be_written_stays_in_memory(
    artifact_path: Path, fault: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.kv_file._PAUSES_S", (0.0, 0.0, 0.0))
    disk = IllDisk([])
    session, spill = opened(artifact_path, pwritev=disk.of(os.pwritev), limit_bytes=128 * BYTES_PER_POSITION, chunk=64)
    texts = sequences(2)
    with session:
        extend(session, 0, texts[0], 120)
        disk.faults = [fault] * 10
        with pytest.raises(RuntimeDiagnostic, match=f"the spilled KV cache cannot be written: {message}") as told:
            extend(session, 1, texts[1], 5)
        assert told.value.hint
        assert not spill.is_away(0)
        disk.faults = []
        extend(session, 0, texts[0], 5)
        extend(session, 1, texts[1], 5)
        assert spill.is_away(0)


def test_short_writes_go_on_where_they_stopped(artifact_path: Path) -> None:
    """All of a sequence is read again: nothing of it is found damaged and computed anew."""
    disk = IllDisk(["short"] * 3)
    session, spill = opened(artifact_path, pwritev=disk.of(os.pwritev))
    text = sequences(1)[0]
    with session:
        extend(session, 0, text, MAX_CONTEXT - 20)
        assert session.spill(0) > 4096
        extend(session, 0, text, 10)
        assert not spill.report().faults and not spill.report().recomputed and len(disk.faults) < 3


def test_what_is_written_through_the_page_cache_does_not_stay_there(
    artifact_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where a file system refuses direct writes: it would count against the budget a second time."""
    written: list[int] = []
    dropped: list[tuple[int, int]] = []
    monkeypatch.setattr("os.fdatasync", written.append)
    monkeypatch.setattr("os.posix_fadvise", lambda file, at, size, advice: dropped.append((file, size)))
    disk = IllDisk([errno.EINVAL])
    session, _ = opened(artifact_path, pwritev=disk.of(os.pwritev))
    with session:
        extend(session, 0, sequences(1)[0], 100)
        nbytes = session.spill(0)
        assert sum(size for _, size in dropped) == nbytes > 0
        assert written == [file for file, _ in dropped]


def test_an_interrupt_while_writing_loses_nothing(artifact_path: Path) -> None:
    calls = []

    def interrupted(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        calls.append(at)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return os.pwritev(descriptor, buffers, at)

    session, spill = opened(artifact_path, pwritev=interrupted, chunk=64)
    text = sequences(1)[0]
    with session:
        extend(session, 0, text, 180)
        with pytest.raises(KeyboardInterrupt):
            session.spill(0)
        assert not spill.is_away(0)
        session.spill(0)
        extend(session, 0, text, 10)


@pytest.mark.parametrize("begun", [False, True])
def test_an_interrupt_while_reading_begins_loses_nothing(
    artifact_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    """A thread whose start was interrupted is there, or never comes, and cannot be joined either way."""
    begin = threading.Thread.start

    def interrupted(thread: threading.Thread) -> None:
        if begun:
            begin(thread)
            thread._started.clear()  # type: ignore[attr-defined]  # as where it was interrupted
        raise KeyboardInterrupt

    session, _ = opened(artifact_path)
    text = sequences(1)[0]
    with session:
        extend(session, 0, text, 100)
        session.spill(0)
        for _ in range(2):
            with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
                patch.setattr(threading.Thread, "start", interrupted)
                extend(session, 0, text, 10)
        extend(session, 0, text, 10)


def test_damage_on_disk_is_found(artifact_path: Path) -> None:
    """A byte that changed anywhere in what is read, header or payload, is never taken for keys and values."""
    flip = [-1]

    def lying(descriptor: int, buffers: Sequence[memoryview], at: int) -> int:
        got = os.preadv(descriptor, buffers, at)
        if flip[0] >= 0:
            buffers[0][flip[0]] ^= 1
        return got

    session, spill = opened(artifact_path, preadv=lying, chunk=64)
    text = sequences(1)[0]
    with session:
        extend(session, 0, text, 64)
        session.spill(0)
        for at in (0, 9, 24, 32, 41, 49, 57, 65, HEADER_BYTES, HEADER_BYTES + 64 * BYTES_PER_POSITION - 1):
            flip[0] = at
            extend(session, 0, text, 1)
            flip[0] = -1
            session.spill(0)
        faults = spill.report().faults
        assert len(faults) == 10 and all("a stored part of the KV cache" in fault for fault in faults)
        extend(session, 0, text, 1)
        assert len(spill.report().faults) == 10


def test_the_front_is_computed_while_the_rest_is_read(artifact_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session, spill = opened(artifact_path, chunk=64)
    text = sequences(1)[0]
    record = record_bytes(64 * BYTES_PER_POSITION)
    with session:
        extend(session, 0, text, 190)
        for split, prices in ((0, None), (192, Prices(0.0, 1.0)), (128, Prices(1 / 128, record * 1.01))):
            monkeypatch.setattr(spill._sequences, "prices", lambda rate, prices=prices: prices)
            session.spill(0)
            before = spill.report()
            extend(session, 0, text, 1)
            after = spill.report()
            assert after.recomputed - before.recomputed == min(split, session.filled(0) - 1)
            assert after.bytes_read - before.bytes_read == (192 - split) // 64 * record


@given(st.binary(max_size=3000), st.integers(0, 4000))
def test_no_bytes_make_a_record_check_fail_otherwise(content: bytes, payload: int) -> None:
    name = RecordName(b"k" * 16, 1, BLOCKS, 0, 64)
    assert record_fault(np.frombuffer(content, np.uint8), name, payload) != ""


def test_records_of_others_are_refused() -> None:
    source = np.arange(2 * 3 * 40, dtype=np.uint8).reshape(2, 3, 40)[:, :, ::2]
    name = RecordName(b"k" * 16, 7, BLOCKS, 64, 128)
    record = np.full(record_bytes(source.size), 255, np.uint8)
    write_record(record, name, source)
    assert record_fault(record, name, source.size) == ""
    others = [(b"x" * 16, 7, BLOCKS, 64, 128), (b"k" * 16, 6, BLOCKS, 64, 128), (b"k" * 16, 7, BLOCKS, 0, 128)]
    for other in others:
        assert record_fault(record, RecordName(*other), source.size)
    assert record_fault(record, name, source.size - 1)


def test_nothing_is_left_and_folders_are_checked(artifact_path: Path, tmp_path: Path) -> None:
    session, _ = opened(artifact_path, directory=str(tmp_path))
    with session:
        extend(session, 0, sequences(1)[0], 100)
        session.spill(0)
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeDiagnostic, match="cannot be spilled there"):
        opened(artifact_path, directory=str(tmp_path / "none"))
    with pytest.raises(RuntimeDiagnostic, match="chunks of 100 positions"):
        opened(artifact_path, chunk=100)
    with Session(artifact_path) as plain, pytest.raises(RuntimeDiagnostic, match="keeps all sequences in memory"):
        plain.spill(0)


def test_a_manifest_whose_blocks_are_uneven_is_refused(tmp_path: Path) -> None:
    def change(manifest: dict) -> None:
        manifest["kv"] |= {"num_kv_heads": 3, "bytes_per_position": 32, "format": "q8_sym<group=row, scale=f16>"}

    with pytest.raises(RuntimeDiagnostic, match="a position of the KV cache has 32 bytes"):
        Session(write_artifact(tmp_path / "a", change=change))
