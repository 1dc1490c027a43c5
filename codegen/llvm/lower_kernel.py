"""Tile IR -> LLVM IR text: a kernel becomes one function.

`define internal void @name(ptr..., i64..., i64 %tid, i64 %threads, ptr %team)`; what its ops become is in
`tile_lowerings` and `packed_lowerings`.
"""

from __future__ import annotations

import codegen.llvm.packed_lowerings
import codegen.llvm.tile_lowerings  # noqa: F401 - both register lowerings
from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lowering import FunctionEmitter, llvm_type
from ir.ops.builtin import FuncOp, ReturnOp
from ir.types import BufferType


def lower_kernel(func: FuncOp, instructions: InstructionSet, declarations: dict[str, str], attributes: str) -> str:
    """The text of one kernel. `attributes` is the attribute group reference, e.g. `#0`."""
    emitter = FunctionEmitter(instructions, declarations)
    block = func.region.block
    parameters = []
    for i, argument in enumerate(block.arguments):
        emitter.names[argument] = f"%a{i}"
        noalias = " noalias noundef" if isinstance(argument.type, BufferType) else ""
        parameters.append(f"{llvm_type(argument.type)}{noalias} %a{i}")
    parameters += ["i64 %tid", "i64 %threads", "ptr %team"]
    end = emitter.block(block)
    assert isinstance(end, ReturnOp)
    emitter.emit("ret void")
    body = "\n".join(emitter.lines)
    return f"define internal void @{func.sym_name}({', '.join(parameters)}) {attributes} {{\nentry:\n{body}\n}}\n"
