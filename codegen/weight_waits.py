"""When a program waits for pieces of its weights file: before the launch that reads one first; and what is done then.

Takes, launch by launch, the pieces that are read. A piece is named as done with the first wait behind its last reader,
so that whoever streams weights may give its place to others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from codegen.weight_pieces import ExpertBundle, WeightPiece


class Wait(NamedTuple):
    """A wait for `piece`, of experts with their bundle; `done` are pieces that were read for the last time before."""

    piece: int
    bundle: ExpertBundle | None
    done: tuple[int, ...]


def weight_waits(
    read: Sequence[Sequence[int]], pieces: Sequence[WeightPiece], bundles: Mapping[int, ExpertBundle]
) -> list[list[Wait]]:
    """The waits before each launch. Rows are not waited for: who runs the step knows its ids."""
    last = {piece: step for step, found in enumerate(read) for piece in found}
    waits: list[list[Wait]] = []
    ready: dict[int, None] = {}
    for step, found in enumerate(read):
        new = [p for p in dict.fromkeys(found) if p not in ready and pieces[p].kind != "rows"]
        done = tuple(p for p in ready if last[p] < step) if new else ()
        for piece in done:
            del ready[piece]
        ready.update(dict.fromkeys(new))
        waits.append([Wait(p, bundles.get(p), done if p == new[0] else ()) for p in new])
    return waits
