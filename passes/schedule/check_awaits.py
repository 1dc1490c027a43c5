"""An independent proof that a program waits for every weight it reads, and for the keys and values that it touches.

Shares no code with what makes plans. Checked on the ops alone: a launch that reads bytes of a dense or expert piece
stands behind a wait for that piece, and no wait between the two names it as done (stand-ins come and go with the
experts that they stand in for); a launch that reads or writes the KV cache of a layer stands behind a wait for that
layer, and no wait for another layer between; both kinds of waits are numbered from 0, each by itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from ir.diagnostics import DiagnosticSink
from ir.ops import plan
from ir.ops.builtin import FuncOp
from ir.ops.plan_await import AwaitExpertsOp, AwaitKVOp, AwaitWeightsOp
from ir.ops.plan_grid import KVPlaneOp

Piece = tuple[str, int, int]  # kind (rows, experts, dense), first byte, bytes


def check_awaits(program: FuncOp, pieces: Sequence[Piece]) -> DiagnosticSink:
    """The faults of `program`, none when it is sound."""
    diag = DiagnosticSink()
    ready: dict[int, None] = {}
    partner: dict[int, int] = {}  # piece of experts -> that of their stand-ins
    number = kv_number = 0
    kv_layer: int | None = None
    for op in program.block.ops:
        match op:
            case AwaitWeightsOp() | AwaitExpertsOp():
                kind = "experts" if isinstance(op, AwaitExpertsOp) else "dense"
                if op.piece >= len(pieces) or pieces[op.piece][0] != kind:
                    diag.error(op.location, f"'{op.name}' of piece {op.piece}, which is no piece of kind {kind}")
                if op.number != number:
                    diag.error(op.location, f"'{op.name}' is number {op.number} where {number} follows")
                number += 1
                for piece in op.done:
                    ready.pop(piece, None)
                    ready.pop(partner.get(piece, -1), None)
                ready[op.piece] = None
                stand_ins = op.stand_ins if isinstance(op, AwaitExpertsOp) else -1
                if stand_ins >= len(pieces) or (stand_ins >= 0 and pieces[stand_ins][0] != "stand_ins"):
                    diag.error(op.location, f"'{op.name}' of piece {stand_ins}, which is no piece of kind stand_ins")
                elif stand_ins >= 0:
                    partner[op.piece] = stand_ins
                    ready[stand_ins] = None
            case AwaitKVOp():
                if op.number != kv_number:
                    diag.error(op.location, f"'{op.name}' is number {op.number} where {kv_number} follows")
                kv_number += 1
                kv_layer = op.layer
            case plan.LaunchOp():
                for value in op.arguments:
                    place = value.defining_op()
                    if isinstance(place, plan.KVOp | KVPlaneOp) and place.layer != kv_layer:
                        message = f"launch of {op.kernel} touches keys and values of layer {place.layer} without a wait"
                        diag.error(op.location, message)
                    if isinstance(place, plan.WeightOp):
                        for missing in _missing(place, pieces, ready):
                            message = f"launch of {op.kernel} reads @{place.symbol.name} without a wait for {missing}"
                            diag.error(op.location, message)
    return diag


def _missing(place: plan.WeightOp, pieces: Sequence[Piece], ready: dict[int, None]) -> list[str]:
    """The pieces with bytes of a weight that are not waited for."""
    start, end = place.offset, place.offset + place.bytes
    return [
        f"piece {number}"
        for number, (kind, first, size) in enumerate(pieces)
        if kind != "rows" and number not in ready and first < end and start < first + size
    ]
