"""Printer: IR -> text that parses back to equal IR, always the same text for the same IR.

    %a, %b = family.op %x, %y {attribute = value} ({
      ^(%p: T):
        ...
    }) : (T1, T2) -> (R1, R2) from "layers.0.mlp"

Values are named by their hints, made distinct by `_1`, `_2`; values without a hint are numbered. The regions of an op
that is isolated from above have names of their own. Attributes come in declared order and only when they differ from
their default. Functions have the short form `func @name(...) -> T { ... return %y : T }`. `from "..."` is the origin.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from ir.attributes import Attribute, SymbolRef, quoted
from ir.core import Block, Op, Value
from ir.formats import NumberFormat
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.traits import IsolatedFromAbove, has_trait
from ir.types import Layout, SymbolicDim, Type

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*", re.ASCII)
_NUMBERED = re.compile(r"(.+)_\d+", re.ASCII)


def print_module(op: Op) -> str:
    """The text of a module (or of any other op on its own), ended by a newline."""
    printer = _Printer()
    if isinstance(op, ModuleOp) and len(op.regions) == 1 and len(op.regions[0].blocks) == 1:
        for index, inner in enumerate(op.block.ops):
            if index and (isinstance(inner, FuncOp) or isinstance(op.block.ops[index - 1], FuncOp)):
                printer.lines.append("")
            printer.print_op(inner, "")
    else:
        printer.print_op(op, "")
    return "\n".join(printer.lines) + "\n"


def print_op(op: Op) -> str:
    """The text of one op with its regions, without a newline at the end; its operands have the names they would have
    in the text of the function around it.
    """
    printer = _Printer()
    printer.names = name_values(_outermost(op))
    printer.lines.clear()
    printer.print_op(op, "")
    return "\n".join(printer.lines)


def op_head(op: Op, names: dict[Value, str]) -> str:
    """One line for `op`, its regions shortened to `({...})`. `names` comes from `name_values`."""
    printer = _Printer(lenient=True)
    printer.names = names
    head, tail = printer.head_and_tail(op)
    regions = f" ({', '.join(['{...}'] * len(op.regions))})" if op.regions else ""
    return head + regions + tail


def name_values(root: Op) -> dict[Value, str]:
    """The name of every value inside `root` as the printer chooses it; the IR may be wrong in any way."""
    printer = _Printer(lenient=True)
    printer.print_op(root, "")
    return printer.names


def _outermost(op: Op) -> Op:
    while op.parent_op is not None and not isinstance(op, FuncOp):
        op = op.parent_op
    return op


def print_attribute(value: Any) -> str:
    """The text of an attribute value. Raises TypeError for a value that is no attribute."""
    kind = type(value)
    if kind is str:
        return quoted(value)
    if kind is bool:
        return "true" if value else "false"
    if kind is int:
        return str(value)
    if kind is float:
        return repr(value)  # the shortest text that reads back exactly; inf and nan are words
    if kind is tuple:
        return "[" + ", ".join(map(print_attribute, value)) + "]"
    if isinstance(value, Attribute):
        return f"#{value.mnemonic}<{', '.join(_attribute_fields(value))}>"
    if isinstance(value, SymbolRef | NumberFormat | Type | Layout | SymbolicDim):
        return str(value)
    raise TypeError(f"{value!r} is no attribute")


@functools.cache
def _declared(kind: type) -> tuple[tuple[str, Any], ...]:
    return tuple((f.name, f.default) for f in dataclasses.fields(kind))


def _attribute_fields(value: Attribute) -> list[str]:
    texts = []
    for name, default in _declared(type(value)):
        given = getattr(value, name)
        if type(given) is not type(default) or given != default:
            texts.append(f"{name} = {print_attribute(given)}")
    return texts


class _Scope:
    """The names taken in one function, or in one region that is isolated from above."""

    __slots__ = ("next_number", "next_suffix", "used")

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.next_number = 0
        self.next_suffix: dict[str, int] = {}

    def choose(self, hint: str) -> str:
        if not hint or not _PLAIN_NAME.fullmatch(hint):
            name = str(self.next_number)
            self.next_number += 1
            return name
        if hint not in self.used:
            self.used.add(hint)
            return hint
        numbered = _NUMBERED.fullmatch(hint)
        stem = numbered[1] if numbered else hint
        number = self.next_suffix.get(stem, 1)
        while f"{stem}_{number}" in self.used:
            number += 1
        self.next_suffix[stem] = number + 1
        name = f"{stem}_{number}"
        self.used.add(name)
        return name


class _Printer:
    """`lenient` prints what is no attribute as Python would, for diagnostics about it."""

    def __init__(self, lenient: bool = False) -> None:
        self.attribute = attribute_text if lenient else print_attribute
        self.lines: list[str] = []
        self.names: dict[Value, str] = {}
        self.scope = _Scope()
        self.type_texts: dict[Type, str] = {}

    def define(self, values: Sequence[Value]) -> None:
        for value in values:
            if value not in self.names:
                self.names[value] = "%" + self.scope.choose(value.name_hint)

    def types(self, values: Sequence[Value]) -> str:
        texts = self.type_texts
        found = []
        for value in values:
            text = texts.get(value.type)
            if text is None:
                text = texts[value.type] = str(value.type)
            found.append(text)
        return ", ".join(found)

    def operands(self, op: Op) -> str:
        names = self.names
        return ", ".join([names.get(v, "%<undefined>") for v in op._operands])

    def print_op(self, op: Op, indent: str) -> None:
        if isinstance(op, FuncOp) and len(op.regions) == 1 and len(op.regions[0].blocks) == 1:
            self.print_func(op, indent)
            return
        self.define(op.results)
        head, tail = self.head_and_tail(op)
        if not op.regions:
            self.lines.append(indent + head + tail)
            return
        outer = self.scope
        for index, region in enumerate(op.regions):
            if has_trait(op, IsolatedFromAbove):
                self.scope = _Scope()
            self.lines.append(indent + (head + " ({" if index == 0 else "}, {"))
            for block in region.blocks:
                self.print_block(block, indent)
        self.scope = outer
        self.lines.append(indent + "})" + tail)

    def print_block(self, block: Block, indent: str) -> None:
        inside = indent + "  "
        if block.arguments:
            self.lines.append(f"{inside}^({self.parameters(block)}):")
            inside += "  "
        for op in block.ops:
            self.print_op(op, inside)

    def print_func(self, func: FuncOp, indent: str) -> None:
        outer, self.scope = self.scope, _Scope()
        block = func.regions[0].blocks[0]
        parameters = self.parameters(block)
        end = block.terminator
        results = self.results(end.operands) if isinstance(end, ReturnOp) and end.operands else ""
        arrow = f" -> {results}" if results else ""
        self.lines.append(f"{indent}func {SymbolRef(str(func.attributes.get('sym_name', '')))}({parameters}){arrow} {{")
        for op in block.ops:
            self.print_op(op, indent + "  ")
        self.lines.append(indent + "}" + _origin(func))
        self.scope = outer

    def parameters(self, block: Block) -> str:
        self.define(block.arguments)
        return ", ".join(f"{self.names[a]}: {self.types([a])}" for a in block.arguments)

    def results(self, values: Sequence[Value]) -> str:
        text = self.types(values)
        return text if len(values) == 1 else f"({text})"

    def head_and_tail(self, op: Op) -> tuple[str, str]:
        """What stands before the regions, and what stands behind them."""
        operands = self.operands(op)
        if isinstance(op, ReturnOp) and not op.results:
            types = f" {operands} : {self.types(op._operands)}" if operands else ""
            return f"return{types}", _origin(op)
        names = self.names
        made = ", ".join([names.get(r, "%<undefined>") for r in op.results])
        head = f"{made} = {op.name}" if made else op.name
        if operands:
            head = f"{head} {operands}"
        attributes = self.attributes(op)
        if attributes:
            head = f"{head} {{{attributes}}}"
        return head, f" : ({self.types(op._operands)}) -> {self.results(op.results)}{_origin(op)}"

    def attributes(self, op: Op) -> str:
        texts = []
        given = op.attributes
        defaults = _attribute_defaults(type(op))
        for name, default in defaults.items():
            if name in given:
                value = given[name]
                if type(value) is not type(default) or value != default:
                    texts.append(f"{name} = {self.attribute(value)}")
        texts += [f"{name} = {self.attribute(value)}" for name, value in given.items() if name not in defaults]
        return ", ".join(texts)


def attribute_text(value: Any) -> str:
    """The text of an attribute; what is none is shown as Python would."""
    try:
        return print_attribute(value)
    except TypeError:
        return repr(value)


@functools.cache
def _attribute_defaults(kind: type[Op]) -> dict[str, Any]:
    return {field.name: field.default for field in getattr(kind, "attr_fields", ())}


def _origin(op: Op) -> str:
    return f" from {quoted(op.location.origin)}" if op.location.origin else ""
