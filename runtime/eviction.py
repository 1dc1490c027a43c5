"""Policies of the expert cache: which resident entry is given up next.

`make_policy(name, entry_bytes)` takes a name of `POLICIES`. An entry is a pair (layer, expert). A policy is told of
each use (`touch`, whether the entry is resident or not), of arrivals and departures (`add`, `remove`), and names a
`victim` among the resident entries that are not busy.

- `lru`: least recently used.
- `lfu`: least often used since the start, entries that were away included; ties: least recently used.
- `lrfu`: lowest count of uses for each byte that the entry's layer holds, where a use counts half as much after sixteen
  passes; between the two before (LRFU, IEEE Transactions on Computers 50, 2001, with the layers evened out).
- `score`: lowest moving average S <- a * weight + (1 - a) * S of the routing weight, once a
  pass, a = 1/2 (HybriMoE, with the weights of the experts that were chosen).
- `least_stale`: a model visits its layers in a known order, so an entry that this pass did not use is stale once its
  layer has been visited: it is needed no sooner than in the next pass. Given up first: stale entries of the layers
  visited; then entries of layers still to come; then entries used in this pass. Within these groups: used in the oldest
  pass first; of one pass the highest layer first, whose turn comes last; then least recently used (after SpecMD).
"""

from __future__ import annotations

import heapq
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Container, Sequence
from typing import Protocol

from runtime.errors import RuntimeDiagnostic

Entry = tuple[int, int]
POLICIES = ("lru", "lfu", "lrfu", "score", "least_stale")
DEFAULT_POLICY = "lrfu"  # best in sessions, and what no routing makes useless
SCORE_ALPHA = 0.5
HALF_LIFE = 16  # passes


class EvictionPolicy(Protocol):
    """What the cache calls."""

    uses_weights: bool

    def begin_batch(self, step: int, layer: int) -> None: ...
    def touch(self, entry: Entry, weight: float) -> None: ...
    def add(self, entry: Entry) -> None: ...
    def remove(self, entry: Entry) -> None: ...
    def victim(self, busy: Container[Entry]) -> Entry | None: ...


def make_policy(name: str, entry_bytes: Sequence[int], stand_in_bytes: Sequence[int] = ()) -> EvictionPolicy:
    """A new policy of that name, for layers whose entries have these sizes, and stand-ins (entries below 0) those;
    RuntimeDiagnostic for another name."""
    if name == "lru":
        return LeastRecentlyUsed()
    if name == "lfu":
        return LeastFrequentlyUsed()
    if name == "lrfu":
        return FadingCount(entry_bytes, stand_in_bytes)
    if name == "score":
        return RoutingScore()
    if name == "least_stale":
        return LeastStale(len(entry_bytes))
    raise RuntimeDiagnostic(f"there is no cache policy {name!r}", expected=", ".join(POLICIES))


class _Ranked(ABC):
    """Base of the policies that rank an entry when it is used: the lowest rank is given up first.

    The heap holds an item for each use since an entry came; those that a later use made void are dropped when they are
    met. Ranks end with a count of uses, so that no two are equal.
    """

    uses_weights = False

    def __init__(self) -> None:
        self._clock, self._step = 0, 0
        self._rank: dict[Entry, tuple[float, int]] = {}  # of every entry ever used, resident or not
        self._resident: set[Entry] = set()  # only asked whether it holds an entry
        self._heap: list[tuple[tuple[float, int], Entry]] = []

    def begin_batch(self, step: int, layer: int) -> None:
        """A layer's batch begins; `step` counts passes over the layers."""
        self._step = step

    def touch(self, entry: Entry, weight: float) -> None:
        self._clock += 1
        self._rank[entry] = (self._worth(entry, weight), self._clock)
        if entry in self._resident:
            self._push(entry)

    def add(self, entry: Entry) -> None:
        self._resident.add(entry)
        self._push(entry)

    def remove(self, entry: Entry) -> None:
        self._resident.discard(entry)

    def victim(self, busy: Container[Entry]) -> Entry | None:
        lowest = self.lowest(busy)
        return None if lowest is None else lowest[1]

    def lowest(self, busy: Container[Entry]) -> tuple[tuple[float, int], Entry] | None:
        """The lowest rank of an entry that is resident and not busy, and the entry."""
        kept: list[tuple[tuple[float, int], Entry]] = []
        found = None
        while self._heap and found is None:
            rank, entry = self._heap[0]
            if entry not in self._resident or self._rank[entry] != rank:
                heapq.heappop(self._heap)
            elif entry in busy:
                kept.append(heapq.heappop(self._heap))
            else:
                found = self._heap[0]
        for item in kept:
            heapq.heappush(self._heap, item)
        return found

    def _push(self, entry: Entry) -> None:
        heapq.heappush(self._heap, (self._rank[entry], entry))
        if len(self._heap) > 4 * len(self._resident) + 1024:
            self._heap = [(self._rank[e], e) for _, e in self._heap if e in self._resident]
            self._heap = list(dict.fromkeys(self._heap))
            heapq.heapify(self._heap)

    @abstractmethod
    def _worth(self, entry: Entry, weight: float) -> float:
        """What a use now makes of the entry's rank."""


class LeastRecentlyUsed(_Ranked):
    """Gives up what was used longest ago."""

    def _worth(self, entry: Entry, weight: float) -> float:
        return 0.0  # the count of uses that follows decides


class LeastFrequentlyUsed(_Ranked):
    """Gives up what was used least often; counts go on while an entry is away."""

    def __init__(self) -> None:
        super().__init__()
        self._uses: dict[Entry, int] = {}

    def _worth(self, entry: Entry, weight: float) -> float:
        self._uses[entry] = self._uses.get(entry, 0) + 1
        return float(self._uses[entry])


class _LayerCounts(_Ranked):
    """Uses of one layer's entries, each fading to a half in `HALF_LIFE` passes.

    log2 of a count, and the pass divided by the half-life, stay in order between entries until their next use.
    """

    def __init__(self) -> None:
        super().__init__()
        self._count: dict[Entry, tuple[float, int]] = {}  # count, and the pass in which it was made

    def _worth(self, entry: Entry, weight: float) -> float:
        count, step = self._count.get(entry, (0.0, self._step))
        count = 1.0 + count * 2.0 ** ((step - self._step) / HALF_LIFE)
        self._count[entry] = (count, self._step)
        return math.log2(count) + self._step / HALF_LIFE


class FadingCount:
    """Gives up the lowest fading count for each byte that the entry's layer holds: a layer with much gives first.

    A layer that this pass has not come to yet has had one pass less to use its entries, which is made good.
    """

    uses_weights = False

    def __init__(self, entry_bytes: Sequence[int], stand_in_bytes: Sequence[int] = ()) -> None:
        self._bytes, self._stand_in_bytes = entry_bytes, stand_in_bytes
        self._layers = [_LayerCounts() for _ in entry_bytes]
        self._held = [0] * len(entry_bytes)
        self._step, self._layer = 0, 0

    def begin_batch(self, step: int, layer: int) -> None:
        self._step, self._layer = step, layer

    def touch(self, entry: Entry, weight: float) -> None:
        counts = self._layers[entry[0]]
        counts.begin_batch(self._step, entry[0])
        counts.touch(entry, weight)

    def add(self, entry: Entry) -> None:
        self._layers[entry[0]].add(entry)
        self._held[entry[0]] += self._size(entry)

    def remove(self, entry: Entry) -> None:
        self._layers[entry[0]].remove(entry)
        self._held[entry[0]] -= self._size(entry)

    def _size(self, entry: Entry) -> int:
        return (self._bytes if entry[1] >= 0 else self._stand_in_bytes)[entry[0]]

    def victim(self, busy: Container[Entry]) -> Entry | None:
        best: tuple[float, int] | None = None
        found = None
        for layer, counts in enumerate(self._layers):
            lowest = counts.lowest(busy) if self._held[layer] else None
            if lowest is None:
                continue
            later = 1.0 / HALF_LIFE if layer > self._layer else 0.0
            # Rounded, so that equal counts are equal however they came about; then the highest layer goes first.
            rank = (round(lowest[0][0] + later - math.log2(self._held[layer]), 9), -layer)
            if best is None or rank < best:
                best, found = rank, lowest[1]
        return found


class RoutingScore(_Ranked):
    """Gives up the lowest moving average of routing weight.

    Averages of entries used in different passes are compared as they would stand in one and the same pass: an average
    fades by (1 - a) in each, so log S + pass * log(1 / (1 - a)) keeps its value until the next use.
    """

    uses_weights = True
    _FADE = math.log(1.0 / (1.0 - SCORE_ALPHA))
    _LEAST = 1e-30

    def __init__(self) -> None:
        super().__init__()
        self._score: dict[Entry, tuple[float, int]] = {}  # average, and the pass in which it was made

    def _worth(self, entry: Entry, weight: float) -> float:
        score, step = self._score.get(entry, (0.0, self._step))
        score = SCORE_ALPHA * weight + (1.0 - SCORE_ALPHA) ** (self._step - step) * score
        self._score[entry] = (score, self._step)
        return math.log(max(score, self._LEAST)) + self._step * self._FADE


class LeastStale:
    """Gives up what cannot be used before the next pass; see the module's text for the order."""

    uses_weights = False

    def __init__(self, layers: int) -> None:
        self._used: list[OrderedDict[Entry, int]] = [OrderedDict() for _ in range(layers)]  # entry -> pass of last use
        self._resident: set[Entry] = set()  # only asked whether it holds an entry
        self._step, self._layer = 0, 0

    def begin_batch(self, step: int, layer: int) -> None:
        self._step, self._layer = step, layer

    def touch(self, entry: Entry, weight: float) -> None:
        order = self._used[entry[0]]
        order[entry] = self._step
        order.move_to_end(entry)

    def add(self, entry: Entry) -> None:
        self._resident.add(entry)

    def remove(self, entry: Entry) -> None:
        self._resident.discard(entry)
        del self._used[entry[0]][entry]

    def victim(self, busy: Container[Entry]) -> Entry | None:
        best: tuple[bool, bool, int, int] | None = None
        found = None
        for layer, order in enumerate(self._used):
            entry = next((e for e in order if e in self._resident and e not in busy), None)  # longest ago
            if entry is None:
                continue
            rank = (order[entry] == self._step, layer > self._layer, order[entry], -layer)
            if best is None or rank < best:
                best, found = rank, entry
        return found
