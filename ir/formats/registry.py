"""The text forms of number formats: a family of formats registers how its text is read, so that it is one file.

`name<field=value, ...>` is read by the family whose pattern fits the name; a lone word stands for one format. Writing
is `str(format)`. The files of the families are loaded when the first text is read that is no plain format. Refused, as
ValueError: unknown, missing and ill-formed fields, each with what would be right.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ir.formats.plain import BF16, F16, F32, I8, PLAIN_FORMATS, U8, NumberFormat, PlainFormat

SCALE_FORMATS = {"f16": F16, "bf16": BF16, "f32": F32}
MAX_GROUP_DIGITS = 9
_FIELD = re.compile(r"([a-z_]+) *= *([a-z0-9]+)", re.ASCII)
_WRITTEN = re.compile(r"([a-z][a-z0-9_]*)(?:<([a-z_]+ *= *[a-z0-9]+(?:, *[a-z_]+ *= *[a-z0-9]+)*)>)?", re.ASCII)


@dataclass(frozen=True)
class FormatFamily:
    """`read(name, fields)` gives the format of a text whose name fits `pattern`. `names` are shown as examples."""

    pattern: re.Pattern[str]
    read: Callable[[str, dict[str, str]], NumberFormat]
    names: tuple[str, ...]


_FAMILIES: list[FormatFamily] = []
_WORDS: dict[str, NumberFormat] = dict(PLAIN_FORMATS)


def register_family(pattern: str, names: Iterable[str], read: Callable[[str, dict[str, str]], NumberFormat]) -> None:
    """Adds a family of formats with fields."""
    _FAMILIES.append(FormatFamily(re.compile(pattern, re.ASCII), read, tuple(names)))


def register_word(format: NumberFormat) -> None:
    """Adds a format without fields: its text is one word."""
    _WORDS[str(format)] = format


def format_word(word: str) -> NumberFormat | None:
    """The format that a word stands for, plain ones among them."""
    if word not in PLAIN_FORMATS:
        _load_families()
    return _WORDS.get(word)


def format_names() -> list[str]:
    """Names of formats, for suggestions."""
    _load_families()
    families = sorted(_FAMILIES, key=lambda family: family.read.__module__)  # whichever was loaded first
    return [*_WORDS, *(name for family in families for name in family.names)]


def format_family(name: str) -> FormatFamily | None:
    """The family that reads `name<...>`."""
    _load_families()
    return next((family for family in _FAMILIES if family.pattern.fullmatch(name)), None)


def read_format(text: str) -> NumberFormat | None:
    """The format of a text that is a word, or a name and fields that are words: `q4_sym<group=32, scale=f16>`.

    None for every other text, and for fields that a family refuses: `ir.parse_value.parse_format` reads what formats
    mean in general, with the grammar of the IR, and says what is wrong.
    """
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        return None
    name, inside = found.groups()
    if inside is None:
        return format_word(name)
    family, fields = format_family(name), dict(_FIELD.findall(inside))
    if family is None or len(fields) != inside.count("="):
        return None
    try:
        return family.read(name, fields)
    except ValueError:
        return None


@functools.cache
def _load_families() -> None:
    """Imports every file of this folder, so that each has registered what it reads."""
    for name in sorted(module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])):
        importlib.import_module(f"ir.formats.{name}")


# -- fields that families share ----------------------------------------------------------------------------------------


def check_fields(
    name: str, fields: dict[str, str], required: tuple[str, ...], example: str, optional: tuple[str, ...] = ()
) -> None:
    """Raises ValueError for fields that do not exist and for those that are missing."""
    known = (*required, *optional)
    for field in fields:
        if field not in known:
            raise ValueError(f"{name} has no field {field!r}; it has {', '.join(known)}")
    if any(field not in fields for field in required):
        raise ValueError(f"{name} needs {' and '.join(required)}, like {example}")


def read_group(text: str) -> int:
    """`32`, or `row` (0)."""
    if text == "row":
        return 0
    if not (text.isdecimal() and len(text) <= MAX_GROUP_DIGITS and int(text) > 0):
        raise ValueError(f"expected a group of 1 or more, or group=row, got {text}")
    return int(text)


def read_scale(text: str) -> PlainFormat:
    """The format of a scale: f16, bf16 or f32."""
    if text not in SCALE_FORMATS:
        raise ValueError(f"expected a scale of f16, bf16 or f32, got {text}")
    return SCALE_FORMATS[text]


def read_scales(fields: dict[str, str]) -> tuple[PlainFormat, PlainFormat | None]:
    """The formats of scale and channel; a scale of u8 or i8 stands under a channel scale."""
    channel = read_scale(fields["channel"]) if "channel" in fields else None
    integers = {"u8": U8, "i8": I8} if channel is not None else {}
    if fields["scale"] in integers:
        return integers[fields["scale"]], channel
    if channel is not None or fields["scale"] == "u8":
        raise ValueError(f"expected scale=u8 or scale=i8 under channel=f16, bf16 or f32, got scale={fields['scale']}")
    return read_scale(fields["scale"]), None
