"""Targets by name: `load("x86-64-v4{dram=8GiB}")`.

A name is `host` (this machine, detected), the stem of a file in `hw_targets/targets/`, a target of an installed
package (entry point group `stratum.targets`: a path of a TOML file, or a function without arguments that returns one
or returns a `Target`), or the path of a TOML file (it has a `/` or ends in `.toml`). Capitals and dashes do not matter,
and the first words of one name are enough: `RTX4090` is rtx-4090, `h200` is h200-sxm. An unknown name is answered with
the nearest ones.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import TYPE_CHECKING

from hw_targets.overrides import apply_overrides, split_name
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

ENTRY_POINT_GROUP = "stratum.targets"
_DIRECTORY = Path(__file__).with_name("targets")


def names() -> list[str]:
    """Every name that `load` knows besides paths, sorted; `host` first."""
    found = {path.stem for path in _DIRECTORY.glob("*.toml")} | set(_entry_points())
    return ["host", *sorted(found)]


def load(name: str) -> Target:
    """The target of this name with its overrides. Raises DiagnosticError for an unknown name or a faulty file."""
    base, overrides = split_name(name)
    return apply_overrides(_load_base(base), overrides)


def _load_base(name: str) -> Target:
    if name == "host":
        from hw_targets.detect import detect

        return detect()
    from hw_targets.schema import load_file

    if "/" in name or name.endswith(".toml"):
        return load_file(Path(name).expanduser())
    path = _DIRECTORY / f"{name}.toml"
    if path.is_file():
        return load_file(path)
    points = _entry_points()
    if name in points:
        return _from_entry_point(name, points[name])
    known = names()
    meant = _meant(name, known)
    if len(meant) == 1:
        return _load_base(meant[0])
    close = meant or difflib.get_close_matches(name.lower(), known, 1, cutoff=0.5)
    raise DiagnosticError(
        f"unknown target {name!r}",
        expected=", ".join(known) + ", or the path of a .toml file",
        hint=f"did you mean {' or '.join(close)}?" if close else "",
    )


def _meant(name: str, known: list[str]) -> list[str]:
    """The names that are spelled alike but for capitals and dashes, else those that begin with these words."""
    wanted = _letters(name)
    alike = [other for other in known if _letters(other) == wanted]
    if alike:
        return alike
    words = {other: other.split("-") for other in known}
    return [o for o, w in words.items() if any(_letters("".join(w[:n])) == wanted for n in range(1, len(w)))]


def _letters(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())


def _entry_points() -> dict[str, EntryPoint]:
    import importlib.metadata  # slow to import, and seldom needed

    points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
    return {point.name: point for point in sorted(points, key=lambda p: (p.name, p.value))}


def _from_entry_point(name: str, point: EntryPoint) -> Target:
    from hw_targets.schema import load_file

    try:
        found = point.load()
        found = found() if callable(found) else found
    except Exception as fault:  # a third party's code may raise anything; the user must learn whose it is
        raise DiagnosticError(f"target {name!r} failed to load: {fault}", where=point.value) from fault
    if isinstance(found, Target):
        return found
    if isinstance(found, str | Path):
        return load_file(Path(found))
    raise DiagnosticError(
        f"target {name!r} is a {type(found).__name__}",
        where=point.value,
        expected="a path of a TOML file, a Target, or a function that returns one",
    )
