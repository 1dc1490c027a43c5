"""Plan level, GPUs: what a program for a GPU names besides what one for a CPU does.

A launch on a GPU says how many blocks it has (`grid` of `plan.launch`). The cache of a layer is several planes (keys,
values, scales), each [slots, heads, ctx] places of some bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ir.diagnostics import DiagnosticSink
from ir.formats import I32
from ir.op_def import Op, attr, expect, register_op, result
from ir.ops.plan import PlaceOp
from ir.size_text import check_size, evaluate_size
from ir.traits import Pure
from ir.types import INDEX, BufferType, Type


@register_op
class KVPlaneOp(PlaceOp):
    """One plane of the KV cache of one layer: every slot, every kv head. All layers are of one size.

    %keys = plan.kv_plane {layer = 1, plane = 0, position_bytes = 512} : () -> buffer<bf16>
    """

    name = "plan.kv_plane"
    traits = (Pure,)
    layer = attr(int, "which layer")
    plane = attr(int, "which plane")
    position_bytes = attr(int, "bytes of a position, all kv heads; 0 where a plane does not grow", default=0)
    slot_bytes = attr(int, "bytes of a slot that do not grow with its positions", default=0)
    least: ClassVar[dict[str, int]] = {"layer": 0, "plane": 0, "position_bytes": 0, "slot_bytes": 0}

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        size = context.sizes["slots"] * (context.sizes["ctx"] * self.position_bytes + self.slot_bytes)
        return (context.place(f"kv plane {self.plane}", self.element, self.layer * size, size),)


@register_op
class PiecesOp(PlaceOp):
    """The pieces of the prompts of this step, four numbers each: first token, tokens, slot, position of the first.

    %pieces = plan.pieces : () -> buffer<i32>
    """

    name = "plan.pieces"
    traits = (Pure,)

    def verify(self, diag: DiagnosticSink) -> None:
        if self.out.type != BufferType(I32):
            diag.error(self.location, f"'plan.pieces' expected to give {BufferType(I32)}, got {self.out.type}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.place("pieces", self.element, 0),)


@register_op
class CountOp(Op):
    """A number that follows from the sizes of this run.

    %most = plan.count {size = "min(tokens * 2, tokens + 7)"} : () -> index
    """

    name = "plan.count"
    traits = (Pure,)
    size = attr(str, "whole numbers, tokens, rows, ctx, slots, pieces, +, *, ceil, min, max")
    out = result("index")

    @staticmethod
    def infer_types(size: str) -> Type:
        wrong = check_size(size)
        expect(not wrong, wrong)
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.int64(evaluate_size(self.size, context.sizes)),)
