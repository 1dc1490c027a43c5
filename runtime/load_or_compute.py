"""Recompute or load: what of a stored prefix is computed again while the rest is read from disk.

Takes the chunks of a prefix and two prices; gives the position up to which to compute. Computing needs all positions
before, so the computed part is the front: positions [0, split) are computed while [split, n) are read. Both go on at
once, and what the computation itself reads (streamed weights) is on the disk's account: the time of a split is that of
the busier of the two. `choose_split` takes the best of all splits between chunks, so it is never slower, by its own
prices, than reading everything or computing everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StoredChunk:
    """Positions first..last, and the bytes to read for them."""

    first: int
    last: int
    nbytes: int


@dataclass(frozen=True)
class Prices:
    """What a second buys.

    compute_s: seconds a computed position takes, whatever stands before it; compute_s2: seconds for each pair of
    positions (attention), 0 where it is not known apart. disk_bytes_per_s: of the disk the chunks are on. read_s: of
    each chunk besides its bytes (a request, the checksum, the copy). step_tokens and step_bytes: computing reads so
    many bytes from the same disk for every step of so many tokens.
    """

    compute_s: float
    disk_bytes_per_s: float
    compute_s2: float = 0.0
    read_s: float = 0.0
    step_tokens: int = 512
    step_bytes: int = 0

    def computing(self, positions: int) -> float:
        """Seconds of the units to compute positions [0, positions)."""
        return positions * self.compute_s + positions * (positions + 1) / 2 * self.compute_s2

    def time(self, computed: int, loaded: Sequence[StoredChunk]) -> float:
        """Seconds to compute [0, computed) while these chunks are read."""
        steps = -(-computed // max(1, self.step_tokens))
        nbytes = sum(chunk.nbytes for chunk in loaded) + steps * self.step_bytes
        return max(self.computing(computed), nbytes / self.disk_bytes_per_s + len(loaded) * self.read_s)


@dataclass(frozen=True)
class Choice:
    """[0, split) is computed, the rest read. Seconds of that, of reading all and of computing all, by the prices."""

    split: int
    positions: int
    seconds: float
    load_s: float
    compute_s: float

    def __str__(self) -> str:
        parts = [f"{self.split} positions computed" if self.split else ""]
        parts += [f"{self.positions - self.split} read" if self.split < self.positions else ""]
        return " and ".join(part for part in parts if part) or "nothing to bring back"


def choose_split(chunks: Sequence[StoredChunk], prices: Prices) -> Choice:
    """The split with the least time; of equals the one that computes least. Chunks follow one another from 0."""
    end = chunks[-1].last if chunks else 0
    splits = [chunk.first for chunk in chunks] + [end]
    times = [prices.time(split, chunks[number:]) for number, split in enumerate(splits)]
    best = min(range(len(splits)), key=lambda number: (times[number], number))
    return Choice(splits[best], end, times[best], times[0], times[-1])
