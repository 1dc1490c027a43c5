"""The decision to read or to compute a stored prefix: never worse than either alone, and the best of all splits."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime.load_or_compute import Choice, Prices, StoredChunk, choose_split

RATES = st.floats(1e-6, 1e-1)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[StoredChunk], Prices]:
    chunks, first = [], 0
    for _ in range(draw(st.integers(0, 12))):
        last = first + draw(st.integers(1, 200))
        chunks.append(StoredChunk(first, last, draw(st.integers(0, 10**8))))
        first = last
    prices = Prices(
        draw(RATES),
        draw(st.floats(1e5, 1e10)),
        draw(st.sampled_from((0.0, 1e-7, 1e-5))),
        draw(st.sampled_from((0.0, 1e-3))),
        draw(st.sampled_from((1, 64, 512))),
        draw(st.sampled_from((0, 10**6, 10**9))),
    )
    return chunks, prices


@given(cases())
def test_no_split_is_better(case: tuple[list[StoredChunk], Prices]) -> None:
    chunks, prices = case
    choice = choose_split(chunks, prices)
    end = chunks[-1].last if chunks else 0
    assert choice.seconds <= min(choice.load_s, choice.compute_s)
    assert choice.compute_s == prices.time(end, []) and choice.load_s == prices.time(0, chunks)
    for number, chunk in enumerate(chunks):
        assert choice.seconds <= prices.time(chunk.first, chunks[number:])
    assert choice.split in {0, end, *(chunk.first for chunk in chunks)}


@given(cases(), st.floats(1.0, 100.0))
def test_a_faster_disk_never_computes_more_nor_takes_longer(
    case: tuple[list[StoredChunk], Prices], factor: float
) -> None:
    chunks, prices = case
    faster = Prices(prices.compute_s, prices.disk_bytes_per_s * factor, prices.compute_s2, prices.read_s)
    slower = Prices(prices.compute_s, prices.disk_bytes_per_s, prices.compute_s2, prices.read_s)
    quick, slow = choose_split(chunks, faster), choose_split(chunks, slower)
    assert quick.split <= slow.split and quick.seconds <= slow.seconds


def test_both_at_once_is_sooner_than_either() -> None:
    """Ten chunks of 0.1 s on the disk, 0.1 s to compute each: five are computed while five are read."""
    chunks = [StoredChunk(at, at + 100, 10**8) for at in range(0, 1000, 100)]
    choice = choose_split(chunks, Prices(1e-3, 1e9))
    assert (choice.split, choice.positions) == (500, 1000) and choice.seconds == pytest.approx(0.5)
    assert choice.load_s == pytest.approx(1.0) and choice.compute_s == pytest.approx(1.0)
    assert str(choice) == "500 positions computed and 500 read"


def test_weights_from_the_same_disk_are_on_its_account() -> None:
    chunks = [StoredChunk(at, at + 100, 10**8) for at in range(0, 1000, 100)]
    alone, shared = Prices(1e-4, 1e9), Prices(1e-4, 1e9, step_tokens=512, step_bytes=4 * 10**9)
    assert choose_split(chunks, alone).split == 900
    assert choose_split(chunks, shared).split == 0  # a step would read four gigabytes


def test_nothing_stored() -> None:
    assert choose_split([], Prices(1.0, 1.0)) == Choice(0, 0, 0.0, 0.0, 0.0)
    assert str(Choice(0, 0, 0.0, 0.0, 0.0)) == "nothing to bring back"
