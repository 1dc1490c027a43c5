"""The choice of pieces beside all choices there are, and beside the general program."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from passes.place.piece_choice import choose_pieces

SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=9)


def largest(sizes: dict[int, int], kept: frozenset[int]) -> int:
    """What is in use at once, one piece at a time."""
    return max((size for n, size in sizes.items() if n not in kept), default=0)


@given(sizes=SIZES, room=st.integers(0, 300), ahead=st.integers(1, 12))
def test_no_choice_streams_less_by_more_than_a_piece(sizes: list[int], room: int, ahead: int) -> None:
    """Of all sets that leave room for the window: what is streamed is within the gap that the choice states."""
    pieces = dict(enumerate(sizes))
    found = choose_pieces(pieces, room, lambda kept: largest(pieces, kept), ahead)
    least: int | None = None
    for count in range(len(sizes) + 1):
        for kept in itertools.combinations(pieces, count):
            window = largest(pieces, frozenset(kept))
            if sum(pieces[n] for n in kept) + window <= room:
                streamed = sum(sizes) - sum(pieces[n] for n in kept)
                least = streamed if least is None else min(least, streamed)
    if found is None:
        assert least is None or least > 0
        return
    assert least is not None
    streamed = sum(sizes) - sum(pieces[n] for n in found.kept)
    used = largest(pieces, frozenset(found.kept))
    assert used <= found.window <= room and sum(pieces[n] for n in found.kept) + found.window <= max(room, sum(sizes))
    assert (streamed == 0) == (found.window == 0)
    assert streamed <= (1 + found.gap) * max(least, 1) + 1e-9
    assert streamed <= least + ahead + max(sizes) + sum(sizes) / 20  # room to read ahead is worth some bytes


@given(sizes=SIZES, room=st.integers(0, 300))
def test_a_choice_is_there_whenever_the_largest_piece_fits(sizes: list[int], room: int) -> None:
    pieces = dict(enumerate(sizes))
    found = choose_pieces(pieces, room, lambda kept: largest(pieces, kept), 4)
    assert (found is not None) or room < max(sizes)
