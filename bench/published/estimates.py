"""Points about caches of experts whose routing nobody published: what our models of routing say.

A conversation has a Zipf popularity of experts, its exponent 1.4 unless something else is known. Of a recording with
several figures the first one sets the exponent, and the others are forecasts. Shares in %, in points.
"""

from __future__ import annotations

from collections.abc import Iterator

from bench.published.points import Point, published
from hw_targets.expert_cache import expected_hit_rate
from hw_targets.routing import MIXED, SESSION, Router

MEAN_EXPERT_MIB = {"gemma": 676.4 / 180, "gpt-oss": 907.7 / 72}  # experts of one token over their number, as recorded
# The exponents with which P229, P247, P339 and P252 come out.
GPT_OSS, FLASH, MIXED_WORK, QWEN3 = (Router(exponent=e) for e in (1.247, 0.785, 1.24, 2.02))
_SETS = "the exponent of this recording"
_UNIFORM = "its router is not uniform, or its cache does not forget as LRU does: theory says 50"


def _global(name: str, layers: int, top_k: int, mib: float, router: Router) -> tuple[float, ...]:
    slots = int(mib / MEAN_EXPERT_MIB[name])
    return (100 * expected_hit_rate(experts=128, top_k=top_k, layers=layers, slots=slots, router=router),)


def _per_layer(experts: int, top_k: int, slots: int, router: Router, tokens: int | None = None) -> tuple[float, ...]:
    found = expected_hit_rate(
        experts=experts, top_k=top_k, layers=48, slots=48 * slots, scope="layer", tokens=tokens, router=router
    )
    return (100 * found,)


def _of_the_phone() -> Iterator[Point]:
    """One cache of all layers."""
    first_uses = "counts the first uses of a short run"
    for i, name, layers, top_k, mib, which, router, why in (
        ("P226", "gemma", 30, 6, 2000, 1, SESSION, ""),
        ("P234", "gemma", 30, 6, 4000, 0, SESSION, ""),
        ("P229", "gpt-oss", 36, 2, 1000, 1, GPT_OSS, ""),
        ("P230", "gpt-oss", 36, 2, 2000, 1, GPT_OSS, ""),
        ("P231", "gpt-oss", 36, 2, 3000, 1, GPT_OSS, ""),
        ("P235", "gpt-oss", 36, 2, 3000, 0, GPT_OSS, first_uses),
    ):
        what = f"{name}, {top_k} of 128 experts, LRU of {mib} MiB"
        yield Point(
            (i,), "estimate", what, published(i, which=which),
            lambda n=name, la=layers, k=top_k, m=mib, r=router: _global(n, la, k, m, r), "%",
            why=why, sets=_SETS if i == "P229" else "",
        )  # fmt: skip


def _of_layers() -> Iterator[Point]:
    """A cache for each layer."""
    flash = [("P247", 0, 93), ("P248", 0, 186), ("P249", 0, 279), ("P250", 0, 372), ("P251", 0, 512)]
    mixed = [("P339", 0, 64), ("P339", 1, 128)]
    qwen = [("P252", prompt, 51) for prompt in range(3)]
    for rows, what, experts, top_k, router, tokens in (
        (flash, "10 of 512 experts, 300 tokens, LRU of {} a layer", 512, 10, FLASH, 300),
        (mixed, "10 of 512 experts, mixed work, LRU of {} a layer", 512, 10, MIXED_WORK, None),
        (qwen, "8 of 128 experts, LRU of {} a layer, prompt {}", 128, 8, QWEN3, None),
    ):
        for n, (i, which, slots) in enumerate(rows):
            yield Point(
                (i,), "estimate", what.format(slots, which + 1), published(i, which=which),
                lambda e=experts, k=top_k, s=slots, r=router, t=tokens: _per_layer(e, k, s, r, t), "%",
                sets="" if n else _SETS,
            )  # fmt: skip


def points() -> Iterator[Point]:
    """All estimates."""
    yield from _of_the_phone()
    yield from _of_layers()
    yield Point(
        ("P258",), "estimate", "2 of 8 experts chosen uniformly, half of them cached", published("P258"),
        lambda: _per_layer(8, 2, 4, MIXED), "%", why=_UNIFORM,
    )  # fmt: skip
