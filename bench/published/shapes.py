"""Shapes of published series: a straight line, saturation, what hardly changes; theirs and ours beside each other."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from statistics import linear_regression

from bench.published.cases import entries
from bench.published.orders import milliseconds_with_layers
from bench.published.points import published
from bench.published.rooflines import product_seconds, tokens_by_cores
from passes.place.expert_options import option_with

Figures = tuple[float, ...]
LAYERS = (10, 20, 30, 31, 32)
_LLAMA_BENCH = "ggml-org/llama.cpp:examples/llama-bench/README.md"


@dataclass(frozen=True)
class Shape:
    """Two series of one form, and whether they `agree`. `why` says what is known where they do not."""

    what: str
    asked: str
    unit: str
    published: Figures
    ours: Callable[[], Figures]
    agree: Callable[[Figures, Figures], bool]
    source: str
    why: str = ""

    def agrees(self) -> bool:
        return self.agree(self.published, self.ours())


def line(milliseconds: Figures) -> Figures:
    """(ms without any layer on the GPU, ms a layer saves, largest distance from that line) of a series of `LAYERS`."""
    found = linear_regression(LAYERS, milliseconds)
    off = max(abs(found.intercept + found.slope * n - ms) for n, ms in zip(LAYERS, milliseconds, strict=True))
    return found.intercept, -found.slope, off


def _same_line(theirs: Figures, ours: Figures) -> bool:
    straight = all(off <= 0.02 * start for start, _, off in (theirs, ours))
    return straight and all(abs(b / a - 1.0) <= 0.15 for a, b in zip(theirs[:2], ours[:2], strict=True))


def _saturate(*series: Figures) -> bool:
    """Faster up to eight cores, and no faster with more."""
    return all(all(a < b for a, b in pairwise(s[:4])) and s[4] <= s[3] for s in series)


def _rise(*series: Figures) -> bool:
    return all(all(a < b for a, b in pairwise(s)) for s in series)


def _fall(*series: Figures) -> bool:
    return all(all(a > b for a, b in pairwise(s)) for s in series)


def _near(theirs: Figures, ours: Figures) -> bool:
    return all(abs(b / a - 1.0) <= 0.25 for a, b in zip(theirs, ours, strict=True))


def _products() -> Figures:
    """Microseconds of rows x 4096 x 12288 on a V100."""
    name = "v100-dgx2{gpu.peak.f16=112TFLOP/s}"
    return tuple(1e6 * product_seconds(name, 2**n, 4096, 12288, peak=False) for n in range(5, 13))


def _chunks() -> Figures:
    return tuple(dataclasses.replace(entries()["P104"].case, chunk=n).prefill() for n in (128, 256, 512, 1024))


def _long_cache() -> Figures:
    """DeepSeek-V3 with 1024 and 8192 tokens of cache."""
    case = entries()["P124"].case
    return tuple(dataclasses.replace(case, prompt=n - case.generate // 2).decode() for n in (1024, 8192))


@lru_cache(maxsize=1)
def _experts_of_imp() -> Figures:
    """All there, 88.7 % found in slots and the rest brought, all brought."""
    there, brought = entries()["P253"].case, entries()["P255"].case
    problem = dataclasses.replace(brought.problem(), cached=lambda *_: 0.887)
    part = next(p for p in problem.parts() if p.experts)
    whole, slots = (option_with(problem, part, "cached", "gpu", "dram", n) for n in (part.experts, part.experts // 2))
    assert whole is not None and slots is not None
    all_found = dataclasses.replace(problem, cached=lambda *_: 1.0)
    found = option_with(all_found, part, "cached", "gpu", "dram", part.experts // 2)
    assert found is not None
    more = part.count * (slots.decode.waited - found.decode.waited)
    return there.decode(), 1.0 / (there.step() + more), brought.decode()


def shapes() -> tuple[Shape, ...]:
    """All of them, in the order of the page."""
    layers = (13.45, *(published(i)[0] for i in ("P090", "P091", "P092", "P093")))
    return (
        Shape(
            "LLaMA-7B Q4_0 with 10, 20, 30, 31, 32 of 32 layers on the GPU: ms without any, ms a layer saves, largest "
            "distance from that line",
            "a straight line (2 %), both constants within 15 %",
            "ms",
            line(tuple(1e3 / rate for rate in layers)),
            lambda: line(tuple(milliseconds_with_layers(n) for n in LAYERS)),
            _same_line,
            _LLAMA_BENCH,
        ),
        Shape(
            "the same by 1, 2, 4, 8, 16 threads of the CPU",
            "faster up to eight cores, then not (the first sets a constant)",
            "tok/s",
            (4.05, published("P098")[0], published("P099")[0], 16.71, 15.32),
            lambda: tuple(tokens_by_cores(n, peak=False) for n in (1, 2, 4, 8, 16)),
            _saturate,
            _LLAMA_BENCH,
        ),
        Shape(
            "the same, a prompt of 1024 in passes of 128, 256, 512, 1024",
            "rising (the first and the last set constants)",
            "tok/s",
            (1436.51, published("P104")[0], published("P105")[0], 2498.61),
            _chunks,
            _rise,
            _LLAMA_BENCH,
        ),
        Shape(
            "DeepSeek-V3 beside two sockets with a cache of 1024 and 8192 tokens (a latent cache is nearly free)",
            "less than 10 % slower",
            "tok/s",
            (13.5, 12.4),
            _long_cache,
            lambda *series: all(0.9 <= b / a <= 1.0 for a, b in series),
            "kvcache-ai/ktransformers:doc/en/DeepseekR1_V3_tutorial.md",
        ),
        Shape(
            "Qwen3-30B-A3B: experts on the GPU; 88.7 % found in slots there; all brought",
            "falling",
            "tok/s",
            (published("P253")[0], 24.98, published("P255")[0]),
            _experts_of_imp,
            _fall,
            "kekzl/imp PR #1365",
        ),
        Shape(
            "the same, slots beside all brought: what hits gain",
            "within 25 %",
            "x",
            (24.98 / published("P255")[0],),
            lambda: (_experts_of_imp()[1] / _experts_of_imp()[2],),
            _near,
            "kekzl/imp PR #1365",
            "ours counts bytes; there the host waits for the router of each layer, hit or miss",
        ),
        Shape(
            "V100-PCIE-16GB, f16: products of 32, 64, ... 4096 rows with 4096 x 12288",
            "each within 25 %",
            "us",
            (148, 151, 239, 369, 643, 1334, 2357, 4917),
            _products,
            _near,
            "microsoft/apex_plus:profile/comp/V100-PCIE-16GB/gemm_0.csv",
        ),
    )
