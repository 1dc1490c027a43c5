"""What a schedule is made for: the work of a phase, layer by layer, and the data it needs from elsewhere.

A `Placement` is turned into one of these; the emitters of this folder turn it into a streaming plan. Nothing here knows
models: a layer is work on a unit and pieces of data with a size and a home.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from hw_targets.cost_model import Work
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError


@dataclass(frozen=True)
class Piece:
    """Named data of `nbytes` at home in a tier or storage. With `over` (a link or storage) they are copied to the
    unit's tier for each use, without it they are read where they lie.

    `block`, `depth` and `pinned` are those of the requests, `stream` tells queues over one link apart.
    """

    name: str
    nbytes: int
    home: str
    over: str = ""
    stream: str = ""
    block: int = 0
    depth: int = 1
    pinned: bool = True


@dataclass(frozen=True)
class Layer:
    """One computation and its data. `work.traffic` says which tiers it touches: for copied pieces the unit's own."""

    name: str
    work: Work
    pieces: tuple[Piece, ...] = ()

    @property
    def streamed(self) -> tuple[Piece, ...]:
        """The pieces that are copied for each use."""
        return tuple(p for p in self.pieces if p.over)

    @property
    def streamed_bytes(self) -> int:
        return sum(p.nbytes for p in self.pieces if p.over)


@dataclass(frozen=True)
class StreamProblem:
    """Layers that `unit` computes in order, `steps` times; `tier` is where its slots are.

    `slot_bytes` is the room for copied pieces, None for all that the tier has beside what is at home there and the
    `scratch_bytes` that are held throughout (activations, keys and values that stay).
    """

    unit: str
    tier: str
    layers: tuple[Layer, ...]
    steps: int = 1
    slot_bytes: int | None = None
    scratch_bytes: int = 0

    def room(self, target: Target | None = None) -> int | None:
        """Bytes for slots; None when nothing limits them.

        Raises DiagnosticError when even one layer at a time does not fit, with the least that would.
        """
        room = self.slot_bytes
        if target is not None:
            tier = target.tier(self.tier.split("[", 1)[0])
            usable = None if tier is None else tier.usable_bytes
            if usable is not None:
                homes = {p.name: p.nbytes for layer in self.layers for p in layer.pieces if p.home == self.tier}
                left = usable - sum(homes.values()) - self.scratch_bytes
                room = left if room is None else min(room, left)
        needed = max((layer.streamed_bytes for layer in self.layers), default=0)
        if room is not None and room < needed:
            largest = max(self.layers, key=lambda layer: layer.streamed_bytes)
            raise DiagnosticError(
                f"{max(room, 0)} bytes of {self.tier} are left for what is streamed",
                expected=f"at least {needed}, the data of {largest.name}",
                hint="split its pieces, or keep less in that tier",
            )
        return room

    def repeated(self, steps: int) -> StreamProblem:
        """The same for another number of steps."""
        return replace(self, steps=steps)
