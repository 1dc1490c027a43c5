"""Grid level: copies from global to shared memory that go on while the threads compute.

A thread starts copies, closes them into a group (`grid.async_commit`) and waits until few groups are left
(`grid.async_wait`). Before that wait nobody may touch the bytes; after it the thread itself may, and after a barrier
the others of its block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ir.formats import I1
from ir.op_def import Op, attr, expect, operand, register_op
from ir.ops.tile_types import element_of
from ir.traits import Synchronizes, WritesMemory
from ir.types import INDEX, BufferType, ScalarType, Type

ASYNC_BYTES = (4, 16)


@register_op
class AsyncCopyOp(Op):
    """Starts to copy bytes from global memory; to write zeros, and read nothing, where the condition fails.

    grid.async_copy %s, %i, %x, %j, %ok : (buffer<bf16, shared>, index, buffer<bf16>, index, i1) -> ()
    """

    name = "grid.async_copy"
    traits = (WritesMemory,)
    target = operand("shared buffer")
    target_index = operand("first element written; its byte is a multiple of `bytes`")
    source = operand("global buffer of the same element")
    source_index = operand("first element read; its byte is a multiple of `bytes`")
    condition = operand("i1")
    bytes = attr(int, "4 or 16", default=16)

    @staticmethod
    def infer_types(
        target: Type, target_index: Type, source: Type, source_index: Type, condition: Type, bytes: int
    ) -> tuple[Type, ...]:
        expect(isinstance(target, BufferType) and target.space == "shared", f"expected a shared buffer, got {target}")
        expect(isinstance(source, BufferType) and source.space == "global", f"expected a global buffer, got {source}")
        assert isinstance(target, BufferType) and isinstance(source, BufferType)
        same = target.element == source.element
        expect(same, f"expected two buffers of one element, got {target} and {source}")
        expect(target_index == source_index == INDEX, f"expected an index, got {target_index} and {source_index}")
        expect(condition == ScalarType(I1), f"expected an i1 condition, got {condition}")
        expect(bytes in ASYNC_BYTES, f"expected a copy of 4 or 16 bytes, got {bytes}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        lanes = self.bytes // element_of(ScalarType(values[0].element)).dtype.itemsize
        context.grid.copies.start(*values, lanes)
        return ()


@register_op
class AsyncCommitOp(Op):
    """Closes a group of this thread's copies: those started since the last one.

    grid.async_commit : () -> ()
    """

    name = "grid.async_commit"
    traits = (Synchronizes,)

    @staticmethod
    def infer_types() -> tuple[Type, ...]:
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.copies.commit()
        return ()


@register_op
class AsyncWaitOp(Op):
    """Waits until at most `pending` of this thread's groups are not done; the newest are the last to be.

    grid.async_wait {pending = 1} : () -> ()
    """

    name = "grid.async_wait"
    traits = (Synchronizes,)
    pending = attr(int, "groups that may still be under way")

    @staticmethod
    def infer_types(pending: int) -> tuple[Type, ...]:
        expect(pending >= 0, f"expected 0 or more groups, got {pending}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.copies.wait(self.pending)
        return ()
