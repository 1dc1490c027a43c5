"""builtin.* and func.*: the module, its functions, and the end of a function. The same at every level of the IR."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ir.core import Block, BlockArgument, Region
from ir.core import Op as CoreOp
from ir.diagnostics import Diagnostic, DiagnosticError, DiagnosticSink
from ir.op_def import Op, attr, operand, region, register_op
from ir.spelling import did_you_mean
from ir.traits import IsolatedFromAbove, NoTerminator, Terminator
from ir.types import Type


@register_op
class ModuleOp(Op):
    """The whole of one text file: top-level ops, functions as a rule. Printed as its contents, without a frame.

    Example:
        builtin.module ({
          func @main() {
            return
          }
        }) : () -> ()
    """

    name = "builtin.module"
    traits = (IsolatedFromAbove, NoTerminator)
    body = region("top-level ops")

    @classmethod
    def create(cls, *ops: CoreOp) -> ModuleOp:
        """A module that holds `ops`."""
        module = cls(regions=[Region(Block())])
        for op in ops:
            module.append(op)
        return module

    @staticmethod
    def infer_types() -> tuple[Type, ...]:
        return ()

    @property
    def block(self) -> Block:
        return self.body.block

    @property
    def functions(self) -> tuple[FuncOp, ...]:
        """The functions at top level, in order."""
        return tuple(op for op in self.block.ops if isinstance(op, FuncOp))

    def append(self, op: CoreOp) -> None:
        """Puts `op`, which is in no block, at the end of the module."""
        self.block._insert(len(self.block.ops), op)

    def function(self, name: str) -> FuncOp:
        """The function of that name. Raises DiagnosticError naming the functions there are."""
        for func in self.functions:
            if func.sym_name == name:
                return func
        names = [func.sym_name for func in self.functions]
        listed = ", ".join(f"@{n}" for n in names) or "none"
        raise DiagnosticError(
            f"the module has no function @{name}{did_you_mean(name, names)}", expected=f"one of its functions: {listed}"
        )

    def verify(self, diag: DiagnosticSink) -> None:
        seen: dict[str, FuncOp] = {}
        for func in self.functions:
            first = seen.setdefault(func.sym_name, func)
            if first is not func:
                note = Diagnostic("note", "first defined here", first.location)
                diag.error(func.location, f"function @{func.sym_name} is defined twice", note)


@register_op
class FuncOp(Op):
    """A function. The arguments of its block are the inputs, the operands of its `func.return` the results.

    Its short form is `func @add(%a: tensor<4 x f32>) -> tensor<4 x f32> { ... return %y : tensor<4 x f32> }`.

    Example:
        func.func {sym_name = "main"} ({
          ^(%a: tensor<4 x f32>):
            func.return %a : (tensor<4 x f32>) -> ()
        }) : () -> ()
    """

    name = "func.func"
    traits = (IsolatedFromAbove,)
    sym_name = attr(str, "name of the function in its module")
    body = region("one block; its arguments are the inputs")

    @classmethod
    def create(cls, name: str, arg_types: Sequence[Type], arg_names: Sequence[str] = (), **kwargs: Any) -> FuncOp:
        """A function with an empty block; build its body with `Builder.at_end(func.block)`."""
        return cls(sym_name=name, regions=[Region(Block(arg_types, arg_names))], **kwargs)

    @staticmethod
    def infer_types(*, sym_name: str) -> tuple[Type, ...]:
        return ()

    @property
    def block(self) -> Block:
        return self.body.block

    @property
    def arguments(self) -> tuple[BlockArgument, ...]:
        return self.block.arguments

    @property
    def ops(self) -> Iterator[CoreOp]:
        """The ops of the body, the terminator included."""
        return iter(self.block.ops)

    @property
    def result_types(self) -> tuple[Type, ...]:
        """Types of what the function returns; empty while it has no `func.return`."""
        end = self.block.terminator
        return tuple(v.type for v in end.operands) if isinstance(end, ReturnOp) else ()

    def verify(self, diag: DiagnosticSink) -> None:
        if not self.sym_name:
            diag.error(self.location, f"'{self.name}' expected a name, got an empty one")
        if self.parent_op is not None and not isinstance(self.parent_op, ModuleOp):
            around = self.parent_op.name
            diag.error(self.location, f"'{self.name}' expected to be inside of builtin.module, is inside of {around}")
        end = self.block.terminator
        if end is not None and not isinstance(end, ReturnOp):
            diag.error(end.location, f"expected @{self.sym_name} to end in func.return, got {end.name}")


@register_op
class ReturnOp(Op):
    """Ends a function; its operands are what the function gives. Short form: `return %y : tensor<4 x f32>`.

    Example:
        func.return %y : (tensor<4 x f32>) -> ()
    """

    name = "func.return"
    traits = (Terminator,)
    values = operand("results of the function", variadic=True)

    @staticmethod
    def infer_types(*values: Type) -> tuple[Type, ...]:
        return ()

    @staticmethod
    def reference(*values: Any) -> tuple[()]:
        return ()

    def verify(self, diag: DiagnosticSink) -> None:
        if not isinstance(self.parent_op, FuncOp):
            around = self.parent_op.name if self.parent_op else "nothing"
            diag.error(self.location, f"'{self.name}' expected to be inside of func.func, is inside of {around}")
