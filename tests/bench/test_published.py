"""Published figures: every row is dealt with, every point agrees or says why not, the page shows what is computed."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest

from bench.published import shapes, stated
from bench.published.__main__ import PAGE
from bench.published.cases import entries
from bench.published.ours import NOTHING, System
from bench.published.points import KINDS, Point, figures, holds, share_reached, table
from bench.published.report import agrees, page, points
from bench.published.unknown import REASONS, reasons

_NUMBER = re.compile(r"(\d+(?:\.\d+)?)")


def _by_kind(*kinds: str) -> list[Point]:
    return [p for p in points() if p.kind in kinds]


def _ours(point: Point) -> tuple[float, ...]:
    found = figures(point)
    assert found is not None
    return found


def test_every_row_is_computed_or_has_a_reason() -> None:
    covered = {i for p in points() for i in p.ids}
    assert set(reasons()) == set(table()) - covered
    assert Counter(i for ids in REASONS.values() for i in ids).most_common(1)[0][1] == 1


@pytest.mark.parametrize("point", _by_kind("exact"), ids=lambda p: f"{p.ids[0]}: {p.what}")
def test_exact(point: Point) -> None:
    found = _ours(point)
    assert not point.why
    assert holds(point, found), f"{found} for {point.published}"


@pytest.mark.parametrize("point", _by_kind("order", "theory", "estimate"), ids=lambda p: f"{p.ids[0]}: {p.what}")
def test_agrees_or_says_why_not(point: Point) -> None:
    assert agrees(point) == (not point.why), f"{_ours(point)} for {point.published}"


@pytest.mark.parametrize("point", _by_kind("roofline"), ids=lambda p: f"{p.ids[0]}: {p.what}")
def test_roofline(point: Point) -> None:
    assert share_reached(point, _ours(point)[0]) <= 1.0, "published faster than the machine's peaks allow"
    assert agrees(point) == (not point.why), f"{figures(point, planned=True)} for {point.published}"
    assert not (point.sets and point.why), "a figure that a constant is from is near by construction"


@pytest.mark.parametrize("row", stated.rows(), ids=lambda row: row.what)
def test_stated_efficiency(row: stated.Stated) -> None:
    assert row.agrees() or row.note, f"{row.ours()} for {row.ideal}, {row.share}"


@pytest.mark.parametrize("shape", shapes.shapes(), ids=lambda shape: shape.what[:40])
def test_shape(shape: shapes.Shape) -> None:
    assert shape.agree(shape.published, shape.published)
    assert shape.agrees() == (not shape.why), f"{shape.ours()} for {shape.published}"


def test_most_agree_where_nothing_was_set() -> None:
    """How many there were when this was written: fewer means that something was lost."""
    forecasts = [p for p in _by_kind("roofline") if not p.sets]
    assert sum(map(agrees, forecasts)) >= 55 and len(forecasts) == 68
    assert sum(row.agrees() for row in stated.rows()) >= 14
    assert sum(map(agrees, _by_kind("order"))) >= len(_by_kind("order")) - 1


@pytest.mark.parametrize(
    "more", [System(in_turn=True), System(expand=4.0), System(expand=4.0, expand_cache=True), System(pass_ms=10.0)]
)
def test_what_systems_do_besides_takes_time(more: System) -> None:
    """And changes nothing at the peaks."""
    for i in ("P046", "P018"):
        case = dataclasses.replace(entries()[i].case, system=NOTHING)
        slower = dataclasses.replace(case, system=more)
        assert slower.generation() < case.generation()
        assert slower.generation(peak=True) == case.generation(peak=True)


def test_a_drive_is_read_ahead() -> None:
    """Waiting for each copy costs nothing where a drive takes longer than all else together."""
    case = dataclasses.replace(entries()["P061"].case, system=NOTHING)
    in_turn = dataclasses.replace(case, system=System(in_turn=True))
    assert case.outcome().decode.bound == "nvme read"
    assert in_turn.step() == case.step()
    assert in_turn.prompt_seconds() > case.prompt_seconds()


def test_published_figures_are_those_of_the_table() -> None:
    for point in points():
        known = {n for i in point.ids for n in table()[i].numbers}
        extra = {1.0} if point.ids == ("P266",) else {5.0} if point.ids == ("P115",) else set()
        assert set(point.published) <= known | extra, point.what


def test_page_is_up_to_date() -> None:
    """Plans of the page are the best there are, so that figures are the same up to the rounding of their last digit."""
    written, computed = (_NUMBER.split(text) for text in (PAGE.read_text(encoding="utf-8"), page()))
    assert written[::2] == computed[::2], "run python -m bench.published"
    for old, new in zip(written[1::2], computed[1::2], strict=True):
        assert float(new) == pytest.approx(float(old), rel=1.1e-3, abs=0.0011 if "." in old else 1), "the same"


def test_disagreement_is_seen() -> None:
    exact, theory, _, order, estimate = (next(p for p in points() if p.kind == k and agrees(p)) for k in KINDS)
    roofline = next(p for p in points() if p.ids == ("P303",))
    assert not holds(exact, tuple(1.01 * x for x in exact.published))
    assert holds(dataclasses.replace(exact, digits=2), tuple(1.0001 * x for x in exact.published))
    assert not holds(theory, tuple(1.1 * x for x in theory.published))
    slower = tuple(2.0 * x for x in roofline.published)  # a time: the published one would beat the peak
    assert not roofline.rate and not holds(roofline, slower)
    assert not holds(roofline, _ours(roofline), tuple(1.4 * x for x in roofline.published))
    assert not holds(order, tuple(reversed(order.published)))
    assert not holds(estimate, tuple(x + 6.0 for x in estimate.published))
