"""What of a KV cache is read and written in each call, where the cache has less memory than it needs.

    cache = KVSizes(manifest, limit=1 << 30, context=8192)
    call = KVCall(first=6000, end=6001, slots=1)
    cache.division(call), cache.gone_bytes(call)             # in closed form: what a step behind this one reads

`KVQueue` plays calls one after another with the books that the runtime keeps (`runtime.kv_books`), so that what it
counts are the bytes that the runtime reads and writes, layer by layer and in its order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from ir.diagnostics import DiagnosticError
from passes.place.problem import Problem
from runtime.kv_books import GROUP, Division, KVBooks, divide, wanted_ahead
from runtime.kv_cache import KVCache
from runtime.manifest import Manifest


@dataclass(frozen=True)
class KVCall:
    """Positions first..end of each of `slots` sequences, one pass of a program. What a single position adds to a group
    of 64 is not counted: a decode step is one of many."""

    first: int
    end: int
    slots: int = 1

    @property
    def groups(self) -> tuple[int, int]:
        """Of one sequence, before and after."""
        single = self.end - self.first == 1
        return self.first // GROUP, (self.first if single else self.end) // GROUP


class KVSizes:
    """A cache with `limit` bytes in memory for sequences of `context` positions."""

    def __init__(self, manifest: Manifest, limit: int, context: int, slots: int) -> None:
        self._limit = limit
        cache = KVCache(manifest.kv, context, slots)  # address space only, for its sizes
        cache.close()
        self.cache = cache
        self._bytes: dict[tuple[int, int, int], int] = {}

    def room(self, call: KVCall) -> int:
        """Groups that fit. Raises DiagnosticError where a whole layer does not."""
        cache = self.cache
        whole = call.slots * call.groups[1]
        left = self._limit - call.slots * cache.hot_bytes(call.end)
        if left < whole * cache.group_bytes:
            raise DiagnosticError(
                f"one layer of the KV cache takes {whole * cache.group_bytes} bytes behind {call.end} positions",
                expected=f"at most {max(0, left)}: what the plan leaves for keys and values",
            )
        return left // cache.group_bytes if cache.group_bytes else 0

    def division(self, call: KVCall) -> Division:
        """What of each layer is in memory only while it is in use."""
        groups = call.slots * call.groups[1]
        ahead = wanted_ahead(groups, call.slots * (call.end - call.first), call.slots)
        return divide(self.cache.layers, groups, self.room(call), ahead)

    def gone_bytes(self, call: KVCall) -> int:
        """Bytes that are not in memory after the call: what the next one reads at least, whatever its tokens."""
        found, groups = 0, call.groups[1]
        for layer, going in enumerate(self.division(call).going):
            for slot in range(call.slots):
                found += self.nbytes(layer, slot, 0, max(0, min(groups, going - slot * groups)))
        return found

    def nbytes(self, layer: int, slot: int, first: int, end: int) -> int:
        """Of groups first..end, whole pages, all heads."""
        return self._upto(layer, slot, end) - self._upto(layer, slot, first)

    def _upto(self, layer: int, slot: int, groups: int) -> int:
        key = layer, slot, groups
        if key not in self._bytes:
            pages = np.array(self.cache.full_pages(layer, slot, groups * GROUP), np.int64).reshape(-1, 2)
            self._bytes[key] = int((pages[:, 1] - pages[:, 0]).sum())
        return self._bytes[key]


def kv_calls(problem: Problem, *, decode: bool) -> tuple[KVCall, ...]:
    """The calls of a phase: a step of all sequences behind as many positions, or one prompt."""
    session = problem.session
    if decode:
        depth = min(session.decode_context, session.context - 1)
        return (KVCall(depth, depth + 1, session.batch),)
    ends = [min(session.prompt, (call + 1) * session.chunk) for call in range(session.passes)]
    return tuple(KVCall(first, end) for first, end in zip([0, *ends], ends, strict=False))


def kv_sizes(problem: Problem, manifest: Manifest, kv_bytes: int | None) -> KVSizes | None:
    """Of a cache that has `kv_bytes` in memory; None where all of it has room."""
    session = problem.session
    return KVSizes(manifest, kv_bytes, session.context, session.batch) if kv_bytes is not None else None


class KVQueue:
    """Calls one after another. `fetch` begins to read so many bytes and gives when they are there; `write` takes so
    many bytes, and returns when they are written."""

    def __init__(self, sizes: KVSizes, fetch: Callable[[float], float], write: Callable[[float], None]) -> None:
        self._sizes, self._fetch, self._write = sizes, fetch, write
        self._books = KVBooks(sizes.cache.layers, sizes.cache.num_slots)
        self._there: dict[tuple[int, int], list[tuple[int, float]]] = {}  # first group, and when it is there

    def begin(self, call: KVCall) -> None:
        """A call begins; at position 0, of a sequence that has nothing yet."""
        slots = range(call.slots)
        for slot in slots:
            if call.first == 0:
                self._drop(slot)
        before, after = (dict.fromkeys(slots, groups) for groups in call.groups)
        self._books.begin(before, before, after, self._sizes.room(call), call.slots * (call.end - call.first))

    def _drop(self, slot: int) -> None:
        self._books.forget(slot)
        self._there = {key: there for key, there in self._there.items() if key[1] != slot}

    def wait(self, layer: int) -> float:
        """The program comes to `layer`: when it is there, as far as that is known now."""
        self._goes(layer)
        found = 0.0
        for key in [key for key in self._there if key[0] == layer]:
            for first, there in self._there.pop(key):
                self._books.came(*key, first)
                found = max(found, there)
        return found

    def end(self) -> None:
        """The call is over."""
        self._goes(-1)

    def _goes(self, layer: int) -> None:
        books = self._books
        for goal in books.passes(layer):
            self._give_up(*goal)
        for goal in books.makes_room(layer) if layer >= 0 else ():
            self._give_up(*goal)
        for number, slot, first, end in books.reads(layer):
            there = self._fetch(float(self._sizes.nbytes(number, slot, first, end)))
            self._there.setdefault((number, slot), []).append((first, there))

    def _give_up(self, layer: int, slot: int, groups: int) -> None:
        books = self._books
        self._there.pop((layer, slot), None)
        books.dropped(layer, slot)
        if groups <= books.gone[layer, slot]:
            return
        first, end = books.unwritten(layer, slot, groups)
        if end > first:
            self._write(float(self._sizes.nbytes(layer, slot, first, end)))
        books.went(layer, slot, groups)
