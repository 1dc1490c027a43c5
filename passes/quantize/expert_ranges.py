"""Some of the experts of a layer, as recipes name them: numbers and ranges of them by commas.

read_ranges("0-3,8")           # ((0, 3), (8, 8)), or None where it says something else
ranges_text(((0, 3), (8, 8)))  # "0-3,8"
ranges_of([8, 0, 1, 2, 3])     # ((0, 3), (8, 8))
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_RANGE = re.compile(r"(\d{1,6})(?:\s*-\s*(\d{1,6}))?", re.ASCII)


def read_ranges(text: str) -> tuple[tuple[int, int], ...] | None:
    """The ranges of a text, first and last of each; none for ""."""
    found: list[tuple[int, int]] = []
    for part in text.split(",") if text else ():
        match = _RANGE.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            return None
        found.append((first, last))
    return tuple(found)


def ranges_of(numbers: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers as ranges of neighbours, first and last."""
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return tuple(found)


def ranges_text(ranges: Iterable[tuple[int, int]]) -> str:
    """`0-3,8`: the text of `experts` in a rule."""
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in ranges)
