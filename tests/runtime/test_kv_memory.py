"""Low-bit KV caches in a session: the memory they take, and sequences that go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from runtime import Session
from runtime.errors import RuntimeDiagnostic
from runtime.kv_spill import SpillOptions
from tests.runtime.conftest import KV_LAYERS
from tests.stratum.tiny_model import VOCAB

pytestmark = pytest.mark.slow
LENGTH = 2000
# Bytes of one position (one layer, 4 heads of 128): keys and values with their scales.
POSITION = {"bf16": 2 * 4 * 128 * 2, "kv8": 2 * 4 * (128 + 2), "kv4": 2 * 4 * (64 + 2), "kv2": 4 * (64 + 16 + 4)}
RING = {"bf16": 0, "kv8": 0, "kv4": 512 + 16 + 16, "kv2": 512 + 128 + 32}


@pytest.fixture(scope="module", params=list(POSITION))
def built(request: pytest.FixtureRequest, kv_build: Callable[[str], Path]) -> tuple[str, Path]:
    return request.param, kv_build(request.param)


@pytest.fixture
def session(built: tuple[str, Path]) -> Iterator[Session]:
    with Session(built[1], threads=1) as session:
        yield session


def resident_bytes() -> int:
    """Private memory of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


def fill(session: Session, length: int) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, length)
    for first in range(0, length, 512):
        part = ids[first : first + 512]
        session.step(part, range(first, first + len(part)), [0] * len(part), [])


def test_a_full_cache_takes_its_packed_bytes_and_nothing_else_does(built: tuple[str, Path], session: Session) -> None:
    name = built[0]
    kv = session.manifest.kv
    assert kv.bytes_per_position == POSITION[name] * KV_LAYERS
    assert kv.bytes_per_slot == RING[name] * POSITION["bf16"] * KV_LAYERS
    fill(session, 704)  # the arena, the stack and the ring are touched now
    before, committed = resident_bytes(), session.memory().kv_committed
    fill(session, LENGTH)
    grown = session.memory().kv_committed - committed
    expected = kv.bytes_per_position * (LENGTH - 704)
    assert abs(grown - expected) <= 4 * 4 * 4096 * KV_LAYERS  # pages, at both ends of four heads
    assert resident_bytes() - before <= grown + (1 << 20)


def test_a_sequence_goes_back_as_far_as_its_ring_reaches(built: tuple[str, Path], session: Session) -> None:
    name = built[0]
    fill(session, 1200)
    session.step([1], [800], [0], [0])  # 399 positions back
    if not RING[name]:
        session.step([1], [5], [0], [0])
        return
    with pytest.raises(RuntimeDiagnostic, match="slot 0 goes back to position 5 from position 1199"):
        session.step([1], [5], [0], [0])
    session.release(0)
    session.step([1], [0], [0], [0])


def test_going_back_and_on_again_gives_the_same_bits(session: Session) -> None:
    fill(session, 700)
    straight = session.step([7], [700], [0], [0])
    ids = np.random.default_rng(0).integers(0, VOCAB, 700)
    session.step(ids[400:], range(400, 700), [0] * 300, [])
    np.testing.assert_array_equal(session.step([7], [700], [0], [0]), straight)


def test_a_sequence_that_was_on_disk_goes_on_with_the_same_bits(built: tuple[str, Path]) -> None:
    """Codes, scales and ring come back as they were, and going back still works."""
    ids = np.random.default_rng(0).integers(0, VOCAB, 600)

    def steps(spilled: bool) -> list[np.ndarray]:
        made = []
        with Session(built[1], threads=1, num_slots=2, kv_spill=SpillOptions(chunk=128)) as session:
            for first, last in ((0, 300), (300, 301), (301, 590), (590, 600), (400, 402)):
                part = ids[first:last]
                made.append(session.step(part, range(first, last), [1] * len(part), [len(part) - 1]))
                if spilled:
                    before = session.memory().kv_committed
                    assert session.spill(1) > 0
                    assert session.memory().kv_committed < before / 8
        return made

    for got, wanted in zip(steps(True), steps(False), strict=True):
        np.testing.assert_array_equal(got, wanted)
