"""A point: rows of the published table, our figures for the same, and how near the two must be.

`table()` reads `points.csv`: figures that other systems published, with where they stand. Every row of it belongs to a
`Point` or is named in `bench.published.unknown` with the reason why it is not computed. Kinds:

- `exact`: to the digits published;
- `theory`: a closed form of others with rounded figures in it, within `ROUNDED`;
- `roofline`: at the stated peaks of the machine, nothing lost, ours is never slower than the published figure, and with
  the efficiencies that the machine's file states (`planned`) it is within `NEAR` of it. A machine whose file states
  none for what is done has the first half only;
- `order`: ours are in the order of the published ones; figures within `tie` of each other may stand either way;
- `estimate`: shares that depend on routing which nobody published, from our models of routing, within `SHARE` points.

A point that does not hold says in `why` what is known about it. One from which a constant of ours was taken says in
`sets` which: it is near by construction and counts as no forecast.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

TABLE = Path(__file__).with_name("points.csv")
KINDS = ("exact", "theory", "roofline", "order", "estimate")
NEAR = 0.25
ROUNDED = 0.06
SHARE = 5.0
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
Figures = Callable[[], tuple[float, ...]]


@dataclass(frozen=True)
class Row:
    """A row of the table. `value` is as published: a number, or several in one text."""

    id: str
    system: str
    model: str
    hardware: str
    precision: str
    metric: str
    value: str
    unit: str
    source: str

    @property
    def numbers(self) -> tuple[float, ...]:
        """The numbers of `value`."""
        return tuple(float(n) for n in _NUMBER.findall(self.value))


@lru_cache(maxsize=1)
def table() -> dict[str, Row]:
    """All rows by id, in the order of the file."""
    with open(TABLE, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        return {r["id"]: Row(*(r[name] for name in Row.__dataclass_fields__)) for r in rows}


@dataclass(frozen=True)
class Point:
    """`ours()` gives what to compare with `published`, the figures of the rows `ids`, all in one unit.

    `planned()` is the same with what the machine's file says is lost. `rate`: more is faster. `digits` are significant
    ones of exact points.
    """

    ids: tuple[str, ...]
    kind: str
    what: str
    published: tuple[float, ...]
    ours: Figures
    unit: str
    digits: int = 0
    tie: float = 0.0
    rate: bool = False
    planned: Figures | None = None
    why: str = ""
    sets: str = ""

    @property
    def source(self) -> str:
        """Where the figures stand."""
        return "; ".join(dict.fromkeys(re.split(r" \(|, recomputed", table()[i].source)[0] for i in self.ids))


@lru_cache(maxsize=1024)
def figures(point: Point, *, planned: bool = False) -> tuple[float, ...] | None:
    """`ours` or `planned` of a point, computed once."""
    asked = point.planned if planned else point.ours
    return None if asked is None else asked()


def published(*ids: str, which: int = 0) -> tuple[float, ...]:
    """One number of each row's value."""
    return tuple(table()[i].numbers[which] for i in ids)


def share_reached(point: Point, found: float) -> float:
    """The share of the roofline that the first published figure is."""
    return point.published[0] / found if point.rate else found / point.published[0]


def error(point: Point, found: float) -> float:
    """How far a figure is from the first published one, in proportion to it: positive where ours is faster."""
    ratio = found / point.published[0] if point.rate else point.published[0] / found
    return ratio - 1.0


def holds(point: Point, found: tuple[float, ...], planned: tuple[float, ...] | None = None) -> bool:
    """Whether our figures agree with the published ones, in the sense of the point's kind."""
    pairs = list(zip(found, point.published, strict=True))
    if point.kind == "exact":
        return all(f"{a:.{point.digits}g}" == f"{b:.{point.digits}g}" for a, b in pairs)
    if point.kind == "theory":
        return all(abs(a / b - 1.0) <= ROUNDED for a, b in pairs)
    if point.kind == "roofline":
        near = planned is None or abs(error(point, planned[0])) <= NEAR
        return share_reached(point, found[0]) <= 1.0 and near
    if point.kind == "estimate":
        return all(abs(a - b) <= SHARE for a, b in pairs)
    return all((a < b) == (x < y) for a, x in pairs for b, y in pairs if abs(x - y) > point.tie * max(x, y))
