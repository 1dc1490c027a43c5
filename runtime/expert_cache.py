"""Which experts stay in memory: a cache of (layer, expert) entries under a budget of bytes or slots.

The cache holds no weights, it decides: `lookup` says which experts of a batch are there, `admit` takes the others in
and says which entries must go first. One `lookup` is made for each layer of each pass, with the ids of all tokens of
the batch. An entry that the batch in progress uses is never given up; a batch that is larger than the budget by itself
leaves the cache over its budget until the next one, unless it is worked off in pieces (`finish`).

With `scope="layer"` every layer has its own share of the budget and gives up only its own entries.
Copies of experts in fewer bits (`runtime.stand_ins`) are entries of the same budget, with the numbers -1, -2, ...
Policies are in `runtime.eviction`. The compiler predicts hit rates with its own implementation of the same rules
(`hw_targets.expert_cache`); a test holds the two together.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field

from runtime.errors import RuntimeDiagnostic
from runtime.eviction import EvictionPolicy, make_policy
from runtime.stand_ins import stand_in

Entry = tuple[int, int]  # (layer, expert)


@dataclass
class CacheCounters:
    """Since the cache was made: one lookup for each distinct expert of a batch and layer."""

    lookups: int = 0
    hits: int = 0
    admitted: int = 0
    evicted: int = 0
    admitted_bytes: int = 0
    peak_bytes: int = 0
    layer_lookups: list[int] = field(default_factory=list)
    layer_hits: list[int] = field(default_factory=list)
    stand_ins: int = 0  # lookups of stand-ins
    stand_in_hits: int = 0

    @property
    def hit_rate(self) -> float:
        """Hits among lookups, 0 when there were none."""
        return self.hits / self.lookups if self.lookups else 0.0


@dataclass
class _Partition:
    """One budget and the entries that share it."""

    capacity: int
    policy: EvictionPolicy
    used: int = 0
    resident: dict[Entry, None] = field(default_factory=dict)


class ExpertCache:
    """Decides which experts are resident.

    `entry_bytes[layer]`: bytes of one expert of that layer (all 1, to count slots), or of each expert where they
    differ: entries take what they are, there are no slots of one size. Layers are those with experts, numbered from 0
    in the order in which a pass visits them; `stand_in_bytes` those of a stand-in. `capacity`: for all
    layers together, or with `scope="layer"` the sum of equal shares. `pinned`: entries that are there from the start
    and never leave; they count against the capacity. RuntimeDiagnostic when the pinned entries alone exceed it, or for
    an unknown policy or scope.
    """

    def __init__(
        self,
        entry_bytes: Sequence[int | Sequence[int]],
        capacity: int,
        *,
        policy: str = "lru",
        scope: str = "global",
        pinned: Iterable[Entry] = (),
        stand_in_bytes: Sequence[int] = (),
    ) -> None:
        if scope not in ("global", "layer"):
            raise RuntimeDiagnostic(f"the scope of an expert cache is {scope!r}", expected="global or layer")
        sizes: list[tuple[int, ...]] = [(one,) if isinstance(one, int) else tuple(one) for one in entry_bytes]
        if not sizes or not all(sizes) or min(min(layer) for layer in sizes) <= 0 or capacity < 0:
            raise RuntimeDiagnostic("an expert cache needs entries of a positive size and a budget of at least 0")
        self._sizes, self._stand_in_bytes = sizes, tuple(stand_in_bytes)
        means = [sum(layer) // len(layer) for layer in sizes]
        self.policy_name, self.scope = policy, scope
        layers = len(sizes)
        count = layers if scope == "layer" else 1
        self._partitions = [
            _Partition(capacity // count, make_policy(policy, means, self._stand_in_bytes)) for _ in range(count)
        ]
        self._pinned = dict.fromkeys(pinned)
        self._busy: dict[Entry, None] = {}  # entries of the batch in progress
        self._ahead: dict[Entry, None] = {}  # read ahead: no policy knows of them, so they stay until they are used
        self._layer, self._step = -1, -1
        self.counters = CacheCounters(layer_lookups=[0] * layers, layer_hits=[0] * layers)
        for entry in self._pinned:
            partition = self._partition(entry[0])
            partition.used += self._size(entry)
            if partition.used > partition.capacity:
                raise RuntimeDiagnostic(
                    "the pinned experts exceed the budget of the expert cache",
                    expected=f"at most {partition.capacity} bytes{' in each layer' if scope == 'layer' else ''}",
                    hint="pin fewer experts, or give more memory",
                )
        self.counters.peak_bytes = self.used_bytes

    @property
    def used_bytes(self) -> int:
        """Bytes of all resident entries, pinned ones included."""
        return sum(partition.used for partition in self._partitions)

    def pinned_bytes(self, but: Container[int] = ()) -> int:
        """Bytes of the pinned entries, but for those of some layers."""
        return sum(self._size(entry) for entry in self._pinned if entry[0] not in but)

    @property
    def capacity_bytes(self) -> int:
        return sum(partition.capacity for partition in self._partitions)

    def resident(self) -> list[Entry]:
        """Every resident entry: the pinned ones, then the others in the order of their arrival."""
        return [*self._pinned, *(entry for partition in self._partitions for entry in partition.resident)]

    def is_resident(self, layer: int, expert: int) -> bool:
        return (layer, expert) in self._partition(layer).resident or (layer, expert) in self._pinned

    def with_stand_ins(self, layer: int, experts: Sequence[int], light: Container[int]) -> list[int]:
        """The entries that are used for `experts`: of those in `light` that are missing, their stand-ins."""
        return [
            stand_in(expert) if expert in light and not self.is_resident(layer, expert) else expert
            for expert in experts
        ]

    def lookup(
        self, layer: int, experts: Sequence[int], weights: Sequence[float] | None = None
    ) -> tuple[list[int], list[int]]:
        """(hits, misses) of one layer's batch: distinct ids in the order of their first appearance.

        What was read ahead for this batch is among the hits, but counted as missing: it had to be read for it.
        `experts`: ids of all tokens, tokens in order; repeats only count as use. `weights`: routing weights beside
        them, which only the policy `score` looks at; without them each token's experts count alike. Ends the batch
        before, and begins a new pass when `layer` is not above the layer before.
        """
        begins = layer <= self._layer or self._step < 0
        if begins:
            self._step += 1
        self._layer = layer
        partition = self._partition(layer)
        policy = partition.policy
        policy.begin_batch(self._step, layer)
        self._busy = {(layer, expert): None for expert in experts}
        early = [entry for entry in self._ahead if entry[0] == layer or begins]
        hits: list[int] = []
        misses: list[int] = []
        for entry in self._busy:
            known = entry in partition.resident or entry in self._pinned
            (hits if known else misses).append(entry[1])
        self.counters.lookups += len(self._busy)
        found = len(hits) - sum(entry in self._busy for entry in early)
        self.counters.hits += found
        self.counters.stand_ins += sum(entry[1] < 0 for entry in self._busy)
        self.counters.stand_in_hits += sum(entry < 0 for entry in hits)
        self.counters.layer_lookups[layer] += len(self._busy)
        self.counters.layer_hits[layer] += found
        strength = _weight_shares(experts, weights) if policy.uses_weights else {}
        for entry in early:
            del self._ahead[entry]
            if entry not in self._busy:  # read in vain
                self._partition(entry[0]).policy.touch(entry, 0.0)
        # What the newest token chose counts as used last.
        for expert in list(dict.fromkeys(reversed(experts)))[::-1]:
            if (layer, expert) not in self._pinned:
                policy.touch((layer, expert), strength.get(expert, 0.0))
        for entry in early:
            self._partition(entry[0]).policy.add(entry)
        return hits, misses

    def admit(self, layer: int, experts: Iterable[int]) -> list[Entry]:
        """Takes experts in and returns the entries that must be given up for them, first to last.

        The caller frees those before it reads the admitted ones, so that memory never exceeds the budget, but for a
        batch that is larger than the budget by itself. Experts that are resident already are left as they are; experts
        of no batch in progress are read ahead of their use, and stay until the next batch of their layer or the next
        pass.
        """
        partition = self._partition(layer)
        for expert in experts:
            entry = (layer, expert)
            if entry in partition.resident or entry in self._pinned:
                continue
            partition.resident[entry] = None
            if entry in self._busy:
                partition.policy.add(entry)
            else:
                self._ahead[entry] = None
            partition.used += self._size(entry)
            self.counters.admitted += 1
            self.counters.admitted_bytes += self._size(entry)
        evicted = self._shrink(partition)
        self.counters.peak_bytes = max(self.counters.peak_bytes, self.used_bytes)
        return evicted

    def resize(self, capacity: int) -> list[Entry]:
        """From now on another budget, for all layers together; returns the entries that must be given up for it."""
        gone: list[Entry] = []
        for partition in self._partitions:
            partition.capacity = capacity // len(self._partitions)
            gone += self._shrink(partition)
        return gone

    def room_ahead(self, layer: int) -> int:
        """Bytes that experts of this layer may take ahead of their use: what is neither in use, ahead, nor pinned."""
        partition = self._partition(layer)
        fixed = dict.fromkeys((*self._busy, *self._ahead, *self._pinned))
        return partition.capacity - sum(self._size(e) for e in fixed if self._partition(e[0]) is partition)

    def finish(self, layer: int, experts: Iterable[int]) -> list[Entry]:
        """Experts of the batch in progress that have been used up; returns entries given up while over the budget."""
        for expert in experts:
            self._busy.pop((layer, expert), None)
        return self._shrink(self._partition(layer))

    def discard(self, layer: int, expert: int) -> None:
        """Forgets an entry whose bytes did not arrive (a failed read)."""
        partition = self._partition(layer)
        if (layer, expert) in partition.resident:
            self._remove(partition, (layer, expert))

    def _size(self, entry: Entry) -> int:
        if entry[1] < 0:
            return self._stand_in_bytes[entry[0]]
        sizes = self._sizes[entry[0]]
        return sizes[entry[1] if len(sizes) > 1 else 0]

    def _partition(self, layer: int) -> _Partition:
        return self._partitions[layer if self.scope == "layer" else 0]

    def _shrink(self, partition: _Partition) -> list[Entry]:
        evicted: list[Entry] = []
        while partition.used > partition.capacity:
            victim = partition.policy.victim(self._busy)
            if victim is None:
                break
            self._remove(partition, victim)
            evicted.append(victim)
        self.counters.evicted += len(evicted)
        return evicted

    def _remove(self, partition: _Partition, entry: Entry) -> None:
        del partition.resident[entry]
        if entry in self._ahead:
            del self._ahead[entry]
        else:
            partition.policy.remove(entry)
        partition.used -= self._size(entry)


def _weight_shares(experts: Sequence[int], weights: Sequence[float] | None) -> dict[int, float]:
    """Share of the batch's routing weight that each expert got; a weight that is not known counts as 1."""
    total = dict.fromkeys(experts, 0.0)
    for index, expert in enumerate(experts):
        weight = 1.0 if weights is None else float(weights[index])
        total[expert] += weight if weight == weight else 1.0  # NaN differs from itself
    whole = sum(total.values())
    return {expert: weight / whole if whole > 0 else 0.0 for expert, weight in total.items()}
