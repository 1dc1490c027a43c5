"""Prompts in a file of JSON lines: what each line asks for, or what is wrong with it.

    read_lines(b'{"prompt": "Once"}\\n{"id": "b", "messages": [...], "max_tokens": 8}\\n')

A line is a text, or an object with one of `prompt`, `prompt_ids`, `messages`, and maybe `id` (default: the number of
the line, from 1), `session` (a conversation that goes on: its lines are turns, in their order), `max_tokens`, `stop`,
`seed` and the other fields of sampling. Empty lines do not count. Anything else is the fault of that line alone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from ir.diagnostics import DiagnosticError

SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_PROMPTS = ("prompt", "prompt_ids", "messages")
_FIELDS = (*_PROMPTS, "id", "session", "max_tokens", "stop", *SAMPLING)
_WHOLE = ("top_k", "seed", "max_tokens")


@dataclass(frozen=True)
class Line:
    """One prompt. `name` is unique; `options` holds the fields of sampling, `max_tokens` and `stop` that were given."""

    name: str
    prompt: str | list[int] | list[dict[str, Any]]
    session: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class BadLine:
    """What is wrong with a line."""

    name: str
    fault: DiagnosticError


def read_lines(data: bytes) -> Iterator[Line | BadLine]:
    """The lines of a file in their order."""
    names: dict[str, None] = {}
    for number, raw in enumerate(data.splitlines(), 1):
        if not raw.strip():
            continue
        name = str(number)
        try:
            fields = _object(raw)
            given = _name(fields, name)
            if given in names:
                raise DiagnosticError(f"the id {given!r} is there twice", expected="a different one in every line")
            names[given], name = None, given
            yield _line(name, fields)
        except DiagnosticError as fault:
            yield BadLine(name, fault)


def _object(raw: bytes) -> dict[str, Any]:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError) as fault:
        raise DiagnosticError(
            f"not JSON: {fault}", expected='an object such as {"prompt": "Once upon a time"}'
        ) from None
    if isinstance(value, str):
        return {"prompt": value}
    if not isinstance(value, dict):
        raise DiagnosticError(f"a {type(value).__name__}", expected='an object such as {"prompt": "Once upon a time"}')
    return value


def _name(fields: dict[str, Any], default: str) -> str:
    given = fields.get("id", default)
    if not isinstance(given, str | int) or isinstance(given, bool):
        raise DiagnosticError(f"'id' is {given!r}", expected="a text or a whole number")
    return str(given)


def _line(name: str, fields: dict[str, Any]) -> Line:
    unknown = sorted(set(fields) - set(_FIELDS))
    if unknown:
        raise DiagnosticError(f"the unknown field {unknown[0]!r}", expected=", ".join(_FIELDS))
    given = [key for key in _PROMPTS if key in fields]
    if len(given) != 1:
        raise DiagnosticError(f"{' and '.join(given) or 'no prompt'}", expected=f"one of {', '.join(_PROMPTS)}")
    session = fields.get("session")
    if session is not None and not isinstance(session, str):
        raise DiagnosticError(f"'session' is {session!r}", expected="a text")
    options: dict[str, Any] = {
        key: _number(key, fields[key]) for key in (*SAMPLING, "max_tokens") if fields.get(key) is not None
    }
    if "stop" in fields:
        stop = [fields["stop"]] if isinstance(fields["stop"], str) else fields["stop"]
        if not isinstance(stop, list) or not all(isinstance(text, str) for text in stop):
            raise DiagnosticError(f"'stop' is {fields['stop']!r}", expected="a text or a list of texts")
        options["stop"] = tuple(stop)
    return Line(name, _prompt(given[0], fields[given[0]]), session, options)


def _prompt(key: str, value: Any) -> str | list[int] | list[dict[str, Any]]:
    if key == "prompt" and isinstance(value, str):
        return value
    if key == "prompt_ids" and isinstance(value, list) and all(type(token) is int for token in value):
        return value
    if key == "messages" and isinstance(value, list) and value:
        if all(isinstance(message, dict) and isinstance(message.get("role"), str) for message in value):
            return value
    wanted = {"prompt": "a text", "prompt_ids": "a list of token ids", "messages": "a list of {role, content}"}
    raise DiagnosticError(f"'{key}' is no prompt", expected=wanted[key])


def _number(key: str, value: Any) -> float | int:
    whole = key in _WHOLE
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        raise DiagnosticError(f"'{key}' is {value!r}", expected="a whole number" if whole else "a number")
    return value
