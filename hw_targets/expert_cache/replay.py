"""Replays a routing trace through a cache of experts and counts hits, misses and bytes.

The rules are those of an engine that loads a layer's experts once for all tokens of a batch: one lookup for each
distinct expert, misses cost an expert's bytes, entries leave after the batch and never one that the batch uses. The
budget is one for all layers (`global`), or every layer has an equal share of it (`layer`).

With `StandIns`, missing experts of little weight are replaced by copies in fewer bits, as `run --stand-ins` does it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from hw_targets.expert_cache.policies import NEVER, Use, make_cache
from hw_targets.routing.trace import Batch, RoutingTrace
from ir.diagnostics import DiagnosticError

SCOPES = ("global", "layer")
Entry = tuple[int, int]  # (layer index, expert)


@dataclass(frozen=True)
class StandIns:
    """Copies in fewer bits, of `expert_bytes` by layer, for missing experts of less than `share` of the routing weight
    of every token of a batch that chose them."""

    share: float
    expert_bytes: tuple[int, ...]


@dataclass(frozen=True)
class ReplayResult:
    """What happened. Rates are shares from 0 to 1; bytes are those of experts that were missing.

    `preload_bytes`: pinned experts, read before the first token. `peak_bytes`: the most that was held after a batch,
    pinned experts included; above `capacity_bytes` only when batches were larger than their budget by themselves.
    `misses`: experts that were missing, [passes counted, layers], as a simulation of the passes needs them;
    `stand_in_misses` those that were read as stand-ins, which are not among `misses`. `stand_ins`: lookups that a
    stand-in answered, there or read. `expert_misses`: how often each expert was missing while decoding, [layers,
    experts].
    """

    policy: str
    scope: str
    capacity_bytes: int
    lookups: int
    hits: int
    decode_lookups: int
    decode_hits: int
    read_bytes: int
    decode_read_bytes: int
    preload_bytes: int
    peak_bytes: int
    decode_tokens: int
    layer_lookups: tuple[int, ...]
    layer_hits: tuple[int, ...]
    misses: npt.NDArray[np.int32] = field(compare=False, repr=False)
    stand_in_misses: npt.NDArray[np.int32] = field(compare=False, repr=False)
    expert_misses: npt.NDArray[np.int32] = field(compare=False, repr=False)
    stand_ins: int = 0

    @property
    def hit_rate(self) -> float:
        """Of all lookups, those of prompts included."""
        return self.hits / self.lookups if self.lookups else 0.0

    @property
    def decode_hit_rate(self) -> float:
        return self.decode_hits / self.decode_lookups if self.decode_lookups else 0.0

    @property
    def read_bytes_per_token(self) -> float:
        """Bytes read for one decoded token, on average."""
        return self.decode_read_bytes / self.decode_tokens if self.decode_tokens else 0.0


def replay(
    trace: RoutingTrace,
    capacity_bytes: int | None = None,
    *,
    slots: int | None = None,
    policy: str = "lru",
    scope: str = "global",
    pinned: Iterable[Entry] = (),
    first_step: int = 0,
    stand_ins: StandIns | None = None,
) -> ReplayResult:
    """Plays the trace through one cache.

    Either `capacity_bytes` or `slots` (entries whatever their size; bytes in the result are then counted in entries).
    `pinned`: entries that are there from the start, never leave, and count against the budget. Passes before
    `first_step` fill the cache, but are not counted. DiagnosticError for an unknown policy or scope, more pinned
    entries than fit, or stand-ins with a cache that knows the future or counts slots.
    """
    if (capacity_bytes is None) == (slots is None):
        raise ValueError("a replay needs either capacity_bytes or slots")
    if scope not in SCOPES:
        raise DiagnosticError(f"there is no cache scope {scope!r}", expected=", ".join(SCOPES))
    if stand_ins is not None and (policy == "belady" or slots is not None):
        raise DiagnosticError("a replay with stand-ins has a budget in bytes, and a policy that can run")
    capacity = max(0, capacity_bytes if capacity_bytes is not None else slots or 0)
    sizes = trace.expert_bytes if slots is None else (1,) * trace.layer_count
    count = trace.layer_count if scope == "layer" else 1
    held = _pinned_keys(trace, pinned, sizes, capacity // max(count, 1), scope)
    caches = [make_cache(policy, capacity // count - held.bytes_of[index]) for index in range(count)]
    layer_lookups, layer_hits = [0] * trace.layer_count, [0] * trace.layer_count
    decode_lookups = decode_hits = read = decode_read = 0
    following = next_uses(trace.requests) if policy == "belady" else ()
    used = peak = 0
    steps = trace.requests[-1].step + 1 if trace.requests else 0
    misses = np.zeros((max(0, steps - first_step), trace.layer_count), np.int32)
    low_misses, replaced = np.zeros_like(misses), 0
    expert_misses = np.zeros((trace.layer_count, trace.expert_count), np.int32)
    largest = _largest_shares(trace) if stand_ins is not None else {}
    for number, batch in enumerate(trace.requests):
        layer = batch.layer
        cache = caches[layer if scope == "layer" else 0]
        use = _use(batch, trace.expert_count, sizes[layer], held.keys, following[number] if following else ())
        if stand_ins is not None:
            light = {
                layer * trace.expert_count + expert
                for expert, share in largest[batch.step, layer].items()
                if share < stand_ins.share
            }
            _replace(use, {key: -1 - key for key in use.keys if key in light and key not in cache.resident})
            use.low = stand_ins.expert_bytes[layer]
        used -= cache.used
        found = cache.use(use)
        used += cache.used
        missing, low = len(found), sum(key < 0 for key in found)
        if batch.step < first_step:
            continue
        peak = max(peak, used)
        misses[batch.step - first_step, layer] = missing - low
        low_misses[batch.step - first_step, layer] = low
        replaced += sum(key < 0 for key in use.keys)
        lookups = len(batch.experts)
        layer_lookups[layer] += lookups
        layer_hits[layer] += lookups - missing
        nbytes = (missing - low) * sizes[layer] + low * use.low
        read += nbytes
        if batch.decode:
            decode_lookups += lookups
            decode_hits += lookups - missing
            decode_read += nbytes
            expert_misses[layer, [key - layer * trace.expert_count for key in found if key >= 0]] += 1
    return ReplayResult(
        policy=policy,
        scope=scope,
        capacity_bytes=capacity,
        lookups=sum(layer_lookups),
        hits=sum(layer_hits),
        decode_lookups=decode_lookups,
        decode_hits=decode_hits,
        read_bytes=read,
        decode_read_bytes=decode_read,
        preload_bytes=sum(held.bytes_of),
        peak_bytes=sum(held.bytes_of) + peak,
        decode_tokens=_decode_tokens(trace, first_step),
        layer_lookups=tuple(layer_lookups),
        layer_hits=tuple(layer_hits),
        misses=misses,
        stand_in_misses=low_misses,
        expert_misses=expert_misses,
        stand_ins=replaced,
    )


def next_uses(requests: Sequence[Batch]) -> list[tuple[int, ...]]:
    """For each batch and each of its experts the number of the batch that needs it next, NEVER when none does."""
    coming: dict[Entry, int] = {}
    found: list[tuple[int, ...]] = []
    for number in range(len(requests) - 1, -1, -1):
        batch = requests[number]
        entries = [(batch.layer, expert) for expert in batch.experts]
        found.append(tuple(coming.get(entry, NEVER) for entry in entries))
        coming.update(dict.fromkeys(entries, number))
    return found[::-1]


@dataclass(frozen=True)
class _Pinned:
    keys: frozenset[int]  # only asked whether it holds a key
    bytes_of: tuple[int, ...]  # by cache


def _pinned_keys(trace: RoutingTrace, pinned: Iterable[Entry], sizes: Sequence[int], share: int, scope: str) -> _Pinned:
    entries = list(dict.fromkeys(pinned))
    held = [0] * (trace.layer_count if scope == "layer" else 1)
    for layer, expert in entries:
        if not (0 <= layer < trace.layer_count and 0 <= expert < trace.expert_count):
            raise DiagnosticError(f"the pinned expert {expert} of layer index {layer} does not exist")
        held[layer if scope == "layer" else 0] += sizes[layer]
    if max(held) > share:
        raise DiagnosticError(
            f"the pinned experts take {max(held)} bytes{' in one layer' if scope == 'layer' else ''}",
            expected=f"at most {share}",
            hint="pin fewer experts, or give the cache more",
        )
    return _Pinned(frozenset(layer * trace.expert_count + expert for layer, expert in entries), tuple(held))


def _use(batch: Batch, experts: int, size: int, pinned: frozenset[int], following: tuple[int, ...]) -> Use:
    """The batch as a cache takes it: keys, and only those that are not pinned."""
    base = batch.layer * experts
    keys = [base + expert for expert in batch.experts]
    weights: Sequence[float] = batch.weights
    recency = [base + expert for expert in batch.recency] if batch.recency != batch.experts else keys
    if pinned:
        free = [index for index, key in enumerate(keys) if key not in pinned]
        keys = [keys[index] for index in free]
        weights = [weights[index] for index in free]
        following = tuple(following[index] for index in free) if following else ()
        recency = [key for key in recency if key not in pinned]
    return Use(batch.step, batch.layer, keys, recency, weights, following, size)


def _largest_shares(trace: RoutingTrace) -> dict[tuple[int, int], dict[int, float]]:
    """By pass and layer: of each expert the largest share of a token's weight that it has in the batch.

    Choices of unknown weight count alike.
    """
    chosen = trace.experts >= 0
    weights = np.where(chosen, np.where(np.isnan(trace.weights), 1.0, trace.weights.astype(np.float64)), 0.0)
    whole = weights.sum(axis=2, keepdims=True)
    shares = np.where(whole > 0, weights / np.where(whole > 0, whole, 1.0), 1.0 / trace.top_k)
    steps = np.unique(trace.batch, return_inverse=True)[1].reshape(-1).tolist()
    found: dict[tuple[int, int], dict[int, float]] = {}
    for step, ids, parts in zip(steps, trace.experts.tolist(), shares.tolist(), strict=True):
        for layer in range(trace.layer_count):
            known = found.setdefault((step, layer), {})
            for expert, share in zip(ids[layer], parts[layer], strict=True):
                known[expert] = max(share, known.get(expert, 0.0))
    return found


def _replace(use: Use, keys: dict[int, int]) -> None:
    """Puts others in the place of these keys."""
    use.keys = [keys.get(key, key) for key in use.keys]
    use.recency = [keys.get(key, key) for key in use.recency]


def _decode_tokens(trace: RoutingTrace, first_step: int) -> int:
    steps = np.unique(trace.batch, return_inverse=True)[1].reshape(-1)
    return int((trace.decode & (steps >= first_step)).sum())
