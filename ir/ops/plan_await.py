"""Plan level: where a program waits for weights, and for keys and values, that may not be in memory.

An artifact runs with all weights mapped, and then these ops cost a load and a branch, or under a memory budget with
some of them read from disk as they are needed. The program says what is needed next and what is done with; whoever
reads the weights decides what to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from ir.diagnostics import DiagnosticSink
from ir.formats import I32
from ir.op_def import Op, attr, expect, operand, register_op
from ir.tile_memory_model import BufferView, KernelFault
from ir.traits import Synchronizes
from ir.types import BufferType, IndexType, Type


class AwaitOp(Op):
    """Base of the two ops: `number` counts those of a program, `piece` is a piece of the weights file."""

    least: ClassVar[tuple[str, ...]] = ("number", "piece")

    def verify(self, diag: DiagnosticSink) -> None:
        for name in self.least:
            if self.attributes[name] < 0:
                diag.error(self.location, f"'{self.name}' expected {name} >= 0, got {self.attributes[name]}")


@register_op
class AwaitWeightsOp(AwaitOp):
    """Waits until a piece of the weights is in memory; pieces in `done` are not read again before they are awaited.

    plan.await_weights {number = 4, piece = 3, done = [2]} : () -> ()
    """

    name = "plan.await_weights"
    traits = (Synchronizes,)
    number = attr(int, "which of the program's waits this is")
    piece = attr(int, "number of the piece in the weights file")
    done = attr(tuple, "numbers of pieces that the launches before were the last to read", default=())

    @staticmethod
    def infer_types(number: int, piece: int, done: tuple[int, ...]) -> tuple[Type, ...]:
        expect(all(type(d) is int and d >= 0 for d in done), f"expected numbers of pieces in done, got {list(done)}")
        expect(piece not in done, f"piece {piece} is awaited and done at once")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return ()


@register_op
class AwaitExpertsOp(AwaitOp):
    """Waits until the experts named by `ids` [count] are in memory; the piece holds all experts of a layer.

    Where the layer has stand-ins, in a piece of their own, the wait may put their numbers in place of experts'.

    plan.await_experts %ids, %pairs {number = 5, piece = 4, done = [3]} : (buffer<i32>, index) -> ()
    """

    name = "plan.await_experts"
    traits = (Synchronizes,)
    ids = operand("numbers of experts, any order, repeats allowed")
    count = operand("how many")
    number = attr(int, "which of the program's waits this is")
    piece = attr(int, "number of the piece in the weights file")
    done = attr(tuple, "numbers of pieces that the launches before were the last to read", default=())
    stand_ins = attr(int, "number of the piece of the stand-ins, -1 for none", default=-1)

    @staticmethod
    def infer_types(
        ids: Type, count: Type, number: int, piece: int, done: tuple[int, ...], stand_ins: int
    ) -> tuple[Type, ...]:
        expect(isinstance(ids, BufferType) and ids.element == I32, f"expected ids to be buffer<i32>, got {ids}")
        expect(isinstance(count, IndexType), f"expected count to be an index, got {count}")
        expect(all(type(d) is int and d >= 0 for d in done), f"expected numbers of pieces in done, got {list(done)}")
        expect(piece not in done, f"piece {piece} is awaited and done at once")
        expect(stand_ins >= -1 and stand_ins != piece, f"expected another piece for stand_ins, or -1, got {stand_ins}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        if isinstance(values[0], BufferView) and values[0].released:
            raise KernelFault(f"await of the experts of piece {self.piece} reads ids after their release")
        return ()


@register_op
class AwaitKVOp(Op):
    """Waits until the keys and values of a layer are in memory; those of other layers are not used before their wait.

    plan.await_kv {number = 4, layer = 4} : () -> ()
    """

    name = "plan.await_kv"
    traits = (Synchronizes,)
    number = attr(int, "which of the program's waits for keys and values this is")
    layer = attr(int, "number of the layer in the KV cache")

    def verify(self, diag: DiagnosticSink) -> None:
        for name in ("number", "layer"):
            if self.attributes[name] < 0:
                diag.error(self.location, f"'{self.name}' expected {name} >= 0, got {self.attributes[name]}")

    @staticmethod
    def infer_types(number: int, layer: int) -> tuple[Type, ...]:
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return ()
