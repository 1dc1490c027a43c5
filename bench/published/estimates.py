"""Points about caches of experts whose routing nobody published: what our models of routing say.

One conversation has a Zipf popularity of experts (exponent 1.4), requests of many users are uniform; both were fitted
to other recordings. Shares in %, in points.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.published.points import Point, published
from hw_targets.expert_cache import expected_hit_rate
from hw_targets.routing import MIXED, SESSION, Router

MEAN_EXPERT_MIB = {"gemma": 676.4 / 180, "gpt-oss": 907.7 / 72}  # experts of one token over their number, as recorded
_FLATTER = "routing of this recording is flatter than a conversation of ours"
_UNIFORM = "its router is not uniform, or its cache does not forget as LRU does: theory says 50"


def _global(name: str, layers: int, top_k: int, mib: float) -> tuple[float, ...]:
    slots = int(mib / MEAN_EXPERT_MIB[name])
    return (100 * expected_hit_rate(experts=128, top_k=top_k, layers=layers, slots=slots),)


def _per_layer(
    experts: int, top_k: int, slots: int, tokens: int | None = None, router: Router = SESSION
) -> tuple[float, ...]:
    found = expected_hit_rate(
        experts=experts, top_k=top_k, layers=48, slots=48 * slots, scope="layer", tokens=tokens, router=router
    )
    return (100 * found,)


def points() -> Iterator[Point]:
    """All estimates."""
    for i, name, layers, top_k, mib, which, why in (
        ("P226", "gemma", 30, 6, 2000, 1, ""), ("P234", "gemma", 30, 6, 4000, 0, ""),
        ("P229", "gpt-oss", 36, 2, 1000, 1, _FLATTER), ("P230", "gpt-oss", 36, 2, 2000, 1, _FLATTER),
        ("P231", "gpt-oss", 36, 2, 3000, 1, ""),
        ("P235", "gpt-oss", 36, 2, 3000, 0, "counts the first uses of a short run"),
    ):  # fmt: skip
        yield Point(
            (i,), "estimate", f"{name}, {top_k} of 128 experts, LRU of {mib} MiB", published(i, which=which),
            lambda n=name, la=layers, k=top_k, m=mib: _global(n, la, k, m), "%", why=why,
        )  # fmt: skip
    for i, slots in (("P247", 93), ("P248", 186), ("P249", 279), ("P250", 372), ("P251", 512)):
        why = "" if i == "P251" else _FLATTER
        yield Point((i,), "estimate", f"10 of 512 experts, 300 tokens, LRU of {slots} a layer", published(i),
                    lambda s=slots: _per_layer(512, 10, s, 300), "%", why=why)  # fmt: skip
    for which, slots in enumerate((64, 128)):
        yield Point(("P339",), "estimate", f"10 of 512 experts, mixed work, LRU of {slots} a layer",
                    published("P339", which=which), lambda s=slots: _per_layer(512, 10, s), "%",
                    why="" if which else "between a conversation and requests of many users")  # fmt: skip
    for which in range(3):
        yield Point(("P252",), "estimate", f"8 of 128 experts, LRU of 51 a layer, prompt {which + 1}",
                    published("P252", which=which), lambda: _per_layer(128, 8, 51), "%",
                    why="this recording repeats more than a conversation of ours")  # fmt: skip
    yield Point(("P258",), "estimate", "2 of 8 experts chosen uniformly, half of them cached", published("P258"),
                lambda: _per_layer(8, 2, 4, router=MIXED), "%", why=_UNIFORM)  # fmt: skip
