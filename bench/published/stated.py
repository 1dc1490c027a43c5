"""Rooflines for which an ideal and the efficiency reached are stated: theirs beside ours.

A row is agreed on when our ideal is within `CLOSE` of the stated one and the share within `SHARE`, counted from the
same published measurement. An ideal is a time at the peaks of the machine, or the bytes that the published rate moves
in a second where the share is one of a bandwidth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import hw_targets
from bench.published.cases import target
from bench.published.ours import Case, shape_named
from bench.published.points import published
from passes.place.formats import formats_of

CLOSE = 0.03
SHARE = 0.02
FLOAT8, FOUR = "w8a8-fp8,kv8", "w4a16-g32"


@dataclass(frozen=True)
class Stated:
    """`ideal` and `share`, lowest and highest, as stated for a `measured` figure; `ours()` is (ideal, share).

    `note` says why ours counts otherwise.
    """

    what: str
    unit: str
    measured: str
    ideal: tuple[float, float]
    share: tuple[float, float]
    ours: Callable[[], tuple[float, float]]
    note: str = ""

    def agrees(self) -> bool:
        """Whether both are close."""
        ideal, share = self.ours()
        close = self.ideal[0] * (1.0 - CLOSE) <= ideal <= self.ideal[1] * (1.0 + CLOSE)
        return close and self.share[0] - SHARE <= share <= self.share[1] + SHARE


def _first_token(what: str, case: Case, measured: float, ideal: float, share: float) -> Stated:
    def ours() -> tuple[float, float]:
        found = case.first_token(peak=True)
        return found, found / measured

    return Stated(f"{what}: first token of 2048", "ms", f"{measured:g} ms", (ideal, ideal), (share, share), ours)


def _step(what: str, case: Case, measured: float, ideal: float, share: float) -> Stated:
    def ours() -> tuple[float, float]:
        found = 1e3 * case.step(peak=True)
        return found, found / measured

    return Stated(what, "ms", f"{measured:.3g} ms", (ideal, ideal), (share, share), ours)


def _rate(
    what: str,
    nbytes: Callable[[], float],
    tokens: float,
    peak: float,
    rates: tuple[float, ...],
    shares: tuple[float, ...],
    note: str = "",
) -> Stated:
    """`tokens` a second, each of which reads `nbytes` of a memory of `peak` bytes a second."""

    def ours() -> tuple[float, float]:
        rate = nbytes() * tokens
        return rate / 1e9, rate / peak

    ends = (min(rates), max(rates)), (min(shares), max(shares))
    return Stated(what, "GB/s", f"{tokens:g} tok/s", *ends, ours, note)


def _weights(model: str, recipe: str, *, dtype: str = "f16", groups: tuple[str, ...] = ()) -> float:
    """Bytes that a token reads of the weights, its own experts only; of some groups where they are named."""
    parts = Case(model, "a100-80gb{hbm=2TB}", recipe, dtype=dtype).problem().parts()
    read = ((p.group, p.count * (p.expert_bytes * p.top_k if p.experts else p.nbytes)) for p in parts)
    return float(sum(nbytes for group, nbytes in read if (group in groups if groups else group != "embedding")))


def _read(name: str, tier: str) -> float:
    found = hw_targets.load(target(name)).tier(tier)
    assert found is not None and found.read_bandwidth is not None
    return found.read_bandwidth


def _times() -> Iterator[Stated]:
    seven, large = "Llama-2-7b-hf", "Llama-2-70b-hf"
    yield _first_token(
        "LLaMA-7B, A100", Case(seven, "a100-80gb", prompt=2048, generate=1), published("P303")[0], 90.3, 0.68
    )
    four = Case(large, "8xa100-80gb", tensor=4, prompt=2048, generate=1)
    yield _first_token("LLaMA-70B, 4 A100", four, published("P305")[0], 229.9, 0.61)
    falcon = Case("falcon-180B", "8xa100-80gb", tensor=8, prompt=2048, generate=1)
    yield _first_token("Falcon-180B, 8 A100", falcon, published("P306")[0], 297.7, 0.58)
    yield _first_token(
        "LLaMA-7B in 8 bits, H100", Case(seven, "h100-sxm", FLOAT8, prompt=2048, generate=1), 36.0, 14.2, 0.40
    )
    four = Case(large, "8xh100", FLOAT8, tensor=4, prompt=2048, generate=1)
    yield _first_token("LLaMA-70B in 8 bits, 4 H100", four, published("P308")[0], 36.2, 0.33)
    case = Case("Llama-2-13b-hf", "a100-40gb", prompt=512, generate=10)
    yield _step("FasterTransformer, 13B, A100-40GB: decode", case, 22.0, 17.07, 0.78)
    case = Case(large, "h200-sxm", FLOAT8, batch=192, prompt=128, generate=2048, context=1152)  # half of the answers
    yield _step("TensorRT-LLM with XQA, 70B in 8 bits, H200, 192 sequences: decode", case, 192e3 / 2941, 21.9, 0.33)


def _rates() -> Iterator[Stated]:
    def seven() -> float:
        return _weights("Llama-2-7b-hf", FOUR)

    def routed() -> float:
        return _weights("DeepSeek-V3", FOUR, dtype="bf16", groups=("experts",))

    peak = _read("rtx-3090-ti", "vram")
    yield _rate("llama.cpp, 7B Q4_0, RTX 3090 Ti", seven, published("P096")[0], peak, (503,), (0.5,))
    yield _rate("llama.cpp, 7B Q4_0, i9-13900K", seven, 18.27, _read("i9-13900k", "dram"), (69.8,), (0.68,))
    peak = _read("m1-max", "unified")
    yield _rate("llama.cpp, 16.34 GB in IQ4_NL, M1 Max", lambda: 16.34e9, published("P111")[0], peak, (233,), (0.58,))
    what, peak = "KTransformers, routed experts of DeepSeek-V3", _read("kt-socket", "dram")
    yield _rate(f"{what}, one socket", routed, published("P118")[0], peak, (100, 108), (0.33, 0.35))
    yield _rate(f"{what}, two sockets", routed, 12.2, 2 * peak, (140, 151), (0.23, 0.25))
    for size, model, tokens in ((70, "Llama-2-70b-hf", 3.44), (7, "Llama-2-7b-hf", 36.34)):
        peak, note = _read("cambricon-llm", "flash"), f"theirs are {size}e9 bytes, ours with the scales of groups of 32"
        share = size * 1e9 * tokens / peak
        yield _rate(
            f"Cambricon-LLM, {size}B in 8 bits", lambda m=model: _weights(m, "w8a8"), tokens, peak, (size * tokens,),
            (share,), note,
        )  # fmt: skip


def _flash() -> Stated:
    """2.4 % of the feed-forward weights of OPT-6.7B in 32 bits, read in 125 ms."""

    def ours() -> tuple[float, float]:
        shape, formats = shape_named("opt-6.7b"), formats_of("", "f32")
        mlp = sum(
            formats.nbytes(t)
            for layer in shape.layers
            for t in shape.tensors(layer)
            if t.role.startswith("mlp.") and t.is_product
        )
        return 0.024 * mlp / 1e6, 0.024 * mlp / 0.125 / 1e9

    return Stated(
        "LLM in a flash: a token's neurons of OPT-6.7B; share: GB/s", "MB", "125 ms", (416, 416), (3.3, 3.3), ours
    )


def rows() -> tuple[Stated, ...]:
    """All of them, in the order of the page."""
    return (*_times(), *_rates(), _flash())
