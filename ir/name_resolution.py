"""Second step of parsing: what the names mean. Syntax nodes -> ops.

Refuses here, at the token concerned: values that are redefined, undefined, used before their definition or declared
with another type than they have; unknown ops, attributes and types; attributes that are missing or of a wrong kind;
wrong numbers of results and types; functions whose declared results are not what they return.

A region of an op that is isolated from above has names of its own.
"""

from __future__ import annotations

import re
from typing import Any

from ir.core import Block, Op, Region, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location
from ir.op_def import OPS, Field
from ir.op_def import Op as DeclaredOp
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.printer import attribute_text
from ir.source import Source
from ir.spelling import did_you_mean
from ir.syntax import FuncSyntax, OpSyntax, ParameterSyntax, RegionSyntax
from ir.text_reader import TextFault, TextReader, unquoted
from ir.traits import IsolatedFromAbove
from ir.types import Type
from ir.verifier import attribute_fits, type_words

MAX_REGION_DEPTH = 64
_NUMBER = re.compile(r"[0-9.]")


def build_module(syntax: list[OpSyntax | FuncSyntax], source: Source, reader: TextReader) -> ModuleOp:
    """The module that the top-level nodes spell. Raises DiagnosticError at the first fault."""
    module = ModuleOp.create()
    _Resolver(source, reader).fill(module.block, syntax, 0)
    module.location = Location(file=source.file)
    return module


class _Scope:
    """Names that are visible. `defined` maps a name to its value and the token that defined it."""

    def __init__(self) -> None:
        self.defined: dict[str, tuple[Value, Any]] = {}
        self.later: list[list[OpSyntax | FuncSyntax]] = []  # ops around this point, to recognise early uses


class _Resolver:
    def __init__(self, source: Source, reader: TextReader) -> None:
        self.source = source
        self.reader = reader
        self.scope = _Scope()

    def fill(self, block: Block, nodes: list[OpSyntax | FuncSyntax], depth: int) -> None:
        """Builds the ops of a block, in order."""
        self.scope.later.append(nodes)
        for node in nodes:
            op = self.function(node, depth) if isinstance(node, FuncSyntax) else self.op(node, depth)
            op.parent = block
            block.ops.append(op)
        self.scope.later.pop()

    # -- functions ---------------------------------------------------------------------------------------------------

    def function(self, node: FuncSyntax, depth: int) -> Op:
        outer, self.scope = self.scope, _Scope()
        block = self.block(node.parameters)
        self.fill(block, node.ops, self.deeper(depth, node.name))
        self.scope = outer
        symbol = str(node.name)[1:]
        name = unquoted_token(self.source, node.name, symbol) if symbol.startswith('"') else symbol
        location = self.source.of(node.name, self.origin(node.origin))
        func = FuncOp(sym_name=name, regions=[Region(block)], location=location)
        self.check_declared_results(func, node)
        return func

    def check_declared_results(self, func: FuncOp, node: FuncSyntax) -> None:
        end = func.block.terminator
        if not isinstance(end, ReturnOp):
            return  # the verifier says so
        declared = tuple([self.type(token) for token in node.results or []])
        if declared != func.result_types:
            texts = ["(" + ", ".join(map(str, types)) + ")" for types in (declared, func.result_types)]
            note = Diagnostic("note", "returned here", end.location)
            raise self.source.error_at(
                node.name, f"function {node.name} declares results {texts[0]}, but returns {texts[1]}", note
            )

    # -- ops ---------------------------------------------------------------------------------------------------------

    def op(self, node: OpSyntax, depth: int) -> Op:
        source, token = self.source, node.name
        cls = ReturnOp if token.type == "RETURN" else OPS.get(token)
        if cls is None:
            raise source.error_at(token, f"unknown op '{token}'{did_you_mean(str(token), OPS)}")
        location = Location(
            self.origin(node.origin), source.file, token.line, token.column, len(token), self.line(token.line)
        )
        if len(node.operands) != len(node.operand_types):
            what = f"'{token}' has {len(node.operands)} operands, but {len(node.operand_types)} operand types"
            raise source.error_at(token, what)
        if len(node.targets) != len(node.result_types):
            what = f"'{token}' gives {len(node.result_types)} results, but {len(node.targets)} are named"
            raise source.error_at(node.targets[0] if node.targets else token, what)
        operands = [self.use(name, kind) for name, kind in zip(node.operands, node.operand_types, strict=True)]
        attributes = self.attributes(cls, node)
        regions = [self.region(cls, region, token, depth) for region in node.regions] if node.regions else ()
        result_types = [self.type(kind) for kind in node.result_types]
        op = cls.__new__(cls)
        Op.__init__(op, operands, result_types, attributes, regions, location)  # as written: no inference here
        for name, result in zip(node.targets, op.results, strict=True):
            self.define(name, result)
        return op

    def line(self, number: int) -> str:
        text = self.source.lines[number - 1]
        return text.replace("\t", " ") if "\t" in text else text

    def region(self, cls: type[DeclaredOp], node: RegionSyntax, token: Any, depth: int) -> Region:
        outer = self.scope
        if IsolatedFromAbove in cls.traits:
            self.scope = _Scope()
        else:
            self.scope = _Scope()
            self.scope.defined = dict(outer.defined)
            self.scope.later = list(outer.later)
        block = self.block(node.parameters)
        self.fill(block, node.ops, self.deeper(depth, token))
        self.scope = outer
        return Region(block)

    def deeper(self, depth: int, token: Any) -> int:
        if depth >= MAX_REGION_DEPTH:
            raise self.source.error_at(token, f"regions are nested more than {MAX_REGION_DEPTH} deep")
        return depth + 1

    def block(self, parameters: list[ParameterSyntax]) -> Block:
        block = Block([self.type(p.type) for p in parameters])
        for parameter, argument in zip(parameters, block.arguments, strict=True):
            self.define(parameter.name, argument)
        return block

    def origin(self, token: Any) -> str:
        return unquoted_token(self.source, token, str(token)) if token is not None else ""

    # -- values ------------------------------------------------------------------------------------------------------

    def define(self, token: Any, value: Value) -> None:
        first = self.scope.defined.get(token)
        if first is not None:
            note = Diagnostic("note", "first defined here", self.source.of(first[1]))
            raise self.source.error_at(token, f"{token} is defined twice", note)
        self.scope.defined[token] = (value, token)
        name = token[1:]
        value.name_hint = "" if _NUMBER.match(name) else str(name)

    def use(self, token: Any, type_token: Any) -> Value:
        found = self.scope.defined.get(token)
        if found is None:
            raise self.undefined(token)
        value, definition = found
        declared = self.type(type_token)
        if declared is not value.type and declared != value.type:
            note = Diagnostic("note", f"{token} defined here", self.source.of(definition))
            raise self.source.error_at(
                type_token, f"expected {value.type}, which is the type of {token}, got {declared}", note
            )
        return value

    def undefined(self, token: Any) -> DiagnosticError:
        for nodes in self.scope.later:
            for node in nodes:
                for target in node.targets if isinstance(node, OpSyntax) else ():
                    if target == token:
                        note = Diagnostic("note", "defined here", self.source.of(target))
                        return self.source.error_at(token, f"{token} is used before it is defined", note)
        hint = did_you_mean(str(token), map(str, self.scope.defined))
        return self.source.error_at(token, f"{token} is not defined here{hint}")

    def type(self, token: Any) -> Type:
        try:
            return self.reader.type(token)
        except TextFault as fault:
            raise self.fault(token, fault) from fault

    def fault(self, token: Any, fault: TextFault) -> DiagnosticError:
        start = token.start_pos + fault.start
        return self.source.error(fault.message, start, token.start_pos + max(fault.end, fault.start + 1))

    # -- attributes --------------------------------------------------------------------------------------------------

    def attributes(self, cls: type[DeclaredOp], node: OpSyntax) -> dict[str, Any]:
        fields = {field.name: field for field in cls.attr_fields}
        given: dict[str, Any] = {}
        for name, syntax in node.attributes:
            field = fields.get(name)
            if field is None:
                known = f"; it has {', '.join(fields)}" if fields else ""
                message = f"'{cls.name}' has no attribute '{name}'{did_you_mean(str(name), fields) or known}"
                raise self.source.error_at(name, message)
            if name in given:
                raise self.source.error_at(name, f"attribute '{name}' is given twice")
            given[str(name)] = self.attribute(cls, field, name, syntax)
        attributes: dict[str, Any] = {}
        for field in cls.attr_fields:
            if field.name in given:
                attributes[field.name] = given[field.name]
            elif not field.required:
                attributes[field.name] = field.default
            else:
                message = f"'{cls.name}' needs the attribute '{field.name}' ({field.doc})"
                raise self.source.error_at(node.name, message)
        return attributes

    def attribute(self, cls: type[DeclaredOp], field: Field, name: Any, syntax: Any) -> Any:
        at = syntax.token if syntax.token is not None else name
        wanted = field.type if isinstance(field.type, tuple) else (field.type,)
        try:
            value = self.reader.attribute(syntax, wanted)
        except TextFault as fault:
            if syntax.kind == "nested":
                raise self.fault(at, fault) from fault  # offsets count from the start of the token
            raise self.source.error_at(at, fault.message) from fault
        if not attribute_fits(field, value):
            message = f"'{cls.name}' expected {type_words(field)} as '{field.name}', got {attribute_text(value)}"
            raise self.source.error_at(at, message)
        return value


def unquoted_token(source: Source, token: Any, text: str) -> str:
    """The string that a quoted token stands for."""
    try:
        return unquoted(token, text)
    except TextFault as fault:
        raise source.error_at(token, fault.message) from fault
