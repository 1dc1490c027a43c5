"""Published figures of other systems against the cost model; `python -m bench.published` writes the page.

points.csv        what others published           unknown.py     rows that are not computed, and why
rooflines.toml    which case of ours is which row  cases.py       reads it: entries, targets, places
ours.py           what the cost model says of a case on a system
exact.py, rooflines.py, orders.py, placements.py, estimates.py    the points, by kind
stated.py, shapes.py                               efficiencies and series stated beside them
report.py         the page, docs/published_points.md
"""
