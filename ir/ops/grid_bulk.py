"""Grid level: copies of many bytes that one thread starts and a barrier in shared memory (mbarrier) counts.

A barrier is an i64 of shared memory. A phase of it is complete when one thread has said how many bytes it expects and
as many have come; then the next phase begins. Threads wait for phases by their parity: the first phase has 0. Before a
thread has waited nobody may touch the bytes; after it, and a `tile.barrier`, every thread of the block may.
From sm_90 on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ir.formats import I64
from ir.op_def import Op, attr, expect, operand, register_op
from ir.ops.tile_types import element_of
from ir.traits import Synchronizes, WritesMemory
from ir.types import INDEX, BufferType, ScalarType, Type


def check_barrier(barriers: Type, index: Type) -> None:
    expect(barriers == BufferType(I64, "shared"), f"expected barriers in buffer<i64, shared>, got {barriers}")
    expect(index == INDEX, f"expected an index, got {index}")


@register_op
class InitBarrierOp(Op):
    """Makes a barrier, in its first phase. Before others use it there is a `tile.barrier`.

    grid.init_barrier %bars, %i : (buffer<i64, shared>, index) -> ()
    """

    name = "grid.init_barrier"
    traits = (WritesMemory, Synchronizes)
    barriers = operand("buffer<i64, shared>")
    index = operand("which of them")

    @staticmethod
    def infer_types(barriers: Type, index: Type) -> tuple[Type, ...]:
        check_barrier(barriers, index)
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.bulk.init(*values)
        return ()


@register_op
class ExpectBytesOp(Op):
    """Says how many bytes the phase of a barrier waits for. One thread does, once in a phase.

    grid.expect_bytes %bars, %i {bytes = 4096} : (buffer<i64, shared>, index) -> ()
    """

    name = "grid.expect_bytes"
    traits = (WritesMemory, Synchronizes)
    barriers = operand("buffer<i64, shared>")
    index = operand("which of them")
    bytes = attr(int, "a multiple of 16, below 2**20")

    @staticmethod
    def infer_types(barriers: Type, index: Type, bytes: int) -> tuple[Type, ...]:
        check_barrier(barriers, index)
        expect(0 < bytes < 1 << 20 and bytes % 16 == 0, f"expected a multiple of 16 below 2**20, got {bytes} bytes")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.bulk.expect(*values, self.bytes)
        return ()


@register_op
class BulkCopyOp(Op):
    """Starts to copy `size` neighbouring elements from global to shared memory; the barrier counts their bytes.

    grid.bulk_copy %s, %i, %x, %j, %bars, %k {size = 512}
        : (buffer<bf16, shared>, index, buffer<bf16>, index, buffer<i64, shared>, index) -> ()
    """

    name = "grid.bulk_copy"
    traits = (WritesMemory,)
    target = operand("shared buffer")
    target_index = operand("first element written; its byte is a multiple of 16")
    source = operand("global buffer of the same element")
    source_index = operand("first element read; its byte is a multiple of 16")
    barriers = operand("buffer<i64, shared>")
    index = operand("which of them")
    size = attr(int, "elements, a multiple of 16 bytes")

    @staticmethod
    def infer_types(
        target: Type, target_index: Type, source: Type, source_index: Type, barriers: Type, index: Type, size: int
    ) -> tuple[Type, ...]:
        expect(isinstance(target, BufferType) and target.space == "shared", f"expected a shared buffer, got {target}")
        expect(isinstance(source, BufferType) and source.space == "global", f"expected a global buffer, got {source}")
        assert isinstance(target, BufferType) and isinstance(source, BufferType)
        same = target.element == source.element
        expect(same, f"expected two buffers of one element, got {target} and {source}")
        expect(target_index == source_index == INDEX, f"expected an index, got {target_index} and {source_index}")
        check_barrier(barriers, index)
        nbytes = size * element_of(ScalarType(source.element)).bits // 8  # pyright: ignore[reportArgumentType]
        expect(size > 0 and nbytes % 16 == 0, f"expected a multiple of 16 bytes, got {size} of {source.element}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.bulk.copy(*values, self.size)
        return ()


@register_op
class WaitBarrierOp(Op):
    """Waits until the phase of that parity is complete: the first, third, ... phase for 0, the others for 1.

    grid.wait_barrier %bars, %i, %parity : (buffer<i64, shared>, index, index) -> ()
    """

    name = "grid.wait_barrier"
    traits = (WritesMemory, Synchronizes)
    barriers = operand("buffer<i64, shared>")
    index = operand("which of them")
    parity = operand("index, 0 or 1")

    @staticmethod
    def infer_types(barriers: Type, index: Type, parity: Type) -> tuple[Type, ...]:
        check_barrier(barriers, index)
        expect(parity == INDEX, f"expected an index for the parity, got {parity}")
        return ()

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        context.grid.bulk.wait(*values)
        return ()
