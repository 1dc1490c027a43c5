"""The page: a summary, a table for each kind, and every row that is not computed with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from statistics import median

from bench.published import estimates, exact, orders, rooflines, shapes, stated
from bench.published.cases import sources
from bench.published.points import KINDS, Point, error, figures, holds, share_reached, table
from bench.published.unknown import REASONS, reasons

_TITLES = {
    "exact": "Exact", "theory": "Theory", "roofline": "Rooflines", "order": "Orders", "estimate": "Estimates of hits",
}  # fmt: skip
_HEAD = """\
# Published figures and the cost model

Written by `python -m bench.published` from `bench/published`; a test keeps it up to date. `bench/published/points.csv`
has figures that others published, with where they stand; the ids are its rows. All that is computed here goes through
the project's own parts: `hw_targets.cost_model`, the closed form of `passes.place` on a described target with the
places of the published setting pinned, the replay of routing traces. Constants are cited; a row from which one was
taken *sets* it, and does not count as one that agrees.

- **exact**: to every digit published. Other systems' own cost models count their bytes and FLOP by their rules; what
  these last is priced by ours.
- **theory**: closed forms of others with rounded figures in them, within 6 %.
- **roofline**: *at peak* is our figure at the machine's stated peaks, nothing lost: no published one may beat it, and
  *reached* is the share of it that they are. *planned* is with the efficiencies that the machine's file states, each
  from one source, and with what the system does besides (below the table); it agrees within 25 %. A dash: nothing is
  stated for such a machine, only the bound is checked. *sets*: a constant was taken from this very figure, so that it
  is no forecast and not counted as one that agrees.
- **stated**: rooflines with an ideal and an efficiency stated for them: ours within 3 % of the ideal and 0.02 of the
  share.
- **order**: our figures are in the published order. Those of KTransformers that lie within 8 % of each other, which is
  what equal placements differ by there, may stand either way.
- **shape**: series that are straight, saturate or hardly change, where ours must too.
- **estimate**: hit rates whose routing is not published, from our models of routing, within five points; of several
  figures of one recording the first sets its exponent.

What stands beside a *no* is what we take for the likeliest reason; nobody measured it.
"""


@lru_cache(maxsize=1)
def points() -> tuple[Point, ...]:
    """Every point, by kind, rows in the order of the table."""
    found = [p for module in (exact, rooflines, orders, estimates) for p in module.points()]
    place = {i: n for n, i in enumerate(table())}
    return tuple(sorted(found, key=lambda p: (KINDS.index(p.kind), min(place[i] for i in p.ids))))


def page() -> str:
    """The text of the page."""
    lines = [_HEAD.rstrip("\n"), "", *_summary()]
    for kind in KINDS:
        lines += ["", f"## {_TITLES[kind]}", "", *_table(kind)]
        if kind == "roofline":
            lines += [
                "",
                "What systems do besides, and their machines:",
                "",
                *(f"- {said}." for said in sources()),
            ]
            lines += ["", "## Stated efficiencies", "", *_stated()]
        if kind == "order":
            lines += ["", "## Shapes", "", *_shapes()]
    lines += ["", "## Not computed", "", "| rows | why |", "|---|---|"]
    lines += [f"| {', '.join(ids)} | {reason} |" for reason, ids in REASONS.items()]
    return "\n".join(lines) + "\n"


def agrees(point: Point) -> bool:
    """Whether a point holds; whether that says something is another question (`Point.sets`)."""
    found = figures(point)
    assert found is not None
    return holds(point, found, figures(point, planned=True))


def _summary() -> Iterator[str]:
    yield "| kind | points | set a constant | the others | agree | rows of the table |"
    yield "|---|---|---|---|---|---|"
    for kind in KINDS:
        yield _counts(kind, [p for p in points() if p.kind == kind], 0)
    for name, beside in (("stated", stated.rows()), ("shape", shapes.shapes())):
        yield f"| {name} | {len(beside)} | - | {len(beside)} | {sum(row.agrees() for row in beside)} | - |"
    yield f"| not computed | - | - | - | - | {len(reasons())} |"
    yield _counts("all", list(points()), len(reasons()))
    found = [(p, found) for p in points() if not p.sets and (found := figures(p, planned=True))]
    errors = [abs(error(p, figure[0])) for p, figure in found]
    near = sum(e <= 0.1 for e in errors)
    yield ""
    yield (
        f"Of {len(errors)} planned figures that set nothing the median is {100 * median(errors):.0f} % from the "
        f"published one; {near} are within 10 %. Every published figure is below its roofline."
    )


def _counts(name: str, mine: list[Point], more: int) -> str:
    forecasts = [p for p in mine if not p.sets]
    cells = [len(mine), len(mine) - len(forecasts), len(forecasts), sum(map(agrees, forecasts))]
    cells.append(len({i for p in mine for i in p.ids}) + more)
    return f"| {name} | {' | '.join(map(str, cells))} |"


def _table(kind: str) -> Iterator[str]:
    roofline = kind == "roofline"
    columns = ["id", "what", "unit", "published"]
    columns += ["at peak", "reached", "planned", "error"] if roofline else ["ours"]
    yield f"| {' | '.join([*columns, 'agrees', 'source'])} |"
    yield "|" + "---|" * (len(columns) + 2)
    for point in points():
        if point.kind == kind:
            verdict = "yes" if agrees(point) else f"**no**: {point.why}"
            verdict = f"sets {point.sets}" if point.sets else verdict
            cells = [", ".join(point.ids), point.what, point.unit, _figures(point.published, point.digits)]
            yield f"| {' | '.join([*cells, *_found(point), verdict, point.source])} |"


def _found(point: Point) -> list[str]:
    found, planned = figures(point), figures(point, planned=True)
    assert found is not None
    if point.kind != "roofline":
        return [_figures(found, point.digits)]
    cells = [_figures(found, 0), f"{share_reached(point, found[0]):.2f}"]
    if planned is None:
        return [*cells, "-", "-"]
    return [*cells, _figures(planned, 0), f"{100 * error(point, planned[0]):+.0f} %"]


def _stated() -> Iterator[str]:
    yield "| what | measured | unit | ideal | ours | share | ours | agrees |"
    yield "|---|---|---|---|---|---|---|---|"
    for row in stated.rows():
        ideal, share = row.ours()
        verdict = "yes" if row.agrees() else f"**no**: {row.note}"
        cells = [
            row.what,
            row.measured,
            row.unit,
            _span(row.ideal, 4),
            f"{ideal:.4g}",
            _span(row.share, 3),
            f"{share:.3g}",
        ]
        yield f"| {' | '.join([*cells, verdict])} |"


def _span(ends: tuple[float, float], digits: int) -> str:
    return " to ".join(f"{end:.{digits}g}" for end in dict.fromkeys(ends))


def _shapes() -> Iterator[str]:
    yield "| what | unit | published | ours | asked | agrees | source |"
    yield "|---|---|---|---|---|---|---|"
    for row in shapes.shapes():
        verdict = "yes" if row.agrees() else f"**no**: {row.why}"
        ours = tuple(round(x, 6) for x in row.ours())
        cells = [row.what, row.unit, _figures(row.published, 0), _figures(ours, 0), row.asked, verdict, row.source]
        yield f"| {' | '.join(cells)} |"


def _figures(values: tuple[float, ...], digits: int) -> str:
    digits = max(digits, 4)
    return ", ".join(f"{v:.{digits}g}" if v < 10**digits else f"{v:.0f}" for v in values)
