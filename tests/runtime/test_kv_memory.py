"""Low-bit KV caches in a session: the memory they take, and sequences that go back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runtime import Session
from runtime.errors import RuntimeDiagnostic
from runtime.kv_spill import SpillOptions
from runtime.load_or_compute import Prices
from runtime.prompt_cache import PromptCache
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


@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32))
def test_any_order_of_spills_gives_the_same_bits(built: tuple[str, Path], seed: int) -> None:
    """Codes, scales and ring come back as they were, read or computed again, and going back still works."""
    random = np.random.default_rng(seed)
    options = SpillOptions(chunk=int(random.choice([64, 128, 192])))
    with (
        Session(built[1], threads=1, num_slots=2) as plain,
        Session(built[1], threads=1, num_slots=2, kv_spill=options) as session,
    ):
        assert session.kv_spill is not None
        slot = 0
        for number in range(8):
            prices = (None, Prices(1e-3, 1e6), Prices(0.0, 1.0))[random.integers(3)]
            session.kv_spill._sequences.prices = lambda rate, prices=prices: prices
            slot = int(random.integers(2)) if number < 7 else slot
            back = int(random.integers(0, 150)) if random.integers(3) == 0 else 0
            first = max(0, session.filled(slot) - back)
            count = int(random.integers(1, 400)) if number < 5 else 1
            part = random.integers(0, VOCAB, count), range(first, first + count), [slot] * count, [count - 1]
            np.testing.assert_array_equal(session.step(*part), plain.step(*part))
            if random.integers(3) or number == 6:
                before = session.memory().kv_committed
                assert session.spill(slot) > 0 and session.memory().kv_committed < before
        assert session.kv_spill.report().returns and not session.kv_spill.report().faults


def test_a_prompt_in_a_file_is_used_as_far_back_as_its_ring_reaches(built: tuple[str, Path], tmp_path: Path) -> None:
    ids = np.random.default_rng(0).integers(0, VOCAB, 900).tolist()
    with Session(built[1], threads=1) as session:
        session.step(ids, range(900), [0] * 900, [])
        assert PromptCache(tmp_path / "prompt", session).save(0, ids)
    for common in (899, 500, 100):
        prompt = [*ids[:common], 1, 2]
        with Session(built[1], threads=1) as session:
            reused = PromptCache(tmp_path / "prompt", session).reuse(0, prompt)
            assert reused.positions == (common if common > 450 or not RING[built[0]] else 0) and not reused.fault
            rest = prompt[reused.positions :]
            positions = range(reused.positions, len(prompt))
            got = session.step(rest, positions, [0] * len(rest), [len(rest) - 1])
            session.release(0)
            whole = session.step(prompt, range(len(prompt)), [0] * len(prompt), [len(prompt) - 1])
            np.testing.assert_array_equal(got, whole)
