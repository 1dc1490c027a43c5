"""The pieces of a weights file under a plan of memory: which stay, which are experts, which stand in for experts."""

from __future__ import annotations

from dataclasses import dataclass

from runtime.manifest import Manifest
from runtime.piece_info import PieceInfo
from runtime.stand_ins import stand_in_pieces
from runtime.stream_plan import StreamPlan


@dataclass(frozen=True)
class StreamedPieces:
    """`pieces` are all of the file; `resident` stay; `experts` are the numbers of pieces of experts, in file order, and
    `stand_ins` those of their copies in fewer bits, layer by layer, or empty where none are used."""

    plan: StreamPlan
    pieces: tuple[PieceInfo, ...]
    resident: frozenset[int]
    experts: list[int]
    stand_ins: list[int]

    @classmethod
    def of(cls, manifest: Manifest, plan: StreamPlan) -> StreamedPieces:
        """Those of an artifact."""
        pieces = manifest.weights.pieces
        experts = [n for n, piece in enumerate(pieces) if piece.kind == "experts"]
        copies = stand_in_pieces(manifest) if plan.stand_ins else {}
        stand_ins = [copies[n] for n in experts] if copies else []
        return cls(plan, pieces, frozenset(plan.resident), experts, stand_ins)
