"""Which policy suits a trace and a size, how far it is from Belady's bound, and warnings of sizes that work badly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hw_targets.expert_cache.policies import ON_LINE
from hw_targets.expert_cache.replay import SCOPES, Entry, ReplayResult, replay
from hw_targets.routing.trace import RoutingTrace

_TIE = 0.001  # a simpler policy is kept unless another hits this much more often


@dataclass(frozen=True)
class CacheWarning:
    """A size or policy that will disappoint. `code` is for programs, `text` for people; `needed_bytes` mends it."""

    code: str  # "lru-cliff" | "share-below-token" | "cache-below-layer" | "holds-everything"
    text: str
    needed_bytes: int


def cache_warnings(
    expert_bytes: Sequence[int],
    experts: int,
    experts_per_pass: float,
    capacity_bytes: int,
    *,
    policy: str = "lru",
    scope: str = "global",
) -> tuple[CacheWarning, ...]:
    """What is to be said about a cache before anything runs.

    `expert_bytes`: of one expert of each layer; `experts_per_pass`: distinct experts that a pass asks of a layer (top_k
    for one token). No warning for a cache of nothing.
    """
    found = []
    cycle = int(sum(expert_bytes) * experts_per_pass)
    everything = sum(expert_bytes) * experts
    largest = int(max(expert_bytes, default=0) * experts_per_pass)
    if capacity_bytes <= 0 or not expert_bytes:
        return ()
    if capacity_bytes >= everything:
        text = f"the cache holds all {_size(everything)} of experts: keep them resident, a cache only costs then"
        return (CacheWarning("holds-everything", text, everything),)
    if scope == "global" and policy == "lru" and capacity_bytes < cycle:
        text = (
            f"LRU below one token cycle never hits: {_size(capacity_bytes)} for all layers, while one pass asks for "
            f"{_size(cycle)}; take {_size(cycle)}, another policy (least_stale, lfu), or a share for each layer"
        )
        found.append(CacheWarning("lru-cliff", text, cycle))
    if scope == "layer" and capacity_bytes // len(expert_bytes) < largest:
        text = (
            f"a layer's share of {_size(capacity_bytes // len(expert_bytes))} is less than the {_size(largest)} that "
            f"one pass asks of it: experts of one pass stay beyond the budget, or are read in pieces"
        )
        found.append(CacheWarning("share-below-token", text, largest * len(expert_bytes)))
    if scope == "global" and capacity_bytes < largest:
        text = (
            f"the cache of {_size(capacity_bytes)} is less than the {_size(largest)} that one pass asks of one layer: "
            f"a layer's experts are read in pieces"
        )
        found.append(CacheWarning("cache-below-layer", text, largest))
    return tuple(found)


def _size(nbytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if nbytes < 10000:
            return f"{nbytes:.4g} {unit}"
        nbytes /= 1024
    return f"{nbytes:.4g} GiB"


@dataclass(frozen=True)
class PolicyChoice:
    """The best of what was replayed. All results, Belady's too, count the second half of the passes only, after the
    first half has filled the cache; pinned experts were chosen by the first half."""

    best: ReplayResult
    pinned: tuple[Entry, ...]  # of the best; empty unless it pins
    candidates: tuple[tuple[str, ReplayResult], ...]  # (name, result), best first
    bound: ReplayResult  # Belady, one budget for all layers
    warnings: tuple[CacheWarning, ...]  # of the best


def choose_policy(trace: RoutingTrace, capacity_bytes: int, *, scopes: Sequence[str] = SCOPES) -> PolicyChoice:
    """Replays every on-line policy, with one budget and with shares, and pinned popular experts with LRU or LFU.

    Candidates that held more than the capacity are left out while others held less. A simpler policy wins ties.
    """
    half = len(np.unique(trace.batch)) // 2
    found: list[tuple[str, ReplayResult, tuple[Entry, ...]]] = []
    for scope in scopes:
        for policy in ON_LINE:
            name = policy if scope == "global" else f"{policy}, by layer"
            found.append((name, replay(trace, capacity_bytes, policy=policy, scope=scope, first_step=half), ()))
    if "global" in scopes:
        popular = popular_entries(trace, capacity_bytes // 2, last_step=half)
        for policy in ("lru", "lfu") if popular else ():
            result = replay(trace, capacity_bytes, policy=policy, pinned=popular, first_step=half)
            found.append((f"half pinned, {policy}", result, popular))
    least = min(result.peak_bytes for _, result, _ in found)
    fitting = [entry for entry in found if entry[1].peak_bytes <= max(capacity_bytes, least)]
    best = fitting[0]
    for entry in fitting[1:]:
        if entry[1].decode_hit_rate > best[1].decode_hit_rate + _TIE:
            best = entry
    return PolicyChoice(
        best=best[1],
        pinned=best[2],
        candidates=tuple(
            (name, result) for name, result, _ in sorted(fitting, key=lambda entry: -entry[1].decode_hit_rate)
        ),
        bound=replay(trace, capacity_bytes, policy="belady", first_step=half),
        warnings=cache_warnings(
            trace.expert_bytes,
            trace.expert_count,
            trace.top_k,
            capacity_bytes,
            policy=best[1].policy,
            scope=best[1].scope,
        ),
    )


def popular_entries(trace: RoutingTrace, capacity_bytes: int, *, last_step: int | None = None) -> tuple[Entry, ...]:
    """The (layer index, expert) pairs with most batches for each byte, as many as fit; of passes before `last_step`."""
    counts: dict[Entry, int] = {}
    for batch in trace.requests:
        if last_step is None or batch.step < last_step:
            for expert in batch.experts:
                counts[batch.layer, expert] = counts.get((batch.layer, expert), 0) + 1
    chosen = []
    left = capacity_bytes
    for entry in sorted(counts, key=lambda e: (-counts[e] / trace.expert_bytes[e[0]], e)):
        if trace.expert_bytes[entry[0]] <= left:
            left -= trace.expert_bytes[entry[0]]
            chosen.append(entry)
    return tuple(chosen)


def hit_curve(
    trace: RoutingTrace, capacities: Sequence[int], *, policy: str = "lru", scope: str = "global"
) -> tuple[ReplayResult, ...]:
    """One replay for each capacity in bytes."""
    return tuple(replay(trace, capacity, policy=policy, scope=scope) for capacity in capacities)


def knee(curve: Sequence[ReplayResult]) -> ReplayResult:
    """The result after which more memory buys less than on average: the farthest above the straight line from the first
    to the last of the curve, which ascends by capacity."""
    first, last = curve[0], curve[-1]
    span = max(1, last.capacity_bytes - first.capacity_bytes)
    rise = last.decode_hit_rate - first.decode_hit_rate
    above = [
        r.decode_hit_rate - first.decode_hit_rate - rise * (r.capacity_bytes - first.capacity_bytes) / span
        for r in curve
    ]
    return curve[int(np.argmax(above))]
