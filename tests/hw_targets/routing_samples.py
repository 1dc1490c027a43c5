"""Routing traces that the tests share: the recorded one of tests/data/routing, and small ones of given choices."""

from __future__ import annotations

import csv
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np

from hw_targets.routing import RoutingTrace, read_trace

DATA = Path(__file__).parent.parent / "data" / "routing"
MIB = 1 << 20


@lru_cache(maxsize=1)
def qwen_trace() -> RoutingTrace:
    """Qwen3-30B-A3B, 48 layers, top 6 of 128 experts, 28 prompt tokens and 128 decoded ones."""
    return read_trace(DATA / "qwen.route.csv.gz")


def start_of(trace: RoutingTrace, tokens: int) -> RoutingTrace:
    """The first tokens of a trace."""
    columns = ("experts", "weights", "turn", "position", "batch", "decode")
    return replace(trace, **{name: getattr(trace, name)[:tokens] for name in columns})


@lru_cache(maxsize=1)
def published_curve() -> list[tuple[int, str, float, float, float]]:
    """(budget in MiB, policy, hits in % of all lookups, in % of decode lookups, MiB read), as published."""
    with open(DATA / "qwen-curve.csv", encoding="utf-8") as file:
        return [
            (
                int(row["budget_mib"]),
                row["policy"],
                *(float(row[name]) for name in ("hit_pct_cum", "hit_pct_decode", "read_mib")),
            )
            for row in csv.DictReader(file)
        ]


def small_trace(
    choices: object, *, expert_bytes: tuple[int, ...] | None = None, prompt: int = 0, experts: int = 16
) -> RoutingTrace:
    """A trace of choices [tokens][layers][top_k]; its first `prompt` tokens are one batch, each other one its own."""
    ids = np.asarray(choices, np.int32)
    tokens, layers, top_k = ids.shape
    index = np.arange(tokens)
    return RoutingTrace(
        model="small",
        arch="test",
        expert_count=experts,
        top_k=top_k,
        layers=tuple(range(layers)),
        expert_bytes=expert_bytes or (1,) * layers,
        dense_bytes=(0,) * layers,
        experts=ids,
        weights=np.full(ids.shape, np.nan, np.float32),
        turn=np.zeros(tokens, np.int64),
        position=index,
        batch=np.maximum(index - max(prompt, 1) + 1, 0) if prompt else index,
        decode=index >= prompt,
    )
