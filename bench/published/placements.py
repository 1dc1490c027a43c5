"""Which experts lie on the GPU: KTransformers' table of Qwen3-Next, five ways by eleven shares, as orders.

Ours are tokens a second of the experts of all layers alone. The table is of a whole server with an unnamed batch, so
that only the order can be asked for; rows within `TIE` of each other, which is what equal placements differ by there,
may stand either way.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

from bench.published.ours import Case
from bench.published.points import Point, published
from passes.place.expert_options import option_with
from passes.place.parts import Part
from passes.place.problem import Problem
from passes.place.routing_model import fixed_share, hit_rate, inclusion

TIE = 0.08
# The CPU's part of a layer is asked for and waited for by two calls in the GPU's stream (submit_with_cuda_stream and
# sync_with_cuda_stream, kvcache-ai/ktransformers), each of which costs a launch.
MEETING_LAUNCHES = 2
MODEL, TARGET = "Qwen3-Next-80B-A3B", "xeon-6454s-4090{vram=96GB,vram.read=4032GB/s}"
ROWS: dict[str, dict[int, str]] = {
    "random": {20: "P145", 40: "P155", 50: "P160", 80: "P175", 100: "P185"},
    "uniform": {0: "P136", 20: "P146", 30: "P151", 50: "P161", 60: "P166", 70: "P171", 80: "P176", 100: "P186"},
    "front": {0: "P137", 40: "P157", 50: "P162", 60: "P167", 70: "P172", 100: "P187"},
    "frequency": {10: "P143", 60: "P168", 70: "P173", 80: "P178", 100: "P188"},
    "dynamic": {10: "P144", 30: "P154", 40: "P159", 70: "P174", 90: "P184", 100: "P189"},
}


def tokens_a_second(way: str, ratio: float) -> float:
    """With `ratio` of the experts on the GPU, the others by the cores.

    uniform, random: as many in every layer, whichever; front: the first layers whole; frequency: the most popular of
    mixed requests; dynamic: the most popular of this session.
    """
    problem, part = _problem(way)
    experts, layers = part.experts, part.count
    if way == "front":
        return 1.0 / layers / (ratio * _layer(problem, part, experts) + (1.0 - ratio) * _layer(problem, part, 1))
    return 1.0 / layers / _layer(problem, part, round(ratio * experts))


def _layer(problem: Problem, part: Part, slots: int) -> float:
    """Seconds of a layer's experts with `slots` of them on the GPU."""
    whole = slots == part.experts
    mode, home = ("cached", "dram") if whole else ("split", "dram")
    option = option_with(problem, part, mode, "gpu", home, max(1, slots))
    assert option is not None
    launch = problem.machine.unit("gpu").launch_seconds or 0.0
    return option.decode.waited + (0.0 if whole else MEETING_LAUNCHES * launch)


@lru_cache(maxsize=8)
def _problem(way: str) -> tuple[Problem, Part]:
    problem = Case(MODEL, TARGET, "w8a8", ()).problem()
    popular = {"frequency": _mixed_share, "dynamic": hit_rate}.get(way, fixed_share)
    return dataclasses.replace(problem, popular=popular), next(p for p in problem.parts() if p.experts)


def _mixed_share(experts: int, top_k: int, slots: int, batch: int = 1) -> float:
    """Of requests of many users with popular experts of their own, what the most popular ones of all serve."""
    chances = inclusion(experts, top_k, 0.6)
    return sum(chances[:slots]) / top_k if slots < experts else 1.0


def points() -> Iterator[Point]:
    """Every way by its shares, and at every share the ways."""
    for way, rows in ROWS.items():
        shares = ", ".join(map(str, rows))
        yield _point(f"experts on the GPU, {way}: {shares} %", [(way, percent) for percent in rows])
    for percent in sorted({p for rows in ROWS.values() for p in rows}):
        ways = [way for way, rows in ROWS.items() if percent in rows]
        if len(ways) > 1:
            yield _point(f"{percent} % of the experts on the GPU: {', '.join(ways)}", [(way, percent) for way in ways])


def _point(what: str, chosen: list[tuple[str, int]]) -> Point:
    ids = tuple(ROWS[way][percent] for way, percent in chosen)

    def ours() -> tuple[float, ...]:
        return tuple(tokens_a_second(way, percent / 100) for way, percent in chosen)

    return Point(ids, "order", what, published(*ids), ours, "tok/s", tie=TIE)
