"""Published figures: every point agrees in the sense of its kind, and the page shows what is computed."""

from __future__ import annotations

import dataclasses

import pytest

from bench.published.__main__ import PAGE, page
from bench.published.points import POINTS, Point, holds


@pytest.mark.parametrize("point", POINTS, ids=lambda p: f"{p.kind}: {p.what}")
def test_point(point: Point) -> None:
    found = point.ours()
    assert holds(point, found), f"{found} for {point.published}"


def test_page_is_up_to_date() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m bench.published"


def test_disagreement_is_seen() -> None:
    exact, roofline, order = (next(p for p in POINTS if p.kind == k) for k in ("exact", "roofline", "order"))
    assert not holds(exact, tuple(1.001 * x for x in exact.published))
    assert not holds(roofline, roofline.published)  # nothing reaches its peak
    assert not holds(order, tuple(reversed(order.published)))
    assert holds(dataclasses.replace(exact, digits=2), tuple(1.0001 * x for x in exact.published))
