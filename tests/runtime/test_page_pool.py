"""Pages move from weights that are done with to those that are read next: bounded, and never under what is in use."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runtime.memory import PAGE_BYTES, Reservation
from runtime.page_pool import LEAST_BYTES, PagePool

REQUEST = 2 * LEAST_BYTES
PIECES = 6
PLACE = 3 * REQUEST  # of a piece
SIZES = st.one_of(st.integers(1, PLACE // PAGE_BYTES), st.sampled_from([n * REQUEST // PAGE_BYTES for n in (1, 2, 3)]))


def fill(memory: Reservation, pool: PagePool, offset: int, nbytes: int, value: int) -> None:
    """What the reader does: request by request."""
    for at in range(offset, offset + nbytes, REQUEST):
        size = min(REQUEST, offset + nbytes - at)
        pool.put_under(at, size)
        memory.view()[at : at + size] = value


@settings(max_examples=30, deadline=None)
@given(
    sizes=st.lists(SIZES, min_size=PIECES, max_size=PIECES),
    order=st.lists(st.integers(0, PIECES - 1), min_size=12, max_size=40),  # in fewer little is given and read anew
    works=st.booleans(),
)
def test_contents_and_memory(sizes: list[int], order: list[int], works: bool) -> None:
    """A window of a few pieces over many: all in the window hold what was read, and the pool adds nothing to the most
    that was ever in it."""
    memory = Reservation(PIECES * PLACE, what="a test")
    pool = PagePool(memory, REQUEST)
    held: dict[int, int] = {}
    most = 0
    with patch.object(Reservation, "move", Reservation.move if works else lambda *_: False):
        for step, piece in enumerate(order):
            if piece in held:
                pool.give(piece * PLACE, sizes[piece] * PAGE_BYTES)
                del held[piece]
                continue
            held[piece] = step % 250 + 1
            pool.take_back(piece * PLACE, sizes[piece] * PAGE_BYTES)
            fill(memory, pool, piece * PLACE, sizes[piece] * PAGE_BYTES, held[piece])
            most = max(most, sum(sizes[n] for n in held) * PAGE_BYTES)
            assert memory.committed_bytes() <= most
            for other, value in held.items():
                part = memory.view()[other * PLACE :][: sizes[other] * PAGE_BYTES]
                assert int(part.min()) == int(part.max()) == value
    pool.clear()
    assert pool.spent_bytes == 0
    assert memory.committed_bytes() == sum(sizes[n] for n in held) * PAGE_BYTES
    memory.close()


def test_pages_move_and_are_not_taken_anew() -> None:
    memory = Reservation(8 * REQUEST, what="a test")
    memory.view()[:REQUEST] = 7
    if not memory.move(0, 4 * REQUEST, REQUEST):
        pytest.skip("this system moves no pages")
    assert int(memory.view()[4 * REQUEST :][:REQUEST].min()) == 7
    assert memory.committed_bytes() == REQUEST
    assert not np.any(memory.view()[:REQUEST])
    memory.close()


def test_the_same_cycle_for_ever_keeps_few_mappings() -> None:
    """Mappings of a process are limited; sizes that do not fit each other must not cut them ever smaller."""
    memory = Reservation(PIECES * PLACE, what="a test")
    pool = PagePool(memory, REQUEST)
    sizes = [(17 * n * n) % (PLACE // PAGE_BYTES) * PAGE_BYTES + PAGE_BYTES for n in range(1, PIECES + 1)]

    def mappings() -> int:
        low, high = memory.address, memory.address + memory.nbytes
        with open("/proc/self/maps") as file:
            return sum(low <= int(line.split("-")[0], 16) < high for line in file)

    for turn in range(40):
        for piece in range(PIECES):
            fill(memory, pool, piece * PLACE, sizes[piece], 1)
            if piece or turn:
                before = (piece - 1) % PIECES
                pool.give(before * PLACE, sizes[before])
    assert mappings() <= memory.nbytes // LEAST_BYTES
    memory.close()
