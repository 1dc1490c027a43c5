"""Typed, bounded access to the fields of a config.json that may be hostile.

`ConfigReader(fields, where)` gives one field at a time: `integer`, `real`, `flag`, `text`, each with bounds and
possibly several spellings (the newest first). It remembers what was asked for, so that `unknown()` can name the rest.
A null counts as absent, as it does for transformers. Refused: wrong types, numbers out of bounds, two spellings of one
field that disagree, and fields that change the meaning of the model without this compiler knowing them
(`refuse_foreign`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from frontends.config_fields import HARMLESS, NEUTRAL
from ir.diagnostics import DiagnosticError
from ir.spelling import did_you_mean

_ABSENT: Any = object()


class ConfigReader:
    """The fields of one JSON object. `prefix` names the object in messages when it is nested: `rope_scaling.`."""

    def __init__(self, fields: Mapping[str, Any], where: str, prefix: str = "") -> None:
        self.fields = fields
        self.where = where
        self.prefix = prefix
        self._asked: dict[str, None] = {}
        self.warnings: list[str] = []

    def value(self, *names: str) -> Any:
        """The field under the first of its spellings that is present, or None. Spellings that disagree are refused."""
        self._asked.update(dict.fromkeys(names))
        present = [n for n in names if self.fields.get(n) is not None]
        for other in present[1:]:
            if self.fields[other] != self.fields[present[0]]:
                raise self.fault(
                    f"fields {present[0]!r} and {other!r} disagree: "
                    f"{_short(self.fields[present[0]])} and {_short(self.fields[other])}",
                    f"one value; both are spellings of {names[0]!r}",
                )
        return self.fields[present[0]] if present else None

    def integer(self, *names: str, low: int, high: int, default: int = _ABSENT) -> int:
        """A whole number in low .. high. The default may lie outside, as one that means "off" does."""
        found = self._present(names, default)
        if found is None:
            return default
        if type(found) is not int or not low <= found <= high:
            raise self.wrong(names, found, f"a whole number in {low} .. {high}")
        return found

    def real(self, *names: str, low: float, high: float, default: float = _ABSENT) -> float:
        """A finite number in low .. high; the default may lie outside."""
        found = self._present(names, default)
        if found is None:
            return default
        if type(found) not in (int, float) or not low <= found <= high or not math.isfinite(found):
            raise self.wrong(names, found, f"a number in {low:g} .. {high:g}")
        return float(found)

    def flag(self, *names: str, default: bool = _ABSENT) -> bool:
        """true or false."""
        found = self._present(names, default)
        if found is None:
            return default
        if type(found) is not bool:
            raise self.wrong(names, found, "true or false")
        return found

    def text(self, *names: str, default: str = _ABSENT) -> str:
        """A string."""
        found = self._present(names, default)
        if found is None:
            return default
        if type(found) is not str:
            raise self.wrong(names, found, "a string")
        return found

    def texts(self, name: str, count: int, known: tuple[str, ...]) -> tuple[str, ...] | None:
        """A list of `count` strings, each one of `known`; None when absent."""
        found = self.value(name)
        if found is None:
            return None
        if not isinstance(found, list) or len(found) != count or not all(type(x) is str for x in found):
            what = f"a list of {len(found)}" if isinstance(found, list) else _short(found)
            raise self.fault(f"field {self._name(name)} is {what}", f"a list of {count} strings")
        for text in found:
            if text not in known:
                raise self.fault(f"field {self._name(name)} holds {text[:60]!r}", f"one of {', '.join(known)}")
        return tuple(found)

    def nested(self, name: str) -> ConfigReader | None:
        """A reader of an object inside; None when absent."""
        found = self.value(name)
        if found is None:
            return None
        if not isinstance(found, Mapping):
            raise self.wrong((name,), found, "an object")
        return ConfigReader(found, self.where, f"{self.prefix}{name}.")

    def refuse_foreign(self) -> None:
        """Refuses the fields of `NEUTRAL` that nobody asked for and that hold a value that changes the model."""
        for name, neutral in NEUTRAL.items():
            found = self.fields.get(name)
            if name in self._asked or found is None:
                continue
            values = found if isinstance(found, list) else [found]
            if not all(any(type(v) is type(n) and v == n for n in neutral) for v in values):
                message = f"field {name!r} = {_short(found)} changes the model in a way not known for this family"
                raise self.fault(message, " or ".join(_short(n) for n in neutral) or "no such field")
            self._asked[name] = None

    def unasked(self) -> list[str]:
        """The fields that are neither known nor harmless, in order of the file."""
        return [n for n, v in self.fields.items() if v is not None and n not in self._asked and n not in HARMLESS]

    def unknown(self) -> list[str]:
        """One line for every such field; at most 20 and a line that counts the rest."""
        names = self.unasked()
        known = [n for n in self._asked if n not in self.fields]
        lines = [
            f"{self.where}: field {self._name(n)} = {_short(self.fields[n])} is not known and was ignored"
            f"{did_you_mean(n[:60], known)}"
            for n in names[:20]
        ]
        if len(names) > 20:
            lines.append(f"{self.where}: {len(names) - 20} more fields are not known and were ignored")
        return lines

    def fault(self, message: str, expected: str = "", hint: str = "") -> DiagnosticError:
        """A diagnostic at this file."""
        return DiagnosticError(message, where=self.where, expected=expected, hint=hint)

    def wrong(self, names: tuple[str, ...], found: Any, expected: str) -> DiagnosticError:
        """The diagnostic for a field of a wrong type or value."""
        present = next((n for n in names if self.fields.get(n) is not None), names[0])
        return self.fault(f"field {self._name(present)} is {_short(found)}", expected)

    def _present(self, names: tuple[str, ...], default: Any) -> Any:
        """The value, None when it is absent and there is a default."""
        found = self.value(*names)
        if found is None and default is _ABSENT:
            raise self.fault(f"field {self._name(' or '.join(names))} is missing", "a model's whole config.json")
        return found

    def _name(self, name: str) -> str:
        return repr(self.prefix + name[:120])


def _short(value: Any) -> str:
    text = repr(value)
    text = text if len(text) <= 80 else text[:77] + "..."
    return {"True": "true", "False": "false", "None": "null"}.get(text, text)
