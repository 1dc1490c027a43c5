"""Help with names that are almost right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the shortest candidate that begins so, else the nearest; "" when none is near.

    Meant to end a message.
    """
    known = list(dict.fromkeys(candidates))
    begun = [name for name in known if len(word) > 2 and name.lower().startswith(word.lower())]
    near = sorted(begun, key=len) or difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
