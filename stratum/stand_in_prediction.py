"""What stand-ins for missing experts will do: how many are used, and what that saves a decode step.

    use = stand_in_use(manifest, share=0.2, hit=0.4, batch=1)     # StandInUse, None without copies
    foretold(manifest, stream, prompt=40, steps=127)              # Counts(lookups, stand_ins) of a whole run

An expert is light where it has less than `share` of the weight of every token that chose it. How often that is so is a
matter of the router: of a trace that has weights it is counted, else the router's logits are taken as normal with
`SPREAD`, which fits what a trained model was measured to do (docs/streaming.md). For a step, missing and light are
taken as independent, and copies as being in memory as often as experts. Of a whole run neither is so: an expert that
counts little for one token does for the next, and is then never read; so conversations are drawn and replayed, from an
empty cache.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from statistics import fmean

import numpy as np

from hw_targets.expert_cache import replay
from hw_targets.expert_cache.replay import StandIns
from hw_targets.routing.synthetic import SESSION, synthetic_trace
from hw_targets.routing.trace import RoutingTrace
from passes.place.routing_model import distinct_experts
from runtime.manifest import Manifest
from runtime.stand_ins import stand_in_pieces
from runtime.stream_plan import StreamPlan

SPREAD = 3.0  # standard deviation of a router's logits
_DRAWS = 4096
_SESSIONS, _LAYERS, _STEPS = 4, 8, 256  # that are drawn for a run, at most


@dataclass(frozen=True)
class StandInUse:
    """`light`: of the experts that a step asks for, the share that counts little enough; `size`: bytes of a copy over
    those of an expert; `missing`: the share of experts that are not in memory; `source` says how `light` is known."""

    share: float
    light: float
    size: float
    missing: float
    source: str

    @property
    def used(self) -> float:
        """Of the experts that a step asks for, those computed from a copy."""
        return self.light * self.missing

    @property
    def read(self) -> float:
        """Bytes read for missing experts, over what they are without stand-ins."""
        return 1.0 - self.light + self.light * self.missing * self.size

    @property
    def computed(self) -> float:
        """Bytes of experts that a step computes with, over what they are without stand-ins."""
        return 1.0 - self.used * (1.0 - self.size)


@dataclass(frozen=True)
class Counts:
    """Of a whole run: experts asked for, and those computed from a copy."""

    lookups: int
    stand_ins: int


def stand_in_use(
    manifest: Manifest, share: float, hit: float, batch: int = 1, trace: RoutingTrace | None = None
) -> StandInUse | None:
    """Of steps of `batch` sequences that find the share `hit` of their experts in memory; None without copies."""
    copies = stand_in_pieces(manifest)
    if not share or not copies:
        return None
    pieces = manifest.weights.pieces
    size = sum(pieces[n].bytes for n in copies.values()) / sum(pieces[n].bytes for n in copies)
    experts = max(pieces[n].count for n in copies)
    alone, source = _light_of_trace(trace, share) if trace is not None else None, "the trace's weights"
    if alone is None:
        alone, source = light_share(experts, manifest.experts_per_token, share), "drawn router weights"
    light = alone ** _askers(experts, manifest.experts_per_token, batch)
    return StandInUse(share, light, size, 1.0 - hit, source)


def _askers(experts: int, top_k: int, tokens: int) -> float:
    """Tokens of a step that ask for an expert, of those that any asks for."""
    return tokens * top_k / min(distinct_experts(experts, top_k, tokens), tokens * top_k)


def _light_of_trace(trace: RoutingTrace, share: float) -> float | None:
    """Of the experts that tokens chose, those with less than `share` of the token's weight; None where it has none."""
    weights = trace.weights.astype(np.float64)
    whole = weights.sum(axis=-1, keepdims=True)
    known = np.isfinite(whole) & (whole > 0)
    if not known.any():
        return None
    shares = weights / np.where(known, whole, 1.0)
    return float(np.mean(shares[np.broadcast_to(known, shares.shape)] < share))


@lru_cache(maxsize=256)
def light_share(experts: int, top_k: int, share: float) -> float:
    """Of the experts that a token asks for, those with less than `share` of its weight."""
    logits = SPREAD * np.random.Generator(np.random.PCG64(7)).standard_normal((_DRAWS, experts))
    chosen = np.sort(logits, axis=1)[:, -top_k:]
    weights = np.exp(chosen - chosen[:, -1:])
    return float(np.mean(weights / weights.sum(axis=1, keepdims=True) < share))


def foretold(manifest: Manifest, stream: StreamPlan, prompt: int, steps: int) -> Counts | None:
    """Of a prompt and `steps` single tokens behind it, from an empty cache: drawn conversations, replayed by the rules
    of the cache. Long runs of many layers are counted on a part of both. None without copies."""
    pieces = manifest.weights.pieces
    copies = stand_in_pieces(manifest)
    if not stream.stand_ins or not copies:
        return None
    layers, drawn = len(copies), min(len(copies), _LAYERS)
    experts, top_k = max(pieces[n].count for n in copies), manifest.experts_per_token
    sizes = [(pieces[n].bytes // pieces[n].count, pieces[m].bytes // pieces[m].count) for n, m in copies.items()]
    whole, low = (round(fmean(size[i] for size in sizes)) for i in (0, 1))
    capacity = stream.expert_bytes_in(1, stream.kv_bytes // 2) * drawn // layers
    rule = StandIns(stream.stand_ins, (low,) * drawn)
    played, lookups, used = min(steps, _STEPS), 0.0, 0.0
    for seed in range(_SESSIONS):
        trace = conversation(experts, top_k, drawn, prompt, played, whole, seed)
        found = replay(trace, capacity, policy=stream.policy, scope=stream.scope, stand_ins=rule)
        lookups += found.lookups
        used += found.stand_ins
    asked = distinct_experts(experts, top_k, prompt) + steps * distinct_experts(experts, top_k, 1)
    return Counts(round(layers * asked), round(layers * asked * used / max(1.0, lookups)))


def conversation(
    experts: int, top_k: int, layers: int, prompt: int, steps: int, expert_bytes: int, seed: int
) -> RoutingTrace:
    """A drawn one, whose weights are those of a router with logits of `SPREAD`: an expert that is popular in it counts
    much, one that is not counts little whenever it is chosen."""
    drawn = synthetic_trace(
        SESSION, experts=experts, top_k=top_k, layers=layers, tokens=steps, prompt=prompt, expert_bytes=expert_bytes,
        seed=seed,
    )  # fmt: skip
    popularity = SESSION.exponent * np.log(np.arange(1, experts + 1))
    spread = float(np.hypot(np.std(popularity), np.pi / np.sqrt(6.0)))  # and that of Gumbel noise
    weights = np.maximum(drawn.weights.astype(np.float64), np.finfo(np.float64).tiny) ** (SPREAD / spread)
    return replace(drawn, weights=(weights / weights.sum(axis=-1, keepdims=True)).astype(np.float32))
