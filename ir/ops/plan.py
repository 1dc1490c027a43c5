"""Plan level: where every buffer lives and which kernels run in which order.

A program (`func.func @decode`) names its inputs and sizes, its weights in the artifact, its slices of the arena and
the KV cache, and then lists launches with the barriers between them. All threads of the team run the whole list.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np

from ir.attributes import SymbolRef
from ir.diagnostics import DiagnosticSink
from ir.formats import F32, I32, PlainFormat
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.size_text import check_size
from ir.tile_memory_model import BufferView, KernelFault
from ir.traits import Pure, Synchronizes, WritesMemory
from ir.types import INDEX, BufferType, IndexType, Type

INPUTS = {"ids": I32, "positions": I32, "slots": I32, "rows": I32, "logits": F32}
SIZES = ("tokens", "rows", "ctx", "slots")


class PlaceOp(Op):
    """Base of the ops that name memory; the type of their buffer is given."""

    out = result("buffer; the type is given")
    least: ClassVar[dict[str, int]] = {}  # attribute -> smallest value it may have

    def verify(self, diag: DiagnosticSink) -> None:
        for name, smallest in self.least.items():
            if self.attributes[name] < smallest:
                message = f"'{self.name}' expected {name} >= {smallest}, got {self.attributes[name]}"
                diag.error(self.location, message)
        type = self.out.type
        if not (isinstance(type, BufferType) and isinstance(type.element, PlainFormat) and type.space == "global"):
            diag.error(self.location, f"'{self.name}' expected to give a global buffer of machine numbers, got {type}")

    @property
    def element(self) -> PlainFormat:
        """The format of the buffer's elements."""
        assert isinstance(self.out.type, BufferType) and isinstance(self.out.type.element, PlainFormat)
        return self.out.type.element


@register_op
class InputOp(PlaceOp):
    """A buffer the caller passes to the step: ids, positions, slots [tokens], rows [rows], logits [rows, vocab].

    %ids = plan.input {which = "ids"} : () -> buffer<i32>
    """

    name = "plan.input"
    traits = (Pure,)
    which = attr(str, "ids, positions, slots, rows or logits")

    def verify(self, diag: DiagnosticSink) -> None:
        if self.which not in INPUTS:
            diag.error(self.location, f"'plan.input' expected one of {', '.join(INPUTS)}, got {self.which!r}")
        elif self.out.type != BufferType(INPUTS[self.which]):
            wanted = BufferType(INPUTS[self.which])
            diag.error(self.location, f"'plan.input' expected {self.which} to be {wanted}, got {self.out.type}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.place(self.which, self.element, 0),)


@register_op
class SizeOp(Op):
    """A size of this run: tokens and rows of the step, ctx positions and slots of the KV cache.

    %tokens = plan.size {which = "tokens"} : () -> index
    """

    name = "plan.size"
    traits = (Pure,)
    which = attr(str, "tokens, rows, ctx or slots")
    scale = attr(int, "times this", default=1)
    out = result("index")

    @staticmethod
    def infer_types(which: str, scale: int) -> Type:
        expect(which in SIZES, f"expected one of {', '.join(SIZES)}, got {which!r}")
        expect(scale >= 1, f"expected scale >= 1, got {scale}")
        return INDEX

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.int64(context.sizes[self.which] * self.scale),)


@register_op
class WeightOp(PlaceOp):
    """A stored tensor of the artifact.

    %w = plan.weight {symbol = @layers.0.mlp.down_proj, offset = 4096, bytes = 8192} : () -> buffer<bf16>
    """

    name = "plan.weight"
    traits = (Pure,)
    symbol = attr(SymbolRef, "its name in the weights index")
    offset = attr(int, "bytes from the start of the weights file")
    bytes = attr(int, "stored bytes")
    least: ClassVar[dict[str, int]] = {"offset": 0, "bytes": 0}

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.place("weights", self.element, self.offset, self.bytes),)


@register_op
class KVOp(PlaceOp):
    """The KV cache of one layer: every slot, every kv head. All layers are of one size.

    %kv = plan.kv {layer = 0, position_bytes = 1024} : () -> buffer<bf16>
    """

    name = "plan.kv"
    traits = (Pure,)
    layer = attr(int, "which")
    position_bytes = attr(int, "bytes of one position, keys and values of all kv heads")
    slot_bytes = attr(int, "bytes of one slot that do not grow with its positions", default=0)
    least: ClassVar[dict[str, int]] = {"layer": 0, "position_bytes": 1, "slot_bytes": 0}

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        size = context.sizes["slots"] * (context.sizes["ctx"] * self.position_bytes + self.slot_bytes)
        return (context.place("kv cache", self.element, self.layer * size, size),)


@register_op
class ReserveOp(PlaceOp):
    """Takes bytes [offset, offset + bytes) of the arena until `plan.release`.

    %b = plan.reserve {offset = 0, bytes = 8192} : () -> buffer<f32>
    """

    name = "plan.reserve"
    traits = (WritesMemory,)
    offset = attr(int, "bytes from the start of the arena")
    bytes = attr(int, "size")
    least: ClassVar[dict[str, int]] = {"offset": 0, "bytes": 0}

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.place("arena", self.element, self.offset, self.bytes),)


@register_op
class ReleaseOp(Op):
    """Ends the life of a reserved buffer.

    plan.release %b : (buffer<f32>) -> ()
    """

    name = "plan.release"
    traits = (WritesMemory,)
    buffer = operand("a reserved buffer")

    @staticmethod
    def infer_types(buffer: Type) -> tuple[Type, ...]:
        expect(isinstance(buffer, BufferType), f"expected a buffer, got {buffer}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        values[0].released = True
        return ()


@register_op
class LaunchOp(Op):
    """Runs a kernel on the whole team. Every buffer is read, written or both, as `reads` and `writes` say.

    On a GPU `grid` says how many blocks it has: `ceil(tokens, 16) * 32`.

    plan.launch %x, %w, %y, %tokens {kernel = @gemm_2048x2048, writes = [2], reads = [0, 1]}
        : (buffer<bf16>, buffer<bf16>, buffer<f32>, index) -> ()
    """

    name = "plan.launch"
    traits = (WritesMemory,)
    arguments = operand("buffers and sizes, in the order of the kernel's parameters", variadic=True)
    kernel = attr(SymbolRef, "which")
    writes = attr(tuple, "numbers of the arguments that are written")
    reads = attr(tuple, "numbers of the arguments that are read")
    grid = attr(str, "blocks on a GPU, from the sizes of the run", default="")

    @staticmethod
    def infer_types(
        *arguments: Type, kernel: SymbolRef, writes: tuple[int, ...], reads: tuple[int, ...], grid: str
    ) -> tuple[Type, ...]:
        for a in arguments:
            expect(isinstance(a, BufferType | IndexType), f"expected buffers and indices, got {a}")
        buffers = [i for i, a in enumerate(arguments) if isinstance(a, BufferType)]
        for i in (*writes, *reads):
            expect(type(i) is int and i in buffers, f"argument {i} is not a buffer of this launch")
        for i in buffers:
            expect(i in writes or i in reads, f"argument {i} is neither in reads nor in writes")
        wrong = check_size(grid) if grid else ""
        expect(not wrong, f"expected grid to be a size of the run: {wrong}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        for i, value in enumerate(values):
            if isinstance(value, BufferView) and value.released:
                raise KernelFault(f"launch of {self.kernel} uses argument {i} after its release")
        context.launch(self.kernel.name, values)
        return ()


@register_op
class BarrierOp(Op):
    """Waits until every thread has finished the launches before.

    plan.barrier : () -> ()
    """

    name = "plan.barrier"
    traits = (Synchronizes,)

    @staticmethod
    def infer_types() -> tuple[Type, ...]:
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.wait(self)
        return ()
