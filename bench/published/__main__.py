"""Writes docs/published_points.md: every point, the published figure beside ours."""

from __future__ import annotations

from pathlib import Path

from bench.published.report import page

PAGE = Path(__file__).parents[2] / "docs" / "published_points.md"

if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
