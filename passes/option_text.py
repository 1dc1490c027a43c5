"""A dataclass and its fields as text: `set-precision{weights=bf16 kv=bf16}`, fields at their defaults left out.

`passes.pipeline_text` has the grammar, and reads it.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

_PLAIN_WORD = re.compile(r'[^\s{}=,"]+')


def print_options(name: str, options: Any) -> str:
    """`name{opt=value other=value}` of the fields of a dataclass."""
    given = [(field, getattr(options, field.name)) for field in dataclasses.fields(options)]
    texts = [f"{option_key(field.name)}={_print_value(value)}" for field, value in given if value != _default(field)]
    return name + (f"{{{' '.join(texts)}}}" if texts else "")


def option_key(field_name: str) -> str:
    """`max-k` of the field `max_k`."""
    return field_name.replace("_", "-")


def _print_value(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(_print_value(v) for v in value) if value else "()"
    if isinstance(value, bool):
        return "true" if value else "false"
    if value is None:
        return "none"
    text = str(value)
    if isinstance(value, str) and (not _PLAIN_WORD.fullmatch(text) or text in ("none", "()")):
        return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'
    return text


def _default(field: dataclasses.Field[Any]) -> Any:
    return field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
