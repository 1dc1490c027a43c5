"""Parser: text -> ModuleOp. The inverse of `ir.printer`.

Two steps. `grammar.lark` (LALR) turns text into the syntax nodes of `ir.syntax`; then `ir.name_resolution` finds what
the names mean and builds the ops. The first fault ends the work: a DiagnosticError with the line and carets. The module
is built as it is written; whether it obeys the rules of the IR is up to `ir.verify`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lark
from lark.exceptions import UnexpectedCharacters, UnexpectedEOF, UnexpectedInput, UnexpectedToken

from ir.diagnostics import DiagnosticError
from ir.name_resolution import build_module
from ir.ops.builtin import ModuleOp
from ir.source import Source
from ir.syntax import SyntaxBuilder, ValueSyntax
from ir.syntax_errors import EXAMPLES, describe_terminals, with_longer_lists
from ir.text_reader import TextFault, TextReader

_GRAMMAR = Path(__file__).with_name("grammar.lark")


def parse(text: str, file: str = "") -> ModuleOp:
    """The module that `text` spells; `file` is named in diagnostics. Raises DiagnosticError."""
    source = Source(text, file)
    try:
        syntax: Any = _lark().parse(text, start="module")
    except UnexpectedInput as error:
        raise _diagnose(error, source) from None
    return build_module(syntax, source, shared_reader())


@functools.cache
def _lark() -> lark.Lark:
    """Built once in a process. Nodes are made while reading, so no tree is kept; tokens hold the positions."""
    import ir.ops as _all_ops  # every op must be registered before its name is met

    del _all_ops
    grammar = _GRAMMAR.read_text(encoding="utf-8")
    # lark calls the methods of any object that has the names of the rules
    builder: Any = SyntaxBuilder()
    return lark.Lark(grammar, parser="lalr", start=["module", "bracketed"], transformer=builder)


@functools.cache
def shared_reader() -> TextReader:
    """The reader that remembers types across files."""
    return TextReader(_parse_brackets)


def _parse_brackets(text: str) -> ValueSyntax:
    """The node of `name<...>`. Raises TextFault with offsets into `text`."""
    try:
        node: Any = _lark().parse(text, start="bracketed")
    except UnexpectedInput as error:
        start = _offset(error, text)
        shown = text[start : start + 12].strip() or "the end"
        raise TextFault(f"cannot read this at {shown!r}", start, start + 1) from None
    return node


def _offset(error: UnexpectedInput, text: str) -> int:
    if isinstance(error, UnexpectedEOF) or error.pos_in_stream is None or error.pos_in_stream < 0:
        return len(text)
    if isinstance(error, UnexpectedToken) and error.token.type == "$END":
        return len(text)
    return error.pos_in_stream


def _diagnose(error: UnexpectedInput, source: Source) -> DiagnosticError:
    """A named error for the slips people make, else what was expected and what was found."""
    start = _offset(error, source.text)
    length = 1
    found = "the end of the text" if start >= len(source.text) else repr(source.text[start])
    if isinstance(error, UnexpectedToken) and start < len(source.text):
        length = len(error.token)
        found = f"'{error.token}'"
    message = _known_slips().get(_situation(error))
    if message is None:
        message = f"expected {describe_terminals(_accepted(error))}, got {found}"
    return source.error(message, start, start + length)


def _situation(error: UnexpectedInput) -> tuple[Any, str]:
    """The state of the parser and what it met there. Unlike lark's `match_examples`, this is blind to how deep regions
    are nested around.
    """
    state: Any = error.state
    position = getattr(state, "position", state)
    if isinstance(error, UnexpectedToken):
        return position, error.token.type
    if isinstance(error, UnexpectedCharacters):
        return position, f"character {error.char}"
    return position, "$END"


@functools.cache
def _known_slips() -> dict[tuple[Any, str], str]:
    """The messages of `syntax_errors.EXAMPLES` by situation; made when the first error is met."""
    table: dict[tuple[Any, str], str] = {}
    for message, examples in EXAMPLES.items():
        for example in itertools.chain.from_iterable(map(with_longer_lists, examples)):
            try:
                _lark().parse(example, start="module")
            except UnexpectedInput as error:
                table.setdefault(_situation(error), message)
    return table


def _accepted(error: UnexpectedInput) -> Iterator[str]:
    """Names of the terminals that could stand where the error is."""
    if isinstance(error, UnexpectedToken):
        yield from sorted(error.accepts or error.expected)
    elif isinstance(error, UnexpectedCharacters):
        yield from sorted(error.allowed or ())
