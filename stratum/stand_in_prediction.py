"""What stand-ins for missing experts will do: how many are used, and what that saves a decode step.

    use = stand_in_use(manifest, share=0.2, hit=0.4, batch=1)     # StandInUse, None without copies
    foretold(manifest, stream, prompt=40, steps=127)              # Counts(lookups, stand_ins) of a whole run

An expert is light where it has less than `share` of the weight of every token that chose it. How often that is so is a
matter of the router: of a trace that has weights it is counted, else the router's logits are taken as normal with
`SPREAD`, which fits what a trained model was measured to do (docs/streaming.md). Missing and light are taken as
independent, and copies as being in memory as often as experts. A run begins with an empty cache: also where all experts
have room in the end, those that were not asked for yet are missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hw_targets.routing.trace import RoutingTrace
from passes.place.routing_model import distinct_experts, fading_hit_rate, inclusion
from runtime.manifest import Manifest
from runtime.stand_ins import stand_in_pieces
from runtime.stream_plan import StreamPlan

SPREAD = 3.0  # standard deviation of a router's logits
_DRAWS = 4096


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
    """The same with the hits of a drawn conversation, as plans foretell them."""
    pieces = [piece for piece in manifest.weights.pieces if piece.kind == "experts"]
    if not pieces:
        return None
    piece = pieces[0]
    slots = stream.expert_bytes_in(1, stream.kv_bytes // 2) // len(pieces) // (piece.bytes // piece.count)
    hit = fading_hit_rate(piece.count, manifest.experts_per_token, min(slots, piece.count))
    return expected_counts(manifest, stream, hit, prompt, steps)


def expected_counts(manifest: Manifest, stream: StreamPlan, hit: float, prompt: int, steps: int) -> Counts | None:
    """Of a prompt and `steps` single tokens behind it, from an empty cache; None without copies.

    `hit` is the share that would be found once the cache is full. Before, an expert is there only if it was read: when
    a token asked for it to which it was not light.
    """
    lookups = used = 0.0
    layers = sum(piece.kind == "experts" for piece in manifest.weights.pieces)
    experts = max((piece.count for piece in manifest.weights.pieces if piece.kind == "experts"), default=0)
    top_k = manifest.experts_per_token
    most = min(stream.tokens_at_once(manifest), max(program.max_tokens for program in manifest.programs))
    calls = [(first, min(most, prompt - first), 1) for first in range(0, prompt, most)]
    for before, tokens, times in [*calls, *([(prompt, 1, steps)] if steps else [])]:
        there = hit * read_before(experts, top_k, light_share(experts, top_k, stream.stand_ins), before, tokens, times)
        use = stand_in_use(manifest, stream.stand_ins, there, tokens)
        if use is None:
            return None
        asked = times * layers * distinct_experts(experts, top_k, tokens)
        lookups, used = lookups + asked, used + asked * use.used
    return Counts(round(lookups), round(used))


def read_before(experts: int, top_k: int, light: float, before: int, tokens: int, times: int) -> float:
    """Of the experts that `times` steps of `tokens` tokens ask for behind `before` others, the share that any of those
    before asked for as more than a light one; in a drawn conversation."""
    chances = np.array(inclusion(experts, top_k))
    asked = 1.0 - (1.0 - chances) ** tokens
    unread = 1.0 - chances * (1.0 - light)
    behind = before + tokens * np.arange(times)
    return float(np.mean((1.0 - unread ** behind[:, None]) @ asked) / asked.sum())
