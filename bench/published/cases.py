"""The table of rooflines: which row of points.csv is which case, measured how, on what system.

    for entry in entries(): entry.id, entry.case, entry.measured

Takes `rooflines.toml`; refuses names that it does not define and fields that a case does not have (TypeError, KeyError:
the table is ours).
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from bench.published.ours import NOTHING, Case, System

TABLE = Path(__file__).with_name("rooflines.toml")
_OF_ROW = ("id", "measured", "system", "why", "sets")


@dataclass(frozen=True)
class Entry:
    """A row: its `case`, what is `measured` (`first token`, `prefill`, `decode` or `generation`, perhaps `at peak`:
    then only the bound is known), `why` ours is known not to agree, and which constant it `sets`."""

    id: str
    case: Case
    measured: str
    why: str = ""
    sets: str = ""

    def figure(self, *, peak: bool) -> float:
        """Ours, in the unit of the row."""
        kind = self.measured.removesuffix(" at peak")
        if kind == "first token":
            return self.case.first_token(peak=peak)
        return {"generation": self.case.generation, "prefill": self.case.prefill, "decode": self.case.decode}[kind](
            peak=peak
        )


@lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    with open(TABLE, "rb") as file:
        return tomllib.load(file)


def target(name: str) -> str:
    """A target of the table by its name, or a target itself."""
    found = _table()["targets"].get(name, name)
    return found if isinstance(found, str) else found["is"]


def pins(name: str) -> tuple[str, ...]:
    """The places of the table with this name."""
    return tuple(_table()["pins"][name])


def sources() -> list[str]:
    """What systems do besides and how their machines differ, with where it stands."""
    found = [*_table()["systems"].values(), *(t for t in _table()["targets"].values() if isinstance(t, dict))]
    return [" ".join(fields["source"].split()) for fields in found if "source" in fields]


def orders() -> dict[str, tuple[str, ...]]:
    """Rows to compare with each other, by what they are."""
    return {what: tuple(ids) for what, ids in _table()["orders"].items()}


@lru_cache(maxsize=1)
def entries() -> dict[str, Entry]:
    """All rows by id, in the order of the table."""
    found: dict[str, Entry] = {}
    for group in _table()["group"]:
        shared = {k: v for k, v in group.items() if k in _OF_ROW} | group.get("case", {})
        for row in group["rows"]:
            entry = _entry(shared | row)
            assert entry.id not in found, f"{entry.id} stands in the table twice"
            found[entry.id] = entry
    return found


def _entry(fields: dict[str, Any]) -> Entry:
    case = {k: v for k, v in fields.items() if k not in _OF_ROW}
    case["target"] = target(case["target"])
    if "pins" in case:
        case["pins"] = pins(case["pins"])
    name = fields.get("system")
    system = (
        NOTHING if name is None else System(**{k: v for k, v in _table()["systems"][name].items() if k != "source"})
    )
    why = _table()["reasons"][fields["why"]] if "why" in fields else ""
    return Entry(fields["id"], Case(**case, system=system), fields["measured"], why, fields.get("sets", ""))
