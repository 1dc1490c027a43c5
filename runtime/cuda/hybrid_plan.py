"""Which weights lie in a GPU's memory when not all of them fit, and which pass through it.

    plan = plan_hbm(pieces, budget_bytes, experts_per_token=2, waits=(1, 3, 5))
    plan.resident, plan.streamed, plan.slots, plan.device_bytes

Weights that every token reads come first: dense pieces stay, and those for which there is no room pass through a window
of two places in turn, one on its way while the other is used. What is left holds experts: as many slots in each layer,
at least those of one token. Embeddings stay: they are read by rows. Pure; the same plan for the same sizes. Raises
RuntimeDiagnostic with the least budget that would do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import PieceInfo

ALIGNMENT = 256
WINDOW = 2  # places for dense pieces that pass through


@dataclass(frozen=True)
class HbmPlan:
    """Numbers of the weights file's pieces. `offsets` says where a resident piece, or a layer's slots, begin in the
    device's region of `device_bytes`; `streamed` pieces take the places of the window in turn, in this order, each of
    `window_bytes`. `slots` are (piece of experts, how many of them are there)."""

    resident: tuple[int, ...]
    streamed: tuple[int, ...]
    slots: tuple[tuple[int, int], ...]
    offsets: tuple[tuple[int, int], ...]
    window_bytes: int
    device_bytes: int

    @property
    def window_offsets(self) -> tuple[int, ...]:
        """Where the places of the window begin: at the end of the region."""
        start = self.device_bytes - WINDOW * self.window_bytes
        return tuple(start + i * self.window_bytes for i in range(WINDOW if self.streamed else 0))


def plan_hbm(
    pieces: Sequence[PieceInfo], budget_bytes: int, experts_per_token: int, order: Sequence[int] | None = None
) -> HbmPlan:
    """The plan for a region of at most `budget_bytes`. `order` is that in which programs wait for pieces (that of the
    file where nothing is said); what they do not wait for stays."""
    order = range(len(pieces)) if order is None else order
    passes = [i for i in order if pieces[i].kind == "dense"]
    experts = [i for i in sorted(order) if pieces[i].kind == "experts"]
    fixed = [i for i in range(len(pieces)) if i not in passes and i not in experts]
    least_slots = sum(_slots_bytes(pieces[i], min(_count(pieces[i]), max(1, experts_per_token))) for i in experts)
    room = budget_bytes - least_slots - sum(_padded(pieces[i].bytes) for i in fixed)
    passing = fewest_passing(pieces, passes, room, WINDOW, ALIGNMENT)
    if passing is None:
        every = _window(pieces, passes) * WINDOW
        needed = least_slots + sum(_padded(pieces[i].bytes) for i in fixed) + every
        raise RuntimeDiagnostic(
            f"{budget_bytes} bytes of device memory are too few for the weights, even when they pass through",
            expected=f"at least {needed} bytes beside the cache and the activations",
            hint="allow more device memory, use a recipe of fewer bits, or run on the CPU (--device cpu)",
        )
    resident = [*fixed, *(i for i in passes if i not in passing)]
    window = _window(pieces, passing)
    left = budget_bytes - sum(_padded(pieces[i].bytes) for i in resident) - WINDOW * window
    slots = _slots(pieces, experts, left, experts_per_token)
    offsets, at = [], 0
    for piece, nbytes in (
        *((i, _padded(pieces[i].bytes)) for i in sorted(resident)),
        *((i, _slots_bytes(pieces[i], count)) for i, count in slots),
    ):
        offsets.append((piece, at))
        at += nbytes
    total = at + WINDOW * window
    return HbmPlan(tuple(sorted(resident)), tuple(passing), tuple(slots), tuple(offsets), window, total)


def fewest_passing(
    pieces: Sequence[PieceInfo], dense: Sequence[int], room: int, places: int, alignment: int
) -> list[int] | None:
    """The fewest dense pieces that pass through so many places, spread evenly over the program, so that the others fit
    into `room` beside the places; None where not even all of them do. Sizes are rounded up to the alignment."""
    sizes = {i: -(-pieces[i].bytes // alignment) * alignment for i in dense}
    total = sum(sizes.values())
    for count in range(len(dense) + 1):
        chosen = [dense[(2 * k + 1) * len(dense) // (2 * count)] for k in range(count)]
        if total - sum(sizes[i] for i in chosen) + places * max((sizes[i] for i in chosen), default=0) <= room:
            return chosen
    return None


def _slots(
    pieces: Sequence[PieceInfo], experts: Sequence[int], left: int, experts_per_token: int
) -> list[tuple[int, int]]:
    """As many slots in each layer as there is room for in all, one more in the first layers."""
    counts = {i: min(_count(pieces[i]), max(1, experts_per_token)) for i in experts}
    left -= sum(_slots_bytes(pieces[i], count) for i, count in counts.items())
    grown = True
    while grown:
        grown = False
        for i in experts:
            more = _slots_bytes(pieces[i], counts[i] + 1) - _slots_bytes(pieces[i], counts[i])
            if counts[i] < _count(pieces[i]) and more <= left:
                counts[i], left, grown = counts[i] + 1, left - more, True
    return list(counts.items())


def _window(pieces: Sequence[PieceInfo], passing: Sequence[int]) -> int:
    return max((_padded(pieces[i].bytes) for i in passing), default=0)


def _count(piece: PieceInfo) -> int:
    """Experts of a piece."""
    return piece.bytes // piece.unit


def _slots_bytes(piece: PieceInfo, count: int) -> int:
    return _padded(piece.unit * count)


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
