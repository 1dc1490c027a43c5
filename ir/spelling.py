"""Help with names that are almost right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest candidate, or "" when none is near. Meant to end a message."""
    near = difflib.get_close_matches(word, list(dict.fromkeys(candidates)), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
