"""The IR: one SSA form for the graph, plan and tile level (see `ir.core`), with its text form and its meaning.

    module = ir.parse(text)            # text -> ModuleOp; DiagnosticError with carets for text that is wrong
    ir.verify(module)                  # DiagnosticError that lists every fault
    ir.print_module(module)            # text that parses back
    ir.interpret(module.function("step"), inputs, weights=weights, states=states)
    ir.structural_equal(a, b)          # None, or the first difference

Importing `ir` loads none of it; each name is loaded when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ir.builder import Builder, InsertionPoint
    from ir.core import Block, BlockArgument, Op, OpResult, Region, Value
    from ir.diagnostics import Diagnostic, DiagnosticError, DiagnosticSink
    from ir.equality import Difference, structural_equal
    from ir.interpreter import Environment, interpret
    from ir.kv_state import KVState
    from ir.location import Location
    from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
    from ir.parser import parse
    from ir.printer import print_module, print_op
    from ir.verifier import verify

_HOMES = {
    "Builder": "ir.builder",
    "InsertionPoint": "ir.builder",
    "Block": "ir.core",
    "BlockArgument": "ir.core",
    "Op": "ir.core",
    "OpResult": "ir.core",
    "Region": "ir.core",
    "Value": "ir.core",
    "Diagnostic": "ir.diagnostics",
    "DiagnosticError": "ir.diagnostics",
    "DiagnosticSink": "ir.diagnostics",
    "Difference": "ir.equality",
    "structural_equal": "ir.equality",
    "Environment": "ir.interpreter",
    "interpret": "ir.interpreter",
    "KVState": "ir.kv_state",
    "Location": "ir.location",
    "FuncOp": "ir.ops.builtin",
    "ModuleOp": "ir.ops.builtin",
    "ReturnOp": "ir.ops.builtin",
    "parse": "ir.parser",
    "print_module": "ir.printer",
    "print_op": "ir.printer",
    "verify": "ir.verifier",
}

__all__ = [
    "Block",
    "BlockArgument",
    "Builder",
    "Diagnostic",
    "DiagnosticError",
    "DiagnosticSink",
    "Difference",
    "Environment",
    "FuncOp",
    "InsertionPoint",
    "KVState",
    "Location",
    "ModuleOp",
    "Op",
    "OpResult",
    "Region",
    "ReturnOp",
    "Value",
    "interpret",
    "parse",
    "print_module",
    "print_op",
    "structural_equal",
    "verify",
]


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'ir' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value
