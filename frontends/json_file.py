"""Strict JSON from files that may be hostile.

Takes a path and a size limit, gives plain Python values. Refuses, with one diagnostic each: files that are missing,
not regular, too large or not UTF-8, duplicate keys, NaN and infinities, and nesting too deep to read.
"""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

from ir.diagnostics import DiagnosticError

MEBIBYTE = 1 << 20


def file_size(path: Path) -> int:
    """Bytes of a regular file. A directory, pipe or device (which could block for ever) is refused."""
    try:
        status = path.stat()
    except OSError as error:
        raise DiagnosticError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    except ValueError:  # a NUL byte in the name
        raise DiagnosticError("cannot be read: the name is no file name", where=repr(str(path))) from None
    if not stat.S_ISREG(status.st_mode):
        raise DiagnosticError("is no regular file", where=str(path), expected="a file with data in it")
    return status.st_size


def read_text(path: Path, *, limit: int = MEBIBYTE) -> str:
    """The UTF-8 text of a regular file of at most `limit` bytes."""
    size = file_size(path)
    if size > limit:
        raise DiagnosticError(f"is {size} bytes long", where=str(path), expected=f"at most {limit} bytes")
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)  # the file may have grown since it was measured
    except OSError as error:
        raise DiagnosticError(f"cannot be read: {error.strerror or error}", where=str(path)) from None
    if len(data) > limit:
        raise DiagnosticError("grew while it was read", where=str(path), expected=f"at most {limit} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DiagnosticError(f"is not UTF-8: byte {error.start} cannot be decoded", where=str(path)) from None


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text. `where` names the text in diagnostics."""
    try:
        return json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}"
        raise DiagnosticError(message, where=where) from None
    except RecursionError:
        raise DiagnosticError("is not valid JSON: the nesting is too deep", where=where) from None
    except ValueError as error:  # from the two hooks, and for integers of thousands of digits
        raise DiagnosticError(f"is not valid JSON: {error}", where=where) from None


def read_json_object(path: Path, *, limit: int = MEBIBYTE) -> dict[str, Any]:
    """The JSON object that a file holds."""
    value = parse_json(read_text(path, limit=limit), str(path))
    if not isinstance(value, dict):
        kind = type(value).__name__
        raise DiagnosticError(f"holds a JSON {kind}", where=str(path), expected="a JSON object {...}")
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"key {key!r} appears twice in one object")
            seen.add(key)
    return made


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
