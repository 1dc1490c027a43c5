"""The pieces of the weights file, as the manifest says them: what is read together, and where each expert lies.

`runtime.manifest` has the rest of the manifest. Refuses pieces that overlap, that are no whole pages or that lie
outside of the file, and experts that are missing or there twice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from runtime.manifest_fields import Fields

PAGE_BYTES = 4096  # of the weights file, whatever the machine's


@dataclass(frozen=True)
class PieceInfo:
    """Whole pages of the weights file that are read together: `rows`, `experts`, `stand_ins` or `dense`.

    `unit` is the bytes of a row, of an expert or of one that stands in for it, 0 for dense ones. `classes`: where the
    experts of a layer differ in size, the bytes of one and the numbers of the experts, for each format in the order of
    the file; `unit` is then that of the largest.
    """

    kind: str
    offset: int
    bytes: int
    unit: int
    origin: str
    classes: tuple[tuple[int, tuple[int, ...]], ...] = ()

    @property
    def count(self) -> int:
        """How many rows or experts it has."""
        return sum(len(experts) for _, experts in self.classes) if self.classes else self.bytes // self.unit

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Bytes of each expert."""
        return tuple(nbytes for _, nbytes in self._places)

    def largest(self, count: int) -> int:
        """Bytes of its `count` largest experts: what any so many fit into."""
        if not self.classes:
            return min(count, self.count) * self.unit
        return sum(sorted(self.sizes, reverse=True)[:count])

    def place(self, expert: int) -> tuple[int, int]:
        """(offset, bytes) of an expert in the weights file."""
        return self._places[expert] if self.classes else (self.offset + expert * self.unit, self.unit)

    @cached_property
    def _places(self) -> tuple[tuple[int, int], ...]:
        """(offset, bytes) of every expert."""
        if not self.classes:
            return tuple((self.offset + expert * self.unit, self.unit) for expert in range(self.count))
        found: dict[int, tuple[int, int]] = {}
        at = self.offset
        for unit, experts in self.classes:
            for expert in experts:
                found[expert] = at, unit
                at += unit
        return tuple(found[expert] for expert in range(len(found)))


def read_pieces(fields: Fields, total: int) -> tuple[PieceInfo, ...]:
    """Pieces lie in order, on pages, and do not overlap; experts are whole and on pages too."""
    pieces: list[PieceInfo] = []
    end = 0
    for piece in fields.children("pieces", 1 << 20, ()):
        info = PieceInfo(
            piece.text("kind"), piece.integer("offset", end, total), piece.integer("bytes", 1, total),
            piece.integer("unit", 0, total), piece.text("origin", ""), _classes(piece, total),
        )  # fmt: skip
        if info.kind not in ("rows", "experts", "stand_ins", "dense"):
            piece.fail("kind", "rows, experts, stand_ins or dense", info.kind)
        if info.offset % PAGE_BYTES or info.bytes % PAGE_BYTES or info.offset + info.bytes > total:
            piece.fail("offset", "whole pages inside of the weights", info.offset)
        if info.classes:
            _check_classes(info, piece)
        elif info.kind in ("experts", "stand_ins") and (
            not info.unit or info.unit % PAGE_BYTES or info.bytes % info.unit
        ):
            piece.fail("unit", "whole pages, of which the piece is a multiple", info.unit)
        if info.kind == "rows" and not 0 < info.unit <= info.bytes:
            piece.fail("unit", f"1 to {info.bytes}, the bytes of a row", info.unit)
        end = info.offset + info.bytes
        pieces.append(info)
    return tuple(pieces)


def _classes(piece: Fields, total: int) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """The experts of a piece by format, where they differ in size."""
    return tuple(
        (fields.integer("unit", 1, total), tuple(fields.integers("experts", 0, 1 << 16)))
        for fields in piece.children("classes", 1 << 16, ())
    )


def _check_classes(info: PieceInfo, piece: Fields) -> None:
    """Every expert is in one class, and together they are the piece."""
    numbers = sorted(expert for _, experts in info.classes for expert in experts)
    if info.kind != "experts" or numbers != list(range(len(numbers))):
        piece.fail("classes", "the numbers of all experts of the layer, each once", numbers[:8])
    if any(unit % PAGE_BYTES for unit, _ in info.classes) or info.unit != max(unit for unit, _ in info.classes):
        piece.fail("unit", "whole pages, those of the largest expert", info.unit)
    if info.bytes != sum(unit * len(experts) for unit, experts in info.classes):
        piece.fail("bytes", "those of all experts", info.bytes)
