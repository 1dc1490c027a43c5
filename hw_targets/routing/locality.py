"""How local a model's routing is: what a cache of experts can live on.

Segment metrics are those of `Not All Models Suit Expert Offloading: On Local Routing Consistency of Mixture-of-Expert
Models` (arXiv 2505.16056), over every window of `length` consecutive tokens:

- SRP, segment routing best performance: declare an expert active for a whole window when at least t of its tokens used
  it; the F1 of that statement over all tokens, at the best t. 1 means that tokens of a window agree entirely.
- SCH, segment cache best hit rate: the share of uses that the best `slots` experts of each window cover, the set being
  fixed within a window.

Windows never reach over the end of a turn. Rates are shares from 0 to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hw_targets.routing.trace import RoutingTrace

Counts = npt.NDArray[np.int64]
_REUSE_WITHIN = 8  # tokens


@dataclass(frozen=True)
class LayerLocality:
    """One layer. `distinct`: experts used at all; `top_quarter_share`: uses that go to the most popular quarter of the
    experts; `overlap`: experts that a token shares with the one before; `srp`, `sch`: at the middle segment length,
    SCH at the middle count of slots."""

    layer: int
    distinct: int
    top_quarter_share: float
    overlap: float
    srp: float
    sch: float


@dataclass(frozen=True)
class Locality:
    """A trace's locality over decoded tokens (all tokens, when none was decoded).

    `overlap`: by lag in tokens, the share of a token's experts that the token so far before used as well.
    `chance_overlap`: what independent uniform choice would give. `reuse_median`: tokens until an expert is used again,
    half of all that are; `reuse_within_8`: uses that are followed by another one within eight tokens. `srp`: by segment
    length. `sch`: by (segment length, slots as a multiple of the experts of a token), a budget for each layer.
    """

    tokens: int
    overlap: dict[int, float]
    chance_overlap: float
    reuse_median: float
    reuse_within_8: float
    distinct_share: float
    srp: dict[int, float]
    sch: dict[tuple[int, float], float]
    layers: tuple[LayerLocality, ...]


def locality(
    trace: RoutingTrace,
    *,
    lags: Sequence[int] = (1, 2, 4, 8, 16),
    lengths: Sequence[int] = (4, 16, 64),
    multiples: Sequence[float] = (1.0, 2.0, 4.0),
) -> Locality:
    """Measures a trace. Lags and lengths that no turn reaches are left out."""
    chosen = trace.decode if trace.decode.any() else np.ones(trace.tokens, bool)
    turns = [trace.experts[chosen & (trace.turn == turn)] for turn in np.unique(trace.turn[chosen]).tolist()]
    longest = max((len(turn) for turn in turns), default=0)
    lags = [lag for lag in lags if lag < longest]
    lengths = [length for length in lengths if length <= longest]
    slots = [max(1, min(trace.expert_count, round(multiple * trace.top_k))) for multiple in multiples]
    shared, pairs = np.zeros((len(lags), trace.layer_count)), np.zeros((len(lags), trace.layer_count))
    segments = [_Segments(trace.layer_count, length, slots) for length in lengths]
    gaps: list[Counts] = []
    used = np.zeros((trace.layer_count, trace.expert_count), np.int64)
    for experts in turns:
        for layer in range(trace.layer_count):
            active = _active(experts[:, layer], trace.expert_count)
            used[layer] += active.sum(axis=0)
            for index, lag in enumerate(lags):
                if lag < len(active):
                    shared[index, layer] += int((active[lag:] & active[:-lag]).sum())
                    pairs[index, layer] += int(active[lag:].sum())
            gaps.append(_gaps(active))
            for segment in segments:
                segment.add(layer, active)
    gap = np.concatenate(gaps) if gaps else np.empty(0, np.int64)
    again = gap[gap > 0]
    overlap = {lag: _ratio(shared[i].sum(), pairs[i].sum()) for i, lag in enumerate(lags)}
    return Locality(
        tokens=int(chosen.sum()),
        overlap=overlap,
        chance_overlap=trace.top_k / trace.expert_count,
        reuse_median=float(np.median(again)) if len(again) else 0.0,
        reuse_within_8=_ratio(int((again <= _REUSE_WITHIN).sum()), len(gap)),
        distinct_share=float((used > 0).mean()) if used.size else 0.0,
        srp={segment.length: segment.srp() for segment in segments},
        sch={
            (segment.length, multiple): segment.sch(index)
            for segment in segments
            for index, multiple in enumerate(multiples)
        },
        layers=tuple(
            LayerLocality(
                layer=number,
                distinct=int((used[index] > 0).sum()),
                top_quarter_share=_top_share(used[index]),
                overlap=_ratio(shared[0, index], pairs[0, index]) if lags else 0.0,
                srp=segments[len(segments) // 2].srp(index) if segments else 0.0,
                sch=segments[len(segments) // 2].sch(len(slots) // 2, index) if segments else 0.0,
            )
            for index, number in enumerate(trace.layers)
        ),
    )


def popularity(trace: RoutingTrace) -> Counts:
    """Uses of each expert: [layers, experts], all tokens."""
    counts = np.zeros((trace.layer_count, trace.expert_count), np.int64)
    for layer in range(trace.layer_count):
        ids = trace.experts[:, layer].reshape(-1)
        counts[layer] = np.bincount(ids[ids >= 0], minlength=trace.expert_count)
    return counts


class _Segments:
    """Sums over the windows of one length. By layer: how many (window, expert) pairs have each count, and the uses that
    the best experts of each window cover."""

    def __init__(self, layers: int, length: int, slots: Sequence[int]) -> None:
        self.length = length
        self._slots = slots
        self._pairs = np.zeros((layers, length + 1), np.int64)
        self._covered = np.zeros((layers, len(slots)), np.int64)
        self._uses = np.zeros(layers, np.int64)

    def add(self, layer: int, active: npt.NDArray[np.bool_]) -> None:
        if len(active) < self.length:
            return
        for counts in _windows(active, self.length):
            self._pairs[layer] += np.bincount(counts.reshape(-1), minlength=self.length + 1)
            ranked = -np.sort(-counts, axis=1)
            self._uses[layer] += int(counts.sum())
            for index, slots in enumerate(self._slots):
                self._covered[layer, index] += int(ranked[:, :slots].sum())

    def srp(self, layer: int | None = None) -> float:
        """Of one layer, or of all with the same threshold."""
        pairs = self._pairs.sum(axis=0) if layer is None else self._pairs[layer]
        matches = (pairs * np.arange(self.length + 1))[::-1].cumsum()[::-1]
        declared = pairs[::-1].cumsum()[::-1] * self.length
        uses = matches[0]
        return max((_ratio(2 * m, d + uses) for m, d in zip(matches[1:], declared[1:], strict=True)), default=0.0)

    def sch(self, index: int, layer: int | None = None) -> float:
        """Of one layer, or of all, at the index-th count of slots."""
        covered, uses = self._covered[:, index], self._uses
        return _ratio(covered.sum(), uses.sum()) if layer is None else _ratio(covered[layer], uses[layer])


def _windows(active: npt.NDArray[np.bool_], length: int) -> Iterator[Counts]:
    """Counts of uses in every window, [windows, experts], a bounded number of windows at once."""
    total = np.concatenate([np.zeros((1, active.shape[1]), np.int64), active.cumsum(axis=0, dtype=np.int64)])
    last = len(active) - length + 1
    for start in range(0, last, 4096):
        end = min(start + 4096, last)
        yield total[start + length : end + length] - total[start:end]


def _active(experts: npt.NDArray[np.int32], count: int) -> npt.NDArray[np.bool_]:
    """[tokens, top_k] ids to [tokens, experts] booleans."""
    active = np.zeros((len(experts), count + 1), bool)
    active[np.arange(len(experts))[:, None], np.where(experts >= 0, experts, count)] = True
    return active[:, :count]


def _gaps(active: npt.NDArray[np.bool_]) -> Counts:
    """For each use the tokens until the expert is used again; 0 when it is not, uses of the last tokens left out."""
    expert, token = np.nonzero(active.T)
    following = np.where(expert[1:] == expert[:-1], token[1:] - token[:-1], 0)
    gaps = np.append(following, 0) if len(token) else np.empty(0, np.int64)
    return gaps[token < len(active) - _REUSE_WITHIN]


def _top_share(counts: Counts) -> float:
    ranked = np.sort(counts)[::-1]
    return _ratio(ranked[: max(1, len(ranked) // 4)].sum(), ranked.sum())


def _ratio(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0
