"""Writes docs/published_points.md: every point, the published figure beside ours."""

from __future__ import annotations

from pathlib import Path

from bench.published.points import POINTS, Point, holds

PAGE = Path(__file__).parents[2] / "docs" / "published_points.md"
_HEAD = """\
# Published figures and the cost model

Written by `python -m bench.published` from `bench/published/points.py`; a test keeps it up to date. The ids are labels.

- **exact**: other systems' own models, written anew from their formulas, give their figures to every digit shown.
- **roofline**: our time at the target's stated peaks, nothing lost, over the published time is the efficiency reached.
  It must be the one stated for the point (within 0.03, all-reduce 0.05), and never above 1.
- **order**: the planner's model puts the cases in the published order. Sizes differ: these are other programs, on
  machines that are only like ours.

"""
_KINDS = {"exact": "Exact", "roofline": "Rooflines", "order": "Orders"}


def page() -> str:
    """The text of the page."""
    lines = [_HEAD.rstrip("\n")]
    for kind, title in _KINDS.items():
        mine = [p for p in POINTS if p.kind == kind]
        last = "efficiency (stated)" if kind == "roofline" else "agrees"
        lines += [
            "",
            f"## {title}",
            "",
            f"| id | what | unit | published | ours | {last} | source |",
            "|---|---|---|---|---|---|---|",
        ]
        lines += [_row(point) for point in mine]
    return "\n".join(lines) + "\n"


def _row(point: Point) -> str:
    found = point.ours()
    digits = point.digits or 4
    agrees = "yes" if holds(point, found) else "**no**"
    if point.kind == "roofline":
        agrees = f"{found[0] / point.published[0]:.2f} ({point.efficiency:.2f})"
    cells = (
        point.ids or "-",
        point.what,
        point.unit,
        _figures(point.published, digits),
        _figures(found, digits),
        agrees,
    )
    return f"| {' | '.join(cells)} | {point.source} |"


def _figures(values: tuple[float, ...], digits: int) -> str:
    return ", ".join(f"{value:.{digits}g}" if value < 10**digits else f"{value:.0f}" for value in values)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
