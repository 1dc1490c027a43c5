"""Published figures of other systems against the cost model: exact ones, rooflines, orders.

`python -m bench.published` writes docs/published_points.md; `bench.published.report.points` is what it shows.
"""
