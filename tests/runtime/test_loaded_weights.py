"""Weights copied into memory: the bytes of the file, whatever a read gives; what goes wrong is said."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import RuntimeDiagnostic, Session
from runtime import loaded_weights as module
from runtime.loaded_weights import HUGE_PAGE_BYTES, LoadedWeights

PIECE = 4096  # a read of these tests


@pytest.fixture(autouse=True)
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_AT_ONCE", PIECE)


def load(content: bytes, **how: object) -> LoadedWeights:
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        options = {"where": "weights.bin", "threads": 2} | how
        return LoadedWeights(file.fileno(), len(content), **options)  # pyright: ignore[reportArgumentType]


@given(st.data(), st.integers(1, 5 * PIECE), st.integers(1, 3))
def test_every_byte_is_the_files_but_for_what_is_left_out(data: st.DataObject, nbytes: int, threads: int) -> None:
    content = np.random.default_rng(nbytes).integers(1, 256, nbytes, dtype=np.uint8)
    cuts = sorted(data.draw(st.sets(st.integers(0, nbytes), max_size=4)))
    but = [(a, b - a) for a, b in zip(cuts[::2], cuts[1::2], strict=False)]
    short = data.draw(st.integers(1, PIECE))  # bytes that a read gives at most

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.preadv(descriptor, [buffers[0][:short]], offset)

    wanted = content.copy()
    for offset, size in but:
        wanted[offset : offset + size] = 0
    weights = load(content.tobytes(), threads=threads, but=but, preadv=preadv)
    assert weights.address % HUGE_PAGE_BYTES == 0
    assert np.array_equal(weights.view(), wanted)
    weights.close()


def test_reads_do_not_overlap_and_are_shared() -> None:
    seen, names = [], set()
    together = threading.Barrier(2)

    def preadv(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        if not seen or offset == PIECE:
            together.wait(30)  # one thread alone would never pass
        names.add(threading.get_ident())
        seen.append((offset, len(buffers[0])))
        return os.preadv(descriptor, buffers, offset)

    load(bytes(4 * PIECE), preadv=preadv).close()
    assert sorted(seen) == [(i * PIECE, PIECE) for i in range(4)] and len(names) == 2


def test_a_failing_read_and_a_short_file() -> None:
    def broken(descriptor: int, buffers: Sequence[memoryview], offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with pytest.raises(RuntimeDiagnostic, match=r"cannot read the weights: .*Input/output error"):
        load(bytes(PIECE), preadv=broken)
    with pytest.raises(RuntimeDiagnostic, match="the weights end at byte 100"):
        load(bytes(PIECE), preadv=lambda descriptor, buffers, offset: max(0, min(100 - offset, len(buffers[0]))))


def test_more_than_is_free_is_refused_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "available_bytes", lambda: PIECE - 1)
    with pytest.raises(RuntimeDiagnostic, match="4096 bytes of weights do not fit into 4095 bytes") as fault:
        load(bytes(PIECE), preadv=lambda *_: pytest.fail("read"))
    assert "--memory" in str(fault.value)


def test_a_session_of_copied_weights_computes_the_same(artifact_path: Path) -> None:
    ids = [3, 1, 4, 1, 5]
    found = []
    for mmap in (True, False):
        with Session(artifact_path, threads=2, mmap=mmap) as session:
            found.append(session.step(ids, range(5), [0] * 5, range(5)))
    assert np.array_equal(*found)
