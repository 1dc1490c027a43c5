"""Tile level: memory. Buffers are one-dimensional and indexed by element; a vector access touches consecutive elements.

The interpreter holds a buffer as a `BufferView` (`ir.tile_memory_model`), which checks bounds and, when several
threads run, races.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.diagnostics import DiagnosticSink
from ir.formats import F32, I1, I32, PlainFormat
from ir.op_def import InferenceError, Op, attr, expect, operand, register_op, result
from ir.ops.builtin import FuncOp
from ir.ops.tile_types import element_of, lanes_of
from ir.tile_memory_model import BufferView
from ir.traits import Pure, ReadsMemory, WritesMemory
from ir.types import INDEX, BufferType, ScalarType, Type, VectorType


def _buffer_element(type: Type) -> PlainFormat:
    """The format of a buffer's elements; a mask (i1) has no bytes to lie in."""
    if not isinstance(type, BufferType):
        raise InferenceError(f"expected a buffer, got {type}")
    if not isinstance(type.element, PlainFormat) or type.element == I1:
        raise InferenceError(f"expected a buffer of machine numbers, got {type}")
    return type.element


def _check_index(type: Type) -> None:
    expect(type == INDEX, f"expected an index, got {type}")


@register_op
class LoadOp(Op):
    """`lanes` consecutive elements from `index` on; a scalar when lanes = 1.

    %v = tile.load %b, %i {lanes = 16} : (buffer<f32>, index) -> vector<16 x f32>
    """

    name = "tile.load"
    traits = (ReadsMemory,)
    buffer = operand("buffer")
    index = operand("first element")
    lanes = attr(int, "how many", default=1)
    out = result("scalar or vector of the buffer's element")

    @staticmethod
    def infer_types(buffer: Type, index: Type, lanes: int) -> Type:
        _check_index(index)
        element = _buffer_element(buffer)
        expect(lanes >= 1, f"expected 1 lane or more, got {lanes}")
        return ScalarType(element) if lanes == 1 else VectorType(lanes, element)

    @staticmethod
    def reference(buffer: Any, index: Any, lanes: int) -> Any:
        return buffer.load(int(index), lanes)


@register_op
class LoadMaskedOp(Op):
    """Like `tile.load` where the mask holds; zero in the other lanes, whose memory is not touched.

    %v = tile.load_masked %b, %i, %m : (buffer<f32>, index, vector<16 x i1>) -> vector<16 x f32>
    """

    name = "tile.load_masked"
    traits = (ReadsMemory,)
    buffer = operand("buffer")
    index = operand("first element")
    mask = operand("i1 vector")
    out = result("vector of as many lanes")

    @staticmethod
    def infer_types(buffer: Type, index: Type, mask: Type) -> Type:
        _check_index(index)
        expect(isinstance(mask, VectorType) and element_of(mask) == I1, f"expected an i1 vector, got {mask}")
        return VectorType(lanes_of(mask), _buffer_element(buffer))

    @staticmethod
    def reference(buffer: Any, index: Any, mask: Any) -> Any:
        return buffer.load_masked(int(index), mask)


@register_op
class GatherOp(Op):
    """The elements at each lane of `index`, which counts from the beginning of the buffer.

    %v = tile.gather %b, %i : (buffer<i32>, vector<16 x i32>) -> vector<16 x i32>
    """

    name = "tile.gather"
    traits = (ReadsMemory,)
    buffer = operand("buffer of f32 or i32")
    index = operand("i32 vector, no lane negative")
    out = result("vector of as many lanes")

    @staticmethod
    def infer_types(buffer: Type, index: Type) -> Type:
        element = _buffer_element(buffer)
        expect(element in (F32, I32), f"expected a buffer of f32 or i32, got {buffer}")
        expect(isinstance(index, VectorType) and element_of(index) == I32, f"expected an i32 vector, got {index}")
        return VectorType(lanes_of(index), element)

    @staticmethod
    def reference(buffer: Any, index: Any) -> Any:
        return np.array([buffer.load(int(i), 1) for i in index])


@register_op
class StoreOp(Op):
    """Writes a scalar or the lanes of a vector from `index` on.

    tile.store %b, %i, %v : (buffer<f32>, index, vector<16 x f32>) -> ()
    """

    name = "tile.store"
    traits = (WritesMemory,)
    buffer = operand("buffer")
    index = operand("first element")
    value = operand("scalar or vector of the buffer's element")

    @staticmethod
    def infer_types(buffer: Type, index: Type, value: Type) -> tuple[Type, ...]:
        _check_index(index)
        expect(element_of(value) == _buffer_element(buffer), f"cannot store {value} into {buffer}")
        return ()

    @staticmethod
    def reference(buffer: Any, index: Any, value: Any) -> tuple[()]:
        buffer.store(int(index), value)
        return ()


@register_op
class StoreMaskedOp(Op):
    """Writes the lanes where the mask holds; the other elements keep their bytes.

    tile.store_masked %b, %i, %v, %m : (buffer<f32>, index, vector<16 x f32>, vector<16 x i1>) -> ()
    """

    name = "tile.store_masked"
    traits = (WritesMemory,)
    buffer = operand("buffer")
    index = operand("first element")
    value = operand("vector of the buffer's element")
    mask = operand("i1 vector of as many lanes")

    @staticmethod
    def infer_types(buffer: Type, index: Type, value: Type, mask: Type) -> tuple[Type, ...]:
        _check_index(index)
        expect(element_of(value) == _buffer_element(buffer), f"cannot store {value} into {buffer}")
        expect(mask == VectorType(lanes_of(value), I1), f"mask {mask} does not fit {value}")
        return ()

    @staticmethod
    def reference(buffer: Any, index: Any, value: Any, mask: Any) -> tuple[()]:
        buffer.store_masked(int(index), value, mask)
        return ()


@register_op
class PrefetchOp(Op):
    """Hints that the cache line of element `index` is read soon. Any index is allowed, also outside the buffer.

    tile.prefetch %b, %i {level = 2} : (buffer<bf16>, index) -> ()
    """

    name = "tile.prefetch"
    traits = (WritesMemory,)  # kept where it is, never removed as unused
    buffer = operand("buffer")
    index = operand("element")
    level = attr(int, "the cache it is to come to: 1, or 2 for what is read later", default=1)

    @staticmethod
    def infer_types(buffer: Type, index: Type, level: int) -> tuple[Type, ...]:
        _check_index(index)
        _buffer_element(buffer)
        expect(level in (1, 2), f"expected level 1 or 2, got {level}")
        return ()

    @staticmethod
    def reference(buffer: Any, index: Any, level: int) -> tuple[()]:
        return ()


@register_op
class OffsetOp(Op):
    """The buffer that begins at element `index` of another.

    %s = tile.offset %b, %i : (buffer<bf16>, index) -> buffer<bf16>
    """

    name = "tile.offset"
    traits = (Pure,)
    buffer = operand("buffer")
    index = operand("first element of the new one")
    out = result("buffer of the same type")

    @staticmethod
    def infer_types(buffer: Type, index: Type) -> Type:
        _check_index(index)
        _buffer_element(buffer)
        return buffer

    @staticmethod
    def reference(buffer: Any, index: Any) -> Any:
        return buffer.offset(int(index))


@register_op
class ViewOp(Op):
    """The same bytes as elements of another format, e.g. pairs of bf16 as i32.

    %p = tile.view %b {element = i32} : (buffer<bf16>) -> buffer<i32>
    """

    name = "tile.view"
    traits = (Pure,)
    buffer = operand("buffer")
    element = attr(PlainFormat, "format of the elements", default=I32)
    out = result("buffer")

    @staticmethod
    def infer_types(buffer: Type, element: PlainFormat) -> Type:
        _buffer_element(buffer)
        assert isinstance(buffer, BufferType)
        made = BufferType(element, buffer.space)
        _buffer_element(made)
        return made

    @staticmethod
    def reference(buffer: Any, element: PlainFormat) -> Any:
        return buffer.view(element)


@register_op
class ScratchOp(Op):
    """A buffer of this thread's own on its stack, undefined at first, gone when the kernel returns.

    It stands in the body of the kernel itself: inside a loop, every iteration would take more of the stack.

    %s = tile.scratch {size = 64, element = f32} : () -> buffer<f32, private>
    """

    name = "tile.scratch"
    traits = (ReadsMemory,)  # two of them are never one
    size = attr(int, "elements")
    element = attr(PlainFormat, "format of the elements")
    out = result("private buffer, 64-byte aligned")

    @staticmethod
    def infer_types(size: int, element: PlainFormat) -> Type:
        expect(size > 0, f"expected a size above 0, got {size}")
        made = BufferType(element, "private")
        _buffer_element(made)
        return made

    def verify(self, diag: DiagnosticSink) -> None:
        outer = self.parent_op
        if outer is not None and not isinstance(outer, FuncOp):
            diag.error(
                self.location, f"'tile.scratch' stands inside '{outer.name}'; expected it in the kernel's own body"
            )

    @staticmethod
    def reference(size: int, element: PlainFormat) -> Any:
        return BufferView.undefined(size, element)
