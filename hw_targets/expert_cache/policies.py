"""Caches of experts as a replay plays them: one class a policy, each a budget of bytes with the entries in it.

An entry's key is layer * experts + expert; keys below 0 are stand-ins, copies of experts in fewer bits. `use` takes one
batch of one layer: every distinct expert is looked up once, what is missing comes in, then entries that the batch does
not use leave until the budget holds; a batch that exceeds the budget by itself stays. `runtime.eviction` has the on-
line policies for the running model, written on their own.

- lru: what was used longest ago leaves. lfu: what was used least often, times away included; ties: longest ago.
- lrfu: the lowest count of uses for each byte that the entry's layer holds, where a use counts half as much after
  sixteen passes.
- score: the lowest moving average S <- a * weight + (1 - a) * S of the routing weight, once a pass, a = 1/2 (HybriMoE).
- least_stale: what this pass did not use of the layers it has visited, then of those to come, then what it used. Within
  these groups: used in the oldest pass first; ties: the highest layer, then longest ago (after SpecMD).
- belady: what is needed farthest in the future. With entries of equal size no policy misses less.
- random: any entry, from a seeded generator; the floor that any knowledge must beat.
"""

from __future__ import annotations

import heapq
import math
import random
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError

ON_LINE = ("lru", "lfu", "lrfu", "score", "least_stale")
POLICIES = (*ON_LINE, "belady", "random")
SCORE_ALPHA = 0.5
HALF_LIFE = 16  # passes
RANDOM_SEED = 1234  # that of the published curve
NEVER = 1 << 60


@dataclass(slots=True)
class Use:
    """One batch of one layer. `recency`: the keys by their last appearance; `next_uses`: for each key the number of
    the batch that needs it next, empty where the policy does not ask; `size`: bytes of an entry of the layer, `low` of
    a stand-in."""

    step: int
    layer: int
    keys: Sequence[int]
    recency: Sequence[int]
    weights: Sequence[float]
    next_uses: Sequence[int]
    size: int
    low: int = 0

    def size_of(self, key: int) -> int:
        """Bytes of an entry of the layer."""
        return self.size if key >= 0 else self.low


class Cache(ABC):
    """A budget of `capacity` bytes, of which `used` are taken."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used = 0
        self.resident: OrderedDict[int, int] = OrderedDict()  # key -> bytes

    def use(self, batch: Use) -> list[int]:
        """The keys that were missing, in order."""
        missing = [key for key in batch.keys if key not in self.resident]
        for key in missing:
            self.resident[key] = batch.size_of(key)
            self.used += self.resident[key]
        self.touch(batch, missing)
        if self.used > self.capacity:
            busy = set(batch.keys)  # only asked whether it holds a key
            while self.used > self.capacity:
                victim = self.victim(batch, busy)
                if victim is None:
                    break
                self.used -= self.resident.pop(victim)
        return missing

    @abstractmethod
    def touch(self, batch: Use, missing: list[int]) -> None:
        """All entries of the batch are resident now, and used; `missing` are those that came."""

    @abstractmethod
    def victim(self, batch: Use, busy: set[int]) -> int | None:
        """The entry that leaves; None when all that are left are busy."""


class LruCache(Cache):
    """`resident` itself is kept in the order of last use."""

    def touch(self, batch: Use, missing: list[int]) -> None:
        for key in batch.recency:
            self.resident.move_to_end(key)

    def victim(self, batch: Use, busy: set[int]) -> int | None:
        oldest = next(iter(self.resident))
        return None if oldest in busy else oldest


class HeapCache(Cache):
    """The entry of the lowest rank leaves. Items of the heap that a later use made void are dropped when met."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._ranks: dict[int, tuple[float, int]] = {}
        self._heap: list[tuple[tuple[float, int], int]] = []

    def rank(self, key: int, rank: tuple[float, int]) -> None:
        self._ranks[key] = rank
        heapq.heappush(self._heap, (rank, key))

    def victim(self, batch: Use, busy: set[int]) -> int | None:
        held = []
        found = None
        while self._heap and found is None:
            item = heapq.heappop(self._heap)
            key = item[1]
            if key in self.resident and self._ranks[key] == item[0]:
                if key in busy:
                    held.append(item)
                else:
                    found = key
        for item in held:
            heapq.heappush(self._heap, item)
        return found


class LfuCache(HeapCache):
    """Counts of uses go on while an entry is away."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: dict[int, int] = {}
        self._clock = 0

    def touch(self, batch: Use, missing: list[int]) -> None:
        for key in batch.recency:
            self._clock += 1
            self._counts[key] = self._counts.get(key, 0) + 1
            self.rank(key, (self._counts[key], self._clock))


class LrfuCache(Cache):
    """A heap for each layer. Counts of different passes are compared as they would stand in the same one: log2, and a
    term for the pass, of which a layer that is still to come in this pass has had one less."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._counts: dict[int, tuple[float, int]] = {}
        self._clock = 0
        self._ranks: dict[int, tuple[float, int]] = {}
        self._heaps: dict[int, list[tuple[tuple[float, int], int]]] = {}
        self._held: dict[int, int] = {}  # bytes by layer

    def touch(self, batch: Use, missing: list[int]) -> None:
        heap = self._heaps.setdefault(batch.layer, [])
        self._held[batch.layer] = self._held.get(batch.layer, 0) + sum(map(batch.size_of, missing))
        for key in batch.recency:
            self._clock += 1
            before, step = self._counts.get(key, (0.0, batch.step))
            count = before * 2.0 ** ((step - batch.step) / HALF_LIFE) + 1.0
            self._counts[key] = (count, batch.step)
            self._ranks[key] = (math.log2(count) + batch.step / HALF_LIFE, self._clock)
            heapq.heappush(heap, (self._ranks[key], key))

    def victim(self, batch: Use, busy: set[int]) -> int | None:
        best, found = (math.inf, 0), None
        for layer, heap in self._heaps.items():
            lowest = self._lowest(heap, busy)
            if lowest is not None:
                worth = lowest[0][0] + (1.0 / HALF_LIFE if layer > batch.layer else 0.0)
                rank = (round(worth - math.log2(self._held[layer]), 9), -layer)
                if rank < best:
                    best, found = rank, lowest[1]
        if found is not None:
            self._held[-best[1]] -= self.resident[found]
        return found

    def _lowest(
        self, heap: list[tuple[tuple[float, int], int]], busy: set[int]
    ) -> tuple[tuple[float, int], int] | None:
        held = []
        found = None
        while heap and found is None:
            rank, key = heap[0]
            if key not in self.resident or self._ranks[key] != rank:
                heapq.heappop(heap)
            elif key in busy:
                held.append(heapq.heappop(heap))
            else:
                found = heap[0]
        for item in held:
            heapq.heappush(heap, item)
        return found


class ScoreCache(HeapCache):
    """Averages of different passes are compared as they would stand in the same one: log S, and a term for the pass."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._scores: dict[int, tuple[float, int]] = {}
        self._clock = 0

    def touch(self, batch: Use, missing: list[int]) -> None:
        shares = dict(zip(batch.keys, batch.weights, strict=True))
        for key in batch.recency:
            self._clock += 1
            before, step = self._scores.get(key, (0.0, batch.step))
            score = SCORE_ALPHA * shares[key] + (1.0 - SCORE_ALPHA) ** (batch.step - step) * before
            self._scores[key] = (score, batch.step)
            worth = math.log(max(score, 1e-30)) + batch.step * math.log(1.0 / (1.0 - SCORE_ALPHA))
            self.rank(key, (worth, self._clock))


class BeladyCache(HeapCache):
    """Needed farthest in the future first; ties: what came first."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._arrivals: dict[int, int] = {}
        self._clock = 0

    def touch(self, batch: Use, missing: list[int]) -> None:
        for key in missing:
            self._clock += 1
            self._arrivals[key] = self._clock
        for key, following in zip(batch.keys, batch.next_uses, strict=True):
            self.rank(key, (-following, self._arrivals[key]))


class LeastStaleCache(Cache):
    """Entries of each layer in the order of last use, with the pass of that use."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._layers: dict[int, OrderedDict[int, int]] = {}
        self._order: list[int] = []  # layers that were ever visited, ascending

    def touch(self, batch: Use, missing: list[int]) -> None:
        if batch.layer not in self._layers:
            self._layers[batch.layer] = OrderedDict()
            self._order = sorted(self._layers)
        entries = self._layers[batch.layer]
        for key in batch.recency:
            entries[key] = batch.step
            entries.move_to_end(key)

    def victim(self, batch: Use, busy: set[int]) -> int | None:
        best, found = (4, 0, 0), None
        for layer in self._order:
            entries = self._layers[layer]
            oldest = next(iter(entries), None)
            if oldest is None or oldest in busy:
                continue
            last = entries[oldest]
            group = 2 * (last == batch.step) + (layer > batch.layer)
            if (group, last, -layer) < best:
                best, found = (group, last, -layer), oldest
        if found is not None:
            del self._layers[-best[2]][found]
        return found


class RandomCache(Cache):
    """Draws among the entries that are not busy, in the order of their arrival."""

    def __init__(self, capacity: int) -> None:
        super().__init__(capacity)
        self._random = random.Random(RANDOM_SEED)
        self._clock = 0
        self._arrival: dict[int, int] = {}
        self._stamps: list[int] = []  # of the resident entries, ascending
        self._keys: list[int] = []  # beside them

    def touch(self, batch: Use, missing: list[int]) -> None:
        for key in missing:
            self._clock += 1
            self._arrival[key] = self._clock
            self._stamps.append(self._clock)
            self._keys.append(key)

    def victim(self, batch: Use, busy: set[int]) -> int | None:
        free = len(self._keys) - len(busy)
        if free <= 0:
            return None
        index = self._random.choice(range(free))
        for position in sorted(bisect_left(self._stamps, self._arrival[key]) for key in batch.keys):
            index += position <= index
        del self._stamps[index]
        return self._keys.pop(index)


_CLASSES: dict[str, type[Cache]] = {
    "lru": LruCache,
    "lfu": LfuCache,
    "lrfu": LrfuCache,
    "score": ScoreCache,
    "least_stale": LeastStaleCache,
    "belady": BeladyCache,
    "random": RandomCache,
}


def make_cache(policy: str, capacity: int) -> Cache:
    """An empty cache; DiagnosticError for a policy that does not exist."""
    if policy not in _CLASSES:
        raise DiagnosticError(f"there is no cache policy {policy!r}", expected=", ".join(POLICIES))
    return _CLASSES[policy](capacity)
