"""Tile IR with grid ops -> LLVM IR for PTX: a kernel becomes one function, and its shared memory.

`define ptx_kernel void @name(ptr addrspace(1)..., i64...)`; what its ops become is in `grid_lowerings` and
`hopper_lowerings`, or as for CPUs. Buffers that are never written are loaded through the read-only cache.
"""

from __future__ import annotations

import codegen.llvm.packed_lowerings
import codegen.llvm.tile_lowerings
import codegen.nvptx.grid_lowerings
import codegen.nvptx.hopper_lowerings  # noqa: F401 - all register lowerings
from codegen.llvm.lowering import llvm_type
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.lowering import (
    HOPPER_SHARED_BYTES,
    MAX_SHARED_BYTES,
    TILE_BYTES,
    GridEmitter,
    dynamic_bytes,
    for_hopper,
    shared_bytes,
)
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.ops import tile_memory
from ir.ops.builtin import ReturnOp
from ir.types import BufferType


def written_buffers(kernel: GridKernel) -> set[Value]:
    """The arguments that are stored to, also through offsets and views."""
    found: set[Value] = set()
    for op in kernel.func.walk():
        if isinstance(op, tile_memory.StoreOp | tile_memory.StoreMaskedOp):
            found.add(_root(op.buffer))
    return found


def _root(buffer: Value) -> Value:
    op = buffer.defining_op()
    while isinstance(op, tile_memory.OffsetOp | tile_memory.ViewOp):
        buffer = op.buffer
        op = buffer.defining_op()
    return buffer


def lower_body(kernel: GridKernel, emitter: GridEmitter, written: set[Value] | None = None) -> list[str]:
    """Emits the ops of a kernel; gives its parameters. Buffers that are not `written` are said to be read only."""
    block = kernel.func.region.block
    parameters = []
    for i, argument in enumerate(block.arguments):
        if isinstance(argument.type, BufferType):
            only_read = "" if written is None or argument in written else " readonly"
            parameters.append(f"ptr addrspace(1) noalias noundef{only_read} align 16 %a{i}")
            emitter.names[argument] = emitter.assign(f"addrspacecast ptr addrspace(1) %a{i} to ptr")
        else:
            parameters.append(f"{llvm_type(argument.type)} %a{i}")
            emitter.names[argument] = f"%a{i}"
    end = emitter.block(block)
    assert isinstance(end, ReturnOp)
    emitter.emit("ret void")
    return parameters


def lower_grid_kernel(kernel: GridKernel, declarations: dict[str, str]) -> str:
    """The text of one kernel and of its shared memory. Raises DiagnosticError for what GPUs cannot do."""
    total, most = shared_bytes(kernel), HOPPER_SHARED_BYTES if for_hopper(kernel) else MAX_SHARED_BYTES
    if total > most:
        message = f"@{kernel.name} wants {total} bytes of shared memory; a block has {most}"
        raise DiagnosticError(message, hint="take smaller tiles or fewer stages")
    emitter = GridEmitter(kernel, declarations)
    parameters = lower_body(kernel, emitter, written_buffers(kernel))
    lines, align = [], TILE_BYTES if for_hopper(kernel) else 16
    if dynamic_bytes(kernel):
        lines.append(f"{emitter.memory} = external addrspace(3) global [0 x i8], align {align}")
    elif total:
        lines.append(f"{emitter.memory} = internal addrspace(3) global [{total} x i8] undef, align {align}")
    bounds = f'"nvvm.maxntid"="{kernel.threads}" "nvvm.minctasm"="{kernel.blocks_at_once}"'
    lines += [f"define ptx_kernel void @{kernel.name}({', '.join(parameters)}) {bounds} {{", "entry:"]
    return "\n".join([*lines, *emitter.lines, "}", ""])
