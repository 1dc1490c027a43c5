"""Ragged batches: rows of several sequences in one step, as a server would mix them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st


@dataclass(frozen=True)
class Batch:
    """int32 arrays of a step. `starts[slot]` positions of a slot hold earlier tokens; `ctx` is the capacity."""

    ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    rows: np.ndarray
    starts: tuple[int, ...]
    ctx: int

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def num_slots(self) -> int:
        return len(self.starts)

    def inputs(self) -> list[np.ndarray]:
        """The arguments of a step function."""
        return [self.ids, self.positions, self.slots, self.rows]


@st.composite
def batches(
    draw: st.DrawFn, *, vocab: int, max_tokens: int = 6, max_slots: int = 3, ctx: int = 12, fresh: bool = False
) -> Batch:
    """A batch of 1..max_tokens rows. Chunks and single tokens mix; slots may be idle; rows of slots may interleave.

    `fresh` makes every sequence begin with this step, for runs that cannot be given a filled cache.
    """
    num_slots = draw(st.integers(1, max_slots))
    tokens = draw(st.integers(1, max_tokens))
    slots = [draw(st.integers(0, num_slots - 1)) for _ in range(tokens)]
    if draw(st.booleans()):
        slots.sort()
    starts = [0 if fresh else draw(st.integers(0, ctx - tokens)) for _ in range(num_slots)]
    reached = list(starts)
    positions = []
    for slot in slots:
        positions.append(reached[slot])
        reached[slot] += 1
    ids = [draw(st.integers(0, vocab - 1)) for _ in range(tokens)]
    wanted = draw(st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens, unique=True))
    arrays = [np.array(values, np.int32) for values in (ids, positions, slots, sorted(wanted))]
    return Batch(arrays[0], arrays[1], arrays[2], arrays[3], tuple(starts), ctx)
