"""Pipelines as text: `canonicalize,set-precision{weights=bf16 kv=bf16},cse`.

    pipeline := [pass {"," pass}]        pass := NAME ["{" {option} "}"]        option := KEY ["=" value {"," value}]

Commas separate passes, blanks separate options; blanks and line ends elsewhere do not matter. A value is a word or a
quoted string; `true`/`false` for flags (a bare KEY means true), several values by commas where the field is a tuple.
Keys are the field names of the pass with `-` for `_`. `parse_pipeline(print_pipeline(p)) == p`.

Refuses unknown passes and options (naming near ones) and values that are not of the field's type, with a caret under
the fault.
"""

from __future__ import annotations

import dataclasses
import re
import types
import typing
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from ir.diagnostics import Diagnostic, DiagnosticError
from ir.location import Location
from ir.spelling import did_you_mean
from passes.option_text import option_key
from passes.pass_base import Pass, find_pass, load_failures, registered_passes

_TOKEN = re.compile(r'\s*(?:(?P<punct>[{}=,])|"(?P<string>(?:[^"\\]|\\.)*)"|(?P<word>[^\s{}=,"]+)|(?P<bad>"))')
_BLANKS = "blanks separate options, commas separate the values of one"


@dataclass(frozen=True)
class _Token:
    kind: str  # "punct" | "string" | "word" | "end"
    text: str
    start: int
    end: int


def parse_pipeline(text: str, where: str = "pipeline") -> tuple[Pass, ...]:
    """The passes that `text` names, options filled in. Raises DiagnosticError; `where` names the text in it."""
    return _Reader(text, where).pipeline()


def print_pipeline(passes: Iterable[Pass]) -> str:
    """The text form; options at their defaults are left out."""
    return ",".join(map(str, passes))


class _Reader:
    """Reads one pipeline text; every error carries the line and column of its token."""

    def __init__(self, text: str, where: str) -> None:
        self.text, self.where = text, where
        self.tokens = self._tokens()
        self.at = 0

    def _tokens(self) -> list[_Token]:
        found, at = [], 0
        end = len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            assert match is not None and match.lastgroup is not None  # every character is one of the alternatives
            kind, at = match.lastgroup, match.end()
            token = _Token(kind, match.group(kind), match.start(kind), match.end(kind))
            if kind == "bad":
                raise self.error(token, "the string is not closed")
            if kind == "string":
                token = dataclasses.replace(token, text=re.sub(r"\\(.)", r"\1", token.text))
            found.append(token)
        found.append(_Token("end", "", end, end + 1))
        return found

    def error(self, token: _Token, message: str, *notes: str) -> DiagnosticError:
        line = self.text.count("\n", 0, token.start) + 1
        line_start = self.text.rfind("\n", 0, token.start) + 1
        source = self.text[line_start:].split("\n", 1)[0]
        location = Location("", self.where, line, token.start - line_start + 1, token.end - token.start, source)
        return DiagnosticError.of(
            Diagnostic("error", message, location, tuple(Diagnostic("note", note) for note in notes))
        )

    def next(self) -> _Token:
        token = self.tokens[self.at]
        self.at = min(self.at + 1, len(self.tokens) - 1)
        return token

    def accept(self, punct: str) -> bool:
        token = self.tokens[self.at]
        if token.kind == "punct" and token.text == punct:
            self.at += 1
            return True
        return False

    def pipeline(self) -> tuple[Pass, ...]:
        if self.tokens[0].kind == "end":
            return ()
        found = [self.one_pass()]
        while self.accept(","):
            found.append(self.one_pass())
        token = self.next()
        if token.kind != "end":
            raise self.error(token, f"expected ',' between passes, got {token.text!r}")
        return tuple(found)

    def one_pass(self) -> Pass:
        token = self.next()
        if token.kind != "word":
            raise self.error(token, f"expected the name of a pass, got {token.text or 'the end'!r}")
        cls = find_pass(token.text)
        if cls is None:
            known = list(registered_passes())
            message = f"unknown pass {token.text!r}{did_you_mean(token.text, known)}"
            broken = [f"pass {name!r} cannot be loaded: {why}" for name, (_, why) in load_failures.items()]
            raise self.error(token, message, "known: " + ", ".join(known), *broken)
        given: dict[str, Any] = {}
        if self.accept("{"):
            while not self.accept("}"):
                self.option(cls, given)
        try:
            return cls(**given)
        except ValueError as error:  # a pass may check its options when it is made
            raise self.error(token, f"pass {cls.name!r}: {error}") from error

    def option(self, cls: type[Pass], given: dict[str, Any]) -> None:
        token = self.next()
        if token.kind == "end":
            raise self.error(token, f"the options of {cls.name!r} are not closed by '}}'")
        if token.kind != "word":
            raise self.error(token, f"expected an option of {cls.name!r}, got {token.text!r}", _BLANKS)
        fields = {option_key(f.name): f for f in dataclasses.fields(cls)}
        field = fields.get(token.text.replace("_", "-"))
        if field is None:
            has = "its options: " + ", ".join(fields) if fields else "it has no options"
            message = f"pass {cls.name!r} has no option {token.text!r}{did_you_mean(token.text, list(fields))}"
            raise self.error(token, message, has)
        if field.name in given:
            raise self.error(token, f"option {token.text!r} is given twice")
        hint = typing.get_type_hints(cls)[field.name]
        if not self.accept("="):
            if hint is not bool:
                raise self.error(token, f"option {token.text!r} needs a value: {token.text}={_describe(hint)}")
            given[field.name] = True
            return
        values = [self.value()]
        while self.accept(","):
            values.append(self.value())
        given[field.name] = self.convert(token.text, hint, values)

    def value(self) -> _Token:
        token = self.next()
        if token.kind not in ("word", "string"):
            raise self.error(token, f"expected a value, got {token.text or 'the end'!r}")
        following = self.tokens[self.at]
        if self.at >= 2 and self.tokens[self.at - 2].text == "," and (following.kind, following.text) == ("punct", "="):
            raise self.error(token, f"expected a value, got option {token.text!r}", _BLANKS)
        return token

    def convert(self, key: str, hint: Any, values: list[_Token]) -> Any:
        if typing.get_origin(hint) is tuple:
            item = typing.get_args(hint)[0]
            if len(values) == 1 and values[0].kind == "word" and values[0].text == "()":
                return ()
            return tuple(self.convert(key, item, [v]) for v in values)
        if len(values) > 1:
            raise self.error(values[1], f"option {key!r} takes one value")
        token = values[0]
        try:
            return _convert(hint, token.text, token.kind == "string")
        except ValueError as error:
            choices = [str(a) for a in typing.get_args(hint)] if typing.get_origin(hint) is Literal else []
            message = f"option {key!r} takes {_describe(hint)}, got {token.text!r}{did_you_mean(token.text, choices)}"
            raise self.error(token, message) from error


def _convert(hint: Any, text: str, quoted: bool) -> Any:
    """`text` as a value of type `hint`; ValueError when it is none."""
    origin = typing.get_origin(hint)
    if origin is Literal:
        for choice in typing.get_args(hint):
            if text == str(choice):
                return choice
        raise ValueError(text)
    if origin in (typing.Union, types.UnionType):
        options = [a for a in typing.get_args(hint) if a is not type(None)]
        if len(options) < len(typing.get_args(hint)) and text == "none" and not quoted:
            return None
        return _convert(options[0], text, quoted)
    if hint is bool:
        if text not in ("true", "false"):
            raise ValueError(text)
        return text == "true"
    if hint in (int, float, str):
        return hint(text)
    raise TypeError(f"options of type {hint} have no text form")


def _describe(hint: Any) -> str:
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(str(a) for a in typing.get_args(hint))
    if origin is tuple:
        return f"values by commas, each {_describe(typing.get_args(hint)[0])}"
    if origin in (typing.Union, types.UnionType):
        return " or ".join("none" if a is type(None) else _describe(a) for a in typing.get_args(hint))
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}.get(hint, str(hint))
