"""Syntax nodes: what the grammar makes of text, before names mean anything. Tokens are
`lark.Token`s: strings that know their `line`, `column`, `start_pos` and `end_pos`.

The methods of `SyntaxBuilder` are named after the rules of `grammar.lark`; the parser calls them while it reads.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class ValueSyntax:
    """An attribute value, or an item inside of `<...>`.

    `kind`: integer, number, string, symbol, word, scaled (`tokens*2`), nested (a whole BRACKETED token), array,
    product (`4 x f32`), block (`128x128`), named (`rows=64`), bracketed (`strips<...>`). `token` is its first token,
    None for arrays.
    """

    kind: str
    token: Any
    items: tuple[Any, ...] = ()


@dataclass(slots=True)
class ParameterSyntax:
    """`%name: type`"""

    name: Any
    type: Any


@dataclass(slots=True)
class RegionSyntax:
    """`{ ^(parameters): ops }`"""

    parameters: list[ParameterSyntax]
    ops: list[OpSyntax | FuncSyntax]


@dataclass(slots=True)
class OpSyntax:
    """An op in the generic form, or `return` (then `name.type` is RETURN). Types are tokens."""

    name: Any
    targets: list[Any]
    operands: list[Any]
    attributes: list[tuple[Any, ValueSyntax]]
    regions: list[RegionSyntax]
    operand_types: list[Any]
    result_types: list[Any]
    origin: Any


@dataclass(slots=True)
class FuncSyntax:
    """`func @name(parameters) -> results { ops }`; `results` is None when there is no arrow."""

    name: Any
    parameters: list[ParameterSyntax]
    results: list[Any] | None
    ops: list[OpSyntax | FuncSyntax]
    origin: Any


class SyntaxBuilder:
    """Turns the children of each grammar rule into a node."""

    def _list(self, children: list[Any]) -> list[Any]:
        return children

    def _flattened(self, children: list[Any]) -> list[Any]:
        return children[0] if children else []

    module = parameters = targets = operands_given = regions = types_given = single_result = attributes = _list
    operands = types = results = block_head = _flattened

    def func(self, children: list[Any]) -> FuncSyntax:
        name, parameters, declared, *ops, origin = children
        return FuncSyntax(name, parameters, declared, ops, origin)

    def declared(self, children: list[Any]) -> list[Any] | None:
        return children[0] if children else None

    def parameter(self, children: list[Any]) -> ParameterSyntax:
        return ParameterSyntax(*children)

    def generic_op(self, children: list[Any]) -> OpSyntax:
        targets, name, operands, attributes, regions, types, results, origin = children
        return OpSyntax(name, targets, operands, attributes, regions, types, results, origin)

    def return_op(self, children: list[Any]) -> OpSyntax:
        name, (operands, types), origin = children
        return OpSyntax(name, [], operands, [], [], types, [], origin)

    def returned(self, children: list[Any]) -> tuple[list[Any], list[Any]]:
        return (children[0], children[1]) if children else ([], [])

    def region(self, children: list[Any]) -> RegionSyntax:
        parameters, *ops = children
        return RegionSyntax(parameters, ops)

    def type(self, children: list[Any]) -> Any:
        return children[0]

    def origin(self, children: list[Any]) -> Any:
        return children[0] if children else None

    def attribute(self, children: list[Any]) -> tuple[Any, ValueSyntax]:
        return children[0], children[1]

    def integer(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("integer", children[0])

    def number(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("number", children[0])

    def string(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("string", children[0])

    def symbol(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("symbol", children[0])

    def word(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("word", children[0])

    def block(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("block", children[0])

    def nested(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("nested", children[0])

    def scaled(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("scaled", children[0], (children[1],))

    def array(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("array", None, tuple(children))

    def product(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("product", children[0].token, tuple(children))

    def named(self, children: list[Any]) -> ValueSyntax:
        return ValueSyntax("named", children[0], (children[1],))

    def bracketed(self, children: list[Any]) -> ValueSyntax:
        name, *items = children
        return ValueSyntax("bracketed", name, tuple(items))
