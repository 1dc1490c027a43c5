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
    """One plane of the KV cache of one layer. A layer has its planes one after another; all layers are of one size.

    %keys = plan.kv_plane {layer = 1, plane = 0, position_bytes = 512, before = 0, layer_bytes = 1024}
        : () -> buffer<bf16>
    """

    name = "plan.kv_plane"
    traits = (Pure,)
    layer = attr(int, "which layer")
    plane = attr(int, "which plane")
    position_bytes = attr(int, "bytes of a position, all kv heads")
    before = attr(int, "bytes of a position in the planes before it")
    layer_bytes = attr(int, "bytes of a position in all planes")
    least: ClassVar[dict[str, int]] = {"layer": 0, "plane": 0, "position_bytes": 1, "before": 0, "layer_bytes": 1}

    def verify(self, diag: DiagnosticSink) -> None:
        super().verify(diag)
        if self.before + self.position_bytes > self.layer_bytes:
            message = f"'{self.name}' of bytes {self.before}..{self.before + self.position_bytes} of a position"
            diag.error(self.location, f"{message} that has {self.layer_bytes}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        places = context.sizes["slots"] * context.sizes["ctx"]
        start = places * (self.layer * self.layer_bytes + self.before)
        return (context.place("kv cache", self.element, start, places * self.position_bytes),)


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
