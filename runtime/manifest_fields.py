"""Fields of a JSON object that nobody is trusted to have written right: typed, bounded, named when they are not.

    top = Fields(json.loads(text), "out/manifest.json")
    top.child("weights").integer("bytes", 0, 1 << 50)

Refuses with one RuntimeDiagnostic that names the field from the top, what was expected and what is there.
"""

from __future__ import annotations

import json
from typing import Any, NoReturn

from runtime.errors import RuntimeDiagnostic

REBUILD_HINT = "build the artifact again: compile-model build MODEL -o OUT"


class Fields:
    """Typed look-up in one JSON object; a wrong field ends in a diagnostic with its full name."""

    def __init__(self, values: dict[str, Any], where: str, prefix: str = "") -> None:
        self.values = values
        self._where = where
        self._prefix = prefix

    def fail(self, key: str, expected: str, got: object) -> NoReturn:
        """Raises: field, what was expected, what is there."""
        name = ".".join(part for part in (self._prefix, key) if part)
        raise RuntimeDiagnostic(
            f"manifest field '{name}' is {short(got)}",
            where=self._where,
            expected=expected,
            hint=REBUILD_HINT,
        )

    def child(self, key: str) -> Fields:
        """The object under `key`."""
        value = self.values.get(key)
        if not isinstance(value, dict):
            self.fail(key, "an object", value)
        return Fields(value, self._where, f"{self._prefix}.{key}" if self._prefix else key)

    def children(self, key: str, most: int, default: tuple[()] | None = None) -> list[Fields]:
        """The list of objects under `key`, at most `most` of them; `default` where there is none."""
        value = self.values.get(key, None if default is None else [])
        if not isinstance(value, list) or len(value) > most or not all(isinstance(item, dict) for item in value):
            self.fail(key, f"a list of at most {most} objects", value)
        name = f"{self._prefix}.{key}" if self._prefix else key
        return [Fields(item, self._where, f"{name}[{index}]") for index, item in enumerate(value)]

    def integer(self, key: str, low: int, high: int, default: int | None = None) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            self.fail(key, f"an integer in {low}..{high}", value)
        return value

    def integers(self, key: str, low: int, high: int) -> list[int]:
        """A list of integers in that range."""
        value = self.values.get(key)
        if not isinstance(value, list) or not all(type(item) is int and low <= item <= high for item in value):
            self.fail(key, f"a list of integers in {low}..{high}", value)
        return value

    def number(self, key: str) -> float:
        """A finite number >= 0; 0 where the field is absent (work figures are optional)."""
        value = self.values.get(key, 0)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= 1e24:
            self.fail(key, "a number >= 0", value)
        return float(value)

    def text(self, key: str, default: str | None = None) -> str:
        value = self.values.get(key, default)
        if not isinstance(value, str) or len(value) > 1 << 16:
            self.fail(key, "a text", value)
        return value

    def texts(self, key: str) -> list[str]:
        value = self.values.get(key)
        if not isinstance(value, list) or len(value) > 4096 or not all(isinstance(item, str) for item in value):
            self.fail(key, "a list of texts", value)
        return value


def short(value: object) -> str:
    """A value as a diagnostic shows it: JSON, cut to one short line."""
    if value is None:
        return "missing"
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
