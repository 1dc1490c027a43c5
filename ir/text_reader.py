"""Reading the words of the text form: types, number formats, layouts and attribute values, out of syntax nodes.

`TextReader` works on tokens (`ir.parse_value` reads a string on its own). Everything read from `<...>` is frozen, so
each distinct text is read once.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from typing import Any, cast, get_type_hints

from ir.attributes import ATTRIBUTES, Attribute, SymbolRef
from ir.formats import PLAIN_FORMATS, NumberFormat, PlainFormat, format_family, format_names, format_word
from ir.spelling import did_you_mean
from ir.syntax import ValueSyntax
from ir.types import (
    HANDLES,
    INDEX,
    KV_OPTIONS,
    BufferType,
    Dim,
    KVCacheType,
    Layout,
    ScalarType,
    SymbolicDim,
    TensorType,
    Type,
    VectorType,
)

MAX_NESTING = 32  # of lists in lists
_LIMIT = 2**63
_BUFFER_SPACES = ("global", "shared", "private")


class TextFault(Exception):
    """Text that means nothing. `start` and `end` are offsets into the text that was read."""

    def __init__(self, message: str, start: int = 0, end: int = 0) -> None:
        super().__init__(message)
        self.message, self.start, self.end = message, start, end


BracketParser = Callable[[str], ValueSyntax]


class TextReader:
    """Reads tokens. `parse_brackets` turns the text of one BRACKETED token into its syntax node."""

    def __init__(self, parse_brackets: BracketParser) -> None:
        self.parse_brackets = parse_brackets
        self.known: dict[str, Any] = {}

    def type(self, text: str) -> Type:
        """The type that `text` names."""
        found = self.bracketed_or_word(text)
        if isinstance(found, PlainFormat):
            return _SCALARS[found]
        if isinstance(found, Type):
            return found
        raise TextFault(f"expected a type, got {text}", 0, len(text))

    def bracketed_or_word(self, text: str) -> Any:
        """What `text`, a name or `name<...>`, stands for: a Type, NumberFormat, Layout or Attribute."""
        found = self.known.get(text)
        if found is None:
            text = str(text)  # a token would keep its whole file alive
            if "<" in text:
                found = self.build(self.parse_brackets(text), text.startswith("#"))
            elif text == "index":
                found = INDEX
            elif text in HANDLES:
                found = HANDLES[text]
            elif format_word(text) is not None:
                found = format_word(text)
            else:
                names = [*format_names(), "index", *HANDLES, *_BUILDERS]
                raise TextFault(f"unknown type {text!r}{did_you_mean(text, names)}", 0, len(text))
            if len(self.known) > 10_000:
                self.known.clear()
            self.known[text] = found
        return found

    def build(self, node: ValueSyntax, is_attribute: bool = False) -> Any:
        """What a `bracketed` node stands for."""
        name = str(node.token)
        if is_attribute:
            return self.structured(node)
        if name in _BUILDERS:
            return _BUILDERS[name](self, node)
        family = format_family(name)
        if family is None:
            hint = did_you_mean(name, [*_BUILDERS, *format_names()])
            raise _fault(node.token, f"unknown type or format {name!r}{hint}")
        fields = {field: str(value.token) for field, value in self.named(node).items()}
        try:
            return family.read(name, fields)
        except ValueError as error:
            raise _fault(node.token, str(error)) from error

    # -- types -------------------------------------------------------------------------------------------------------

    def shape_and_format(self, node: ValueSyntax) -> tuple[tuple[Dim, ...], NumberFormat]:
        """`4 x tokens x f32` of the first item of a node."""
        if not node.items:
            raise _fault(node.token, f"expected sizes and a format in {node.token}<...>, got nothing")
        first = node.items[0]
        factors = first.items if first.kind == "product" else (first,)
        return tuple(map(self.dim, factors[:-1])), self.number_format(factors[-1])

    def dim(self, node: ValueSyntax) -> Dim:
        if node.kind == "integer":
            size = integer(node)
            if size < 0:
                raise _fault(node.token, f"expected a size of 0 or more, got {size}")
            return size
        if node.kind in ("word", "scaled"):
            name = str(node.token)
            if format_word(name) is not None:
                raise _fault(node.token, f"expected a size, got the format {name}; the format stands last")
            return scaled(node)
        raise _fault(node.token, "expected a size: a number, a symbol like tokens, or tokens*2")

    def number_format(self, node: ValueSyntax) -> NumberFormat:
        text = str(node.token)
        word = format_word(text) if node.kind == "word" else None
        if word is not None:
            return word
        if node.kind == "bracketed":
            found = self.build(node)
            if isinstance(found, NumberFormat):
                return found
        names = format_names()
        what = f"a number format, got {text!r}" if node.kind != "integer" else f"a number format last, got {text}"
        raise _fault(node.token, f"expected {what}{did_you_mean(text, names)}")

    def plain_format(self, node: ValueSyntax) -> PlainFormat:
        found = self.number_format(node)
        if not isinstance(found, PlainFormat):
            raise _fault(node.token, f"expected a plain number format here, got {found}")
        return found

    def tensor(self, node: ValueSyntax) -> TensorType:
        shape, element = self.shape_and_format(node)
        layout = None
        if len(node.items) > 1:
            layout = self.build(node.items[1]) if node.items[1].kind == "bracketed" else None
            if not isinstance(layout, Layout) or len(node.items) > 2:
                raise _fault(node.items[-1].token or node.token, "expected a layout like strips<rows=64, pack=2>")
        return TensorType(shape, element, layout)

    def kv(self, node: ValueSyntax) -> KVCacheType:
        shape, element = self.shape_and_format(node)
        if len(shape) != 2 or not all(isinstance(d, int) for d in shape):
            raise _fault(node.token, "expected kv<heads x width x format>, like kv<4 x 64 x bf16>")
        options: dict[str, int] = {}
        for item in node.items[1:]:
            name = str(item.token)
            if item.kind != "named" or name not in KV_OPTIONS or name in options:
                raise _fault(item.token or node.token, f"expected one each of {', '.join(KV_OPTIONS)}, like rotate=64")
            value = self.plain(item.items[0])
            if type(value) is not int or value < 0:
                raise _fault(item.token or node.token, f"expected {name} to be a number of 0 or more")
            options[name] = value
        heads, width = shape
        made = KVCacheType(cast("int", heads), cast("int", width), element, **options)
        if made.fault:
            raise _fault(node.token, made.fault)
        return made

    def vector(self, node: ValueSyntax) -> VectorType:
        shape, element = self.shape_and_format(node)
        if len(node.items) != 1 or len(shape) != 1 or not isinstance(shape[0], int):
            raise _fault(node.token, "expected vector<lanes x format>, like vector<16 x f32>")
        return VectorType(shape[0], element)

    def buffer(self, node: ValueSyntax) -> BufferType:
        shape, element = self.shape_and_format(node)
        if shape or len(node.items) > 2:
            raise _fault(node.token, "expected buffer<format> or buffer<format, private>")
        token = node.items[1].token if len(node.items) == 2 else None
        space = "global" if len(node.items) < 2 else str(token)
        if space not in _BUFFER_SPACES:
            raise _fault(token or node.token, f"expected global, shared or private memory, got {space}")
        return BufferType(element, space)

    def strips(self, node: ValueSyntax) -> Layout:
        fields = {name: self.plain(value) for name, value in self.named(node).items()}
        known = [field.name for field in dataclasses.fields(Layout)]
        for name, value in fields.items():
            if name not in known:
                raise _fault(node.token, f"strips has no field {name!r}{did_you_mean(name, known)}")
            if type(value) is not int or value < 1:
                raise _fault(node.token, f"expected {name} of strips to be a number of 1 or more")
        if "rows" not in fields:
            raise _fault(node.token, "strips needs rows, like strips<rows=64, pack=2>")
        return Layout(**cast("dict[str, int]", fields))

    # -- attribute values --------------------------------------------------------------------------------------------

    def named(self, node: ValueSyntax) -> dict[str, ValueSyntax]:
        """The `name=value` items of a node, all of which must be such."""
        fields: dict[str, ValueSyntax] = {}
        for item in node.items:
            if item.kind != "named":
                raise _fault(item.token or node.token, f"expected name=value in {node.token}<...>")
            name = str(item.token)
            if name in fields:
                raise _fault(item.token, f"{name} is given twice")
            fields[name] = item.items[0]
        return fields

    def structured(self, node: ValueSyntax) -> Attribute:
        """`#mnemonic<field = value, ...>`"""
        mnemonic = str(node.token)
        kind = ATTRIBUTES.get(mnemonic)
        if kind is None:
            raise _fault(node.token, f"unknown attribute #{mnemonic}{did_you_mean(mnemonic, ATTRIBUTES)}")
        hints = _field_types(kind)
        given: dict[str, Any] = {}
        for name, syntax in self.named(node).items():
            if name not in hints:
                hint = did_you_mean(name, hints)
                raise _fault(syntax.token or node.token, f"#{mnemonic} has no field {name!r}{hint}")
            value = self.plain(syntax)
            if hints[name] is float and type(value) is int:
                value = float(value)
            if type(value) is not hints[name]:
                wanted = hints[name].__name__
                raise _fault(syntax.token or node.token, f"expected {name} of #{mnemonic} to be of type {wanted}")
            given[name] = value
        for field in dataclasses.fields(kind):
            if field.default is dataclasses.MISSING and field.name not in given:
                raise _fault(node.token, f"#{mnemonic} needs the field {field.name}")
        return kind(**given)

    def attribute(self, node: ValueSyntax, wanted: tuple[type, ...], depth: int = 0) -> Any:
        """The value of an attribute whose field takes the types `wanted`; a number fits a field of floats."""
        if node.kind == "array":
            if depth > MAX_NESTING:
                raise TextFault(f"lists are nested more than {MAX_NESTING} deep")
            return tuple(self.attribute(item, (), depth + 1) for item in node.items)
        if node.kind == "word" and any(issubclass(w, Type) for w in wanted):
            return self.type(str(node.token))
        value = self.plain(node)
        return float(value) if type(value) is int and float in wanted and int not in wanted else value

    def plain(self, node: ValueSyntax) -> Any:
        """The value of a node without knowing what is wanted: a bare word is a format or a symbolic size."""
        text = str(node.token)
        match node.kind:
            case "integer":
                return integer(node)
            case "number":
                return number(node)
            case "string":
                return unquoted(node.token, text)
            case "symbol":
                return SymbolRef(unquoted(node.token, text[1:]) if text[1] == '"' else text[1:])
            case "word":
                return _WORDS[text] if text in _WORDS else format_word(text) or SymbolicDim(text)
            case "scaled":
                return scaled(node)
            case "nested":
                return self.bracketed_or_word(text)
            case "bracketed":
                return self.build(node)
            case "array":
                return tuple(map(self.plain, node.items))
        raise _fault(node.token, "expected a value")


_WORDS = {"true": True, "false": False, "inf": float("inf"), "nan": float("nan")}
_SCALARS = {f: ScalarType(f) for f in PLAIN_FORMATS.values()}
_BUILDERS: dict[str, Callable[[TextReader, ValueSyntax], Any]] = {
    "tensor": TextReader.tensor,
    "kv": TextReader.kv,
    "vector": TextReader.vector,
    "buffer": TextReader.buffer,
    "strips": TextReader.strips,
}


def _fault(token: Any, message: str) -> TextFault:
    """A fault at a token of the text that is being read."""
    return TextFault(message, token.start_pos or 0, token.end_pos or 0) if token is not None else TextFault(message)


@functools.cache
def _field_types(kind: type[Attribute]) -> dict[str, type]:
    hints = get_type_hints(kind)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind)}


def integer(node: ValueSyntax) -> int:
    """The number of an `integer` node, which must fit 64 bits."""
    text = str(node.token)
    if len(text) > 20 or not -_LIMIT <= int(text) < _LIMIT:
        raise _fault(node.token, "expected an integer of at most 64 bits")
    return int(text)


def number(node: ValueSyntax) -> float:
    """The number of a `number` node, which must be finite unless it is written as inf."""
    text = str(node.token)
    value = float(text)
    if value in (float("inf"), -float("inf")) and text != "-inf":
        raise _fault(node.token, "expected a number in the range of f64")
    return value


def scaled(node: ValueSyntax) -> SymbolicDim:
    """`tokens` or `tokens*2`"""
    if not node.items:
        return SymbolicDim(str(node.token))
    factor = node.items[0]
    text = str(factor)
    if len(text) > 18 or int(text) < 1:
        raise _fault(factor, f"expected a factor of 1 or more, got {text[:18]}")
    return SymbolicDim(str(node.token), int(text))


def unquoted(token: Any, text: str) -> str:
    """The string that a literal stands for."""
    try:
        return json.loads(text, strict=False)
    except ValueError as error:
        raise _fault(token, 'expected the escapes of JSON in a string: \\n, \\", \\\\, \\u0041') from error
