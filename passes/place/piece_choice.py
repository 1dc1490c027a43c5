"""Which dense pieces of a built model stay, on a machine of one unit, one memory and one drive: exact, and at once.

    found = choose_pieces(sizes, room, live)        # Choice(kept, window, gap), or None where nothing fits

Takes the bytes of each piece in the order of the program, the bytes there are, and what of those that are streamed is
in use at once. There every byte that a step streams takes the same time of the same drive, beside the arithmetic,
whatever piece it belongs to: the lowest objective of `passes.place.outcome` is that of the fewest streamed bytes. A
byte of dense weights is read by every token and one of an expert by some, so that experts get what dense weights leave;
what does not fit is streamed, large pieces kept first, since the window holds the largest that are streamed and what is
read meanwhile. Those that stay are spread evenly, so that there is always something to compute while the next one
arrives.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

AHEAD_BYTES = 8 << 20  # read while a piece is used: some milliseconds of a fast disk
MEMORY_OVER_DISK = 20  # times that memory is read faster than the disk


@dataclass(frozen=True)
class PieceChoice:
    """Pieces that stay, ascending; bytes for those that are streamed (0 where none is); and how much more is streamed
    at most than by the best choice there is, as a share."""

    kept: tuple[int, ...]
    window: int
    gap: float = 0.0


def choose_pieces(
    sizes: Mapping[int, int], room: int, live: Callable[[frozenset[int]], int], ahead: int = AHEAD_BYTES
) -> PieceChoice | None:
    """The choice for pieces of `sizes` bytes by number, in `room` bytes; None where the window does not fit.

    `live` is what the streamed pieces take that are in use at once, where the given ones stay. Where the window has no
    room to read ahead, the drive waits while the unit computes, as if so much more were to be read.
    """
    total = sum(sizes.values())
    if total <= room:
        return PieceChoice(tuple(sorted(sizes)), 0)
    by_size = sorted(sizes, key=lambda n: -sizes[n])
    best: tuple[float, int, tuple[int, ...]] | None = None
    left = room
    for count, largest in enumerate(by_size):
        kept = by_size[:count]
        # Of pieces of one size all are kept, or a part that is spread like the rest.
        begins = not count or sizes[largest] < sizes[kept[-1]]
        used = live(frozenset(kept)) if begins else 0
        if begins and left >= used:
            read_ahead = min(left - used, ahead)
            more = _evenly(sizes, by_size[count:], left - used - read_ahead)
            resident = tuple(sorted((*kept, *more)))
            streamed = total - sum(sizes[n] for n in resident)
            found = streamed + (1 - read_ahead / ahead) * total / MEMORY_OVER_DISK, streamed, resident
            best = min(best or found, found)
        left -= sizes[largest]
        if left < 0:
            break
    if best is None:
        return None
    window = room - (total - best[1])
    least = max(total - room + min(sizes.values()), 1)  # of any choice: what is used at once is a piece at least
    return PieceChoice(best[2], window, max(0.0, best[1] / least - 1.0))


def _evenly(sizes: Mapping[int, int], pieces: list[int], room: int) -> list[int]:
    """Pieces of at most `room` bytes in all, taken evenly along the program."""
    total = sum(sizes[n] for n in pieces)
    taken: list[int] = []
    seen = used = 0
    for piece in sorted(pieces):
        seen += sizes[piece]
        if used + sizes[piece] <= min(room, room * seen / total + sizes[piece] / 2):
            taken.append(piece)
            used += sizes[piece]
    for piece in sorted(set(pieces) - set(taken), key=lambda n: (-sizes[n], n)):
        if used + sizes[piece] <= room:
            taken.append(piece)
            used += sizes[piece]
    return taken
