"""What is predicted and measured: models, number formats, budgets, depths and batches; a list, grouped by process.

A `Case` is one phase: a decode step of `batch` sequences behind `depth` tokens each, or a prompt of `depth` tokens. The
cases of one `Run` share an opened model.
"""

from __future__ import annotations

from dataclasses import dataclass

STEPS = 6  # of a decode turn
TURNS = 16
PROMPT_TURNS = 8


@dataclass(frozen=True)
class Case:
    """`phase` is "decode" or "prefill"."""

    phase: str
    depth: int
    batch: int = 1

    @property
    def context(self) -> int:
        """Positions that a sequence needs."""
        return self.depth + (STEPS if self.phase == "decode" else 0)


@dataclass(frozen=True)
class Run:
    """One model in one format ("bf16": unchanged) under one budget ("": none), and its cases."""

    model: str
    recipe: str
    memory: str
    cases: tuple[Case, ...]

    @property
    def context(self) -> int:
        """Positions of every sequence."""
        return max(case.context for case in self.cases)

    @property
    def batch(self) -> int:
        """Sequences at once, at most."""
        return max(case.batch for case in self.cases)


def _decode(*depths: int, batches: tuple[int, ...] = ()) -> tuple[Case, ...]:
    return (*(Case("decode", depth) for depth in depths), *(Case("decode", 128, b) for b in batches))


def _prefill(*tokens: int) -> tuple[Case, ...]:
    return tuple(Case("prefill", n) for n in tokens)


RUNS = (
    Run("qwen2-0.5b", "bf16", "", (*_decode(128, 1024, batches=(4, 8)), *_prefill(512))),
    Run("qwen2-0.5b", "bf16", "640MiB", (*_decode(128), *_prefill(512))),
    Run("qwen2-0.5b", "w4a8-g32", "", (*_decode(128, 1024, batches=(4,)), *_prefill(512))),
    Run("llama-1.1b", "w8a8", "", (*_decode(128, batches=(4, 8)), *_prefill(128, 512))),
    Run("llama-1.1b", "w8a8", "1GiB", (*_decode(128), *_prefill(512))),
    Run("llama-1.1b", "w8a8", "768MiB", _decode(128)),
    Run("llama-1.1b", "w4a8-g32", "", (*_decode(128, 1024, 2048, batches=(4, 8)), *_prefill(512, 1024))),
    Run("llama-1.1b", "w3", "", (*_decode(128), *_prefill(512))),
    Run("olmoe-1b-7b", "w4a8-g32", "", (*_decode(128, batches=(4,)), *_prefill(512))),
    Run("olmoe-1b-7b", "w4a8-g32", "2GiB", (*_decode(128), *_prefill(512))),
    Run("olmoe-1b-7b", "w4a8-g32", "1GiB", _decode(128)),
)
