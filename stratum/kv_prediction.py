"""What of a KV cache is read and written in each call, where the cache has less memory than it needs: bytes by layer.

    reads = KVReads(manifest, limit=1 << 30, context=8192, slots=1)
    reads.decode(depth=6000)         # KVCall(going=(0, 4, 8, ...), at_once=2, read_bytes=..., written_bytes=0)
    reads.prompt(first=512, end=1024)

As `runtime.kv_stream` chooses: while all positions fit nothing goes; then some layers stay, and of the others every
call reads all full pages of the positions there are. `KVQueue` says when they are read: as many layers ahead as may be
in memory at once, also across the end of a call.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ir.diagnostics import DiagnosticError
from passes.place.problem import Problem
from runtime.kv_cache import KVCache
from runtime.kv_stream import GROUP, going_layers
from runtime.manifest import Manifest


@dataclass(frozen=True)
class KVCall:
    """One call: layers that go, how many of them may be in memory at once, bytes of each that are read before its
    attention and written behind it."""

    going: tuple[int, ...] = ()
    at_once: int = 0
    read_bytes: float = 0.0
    written_bytes: float = 0.0


class KVReads:
    """Of a cache with `limit` bytes in memory for `slots` sequences of `context` positions."""

    def __init__(self, manifest: Manifest, limit: int, context: int, slots: int) -> None:
        self._limit, self._slots = limit, slots
        self._kv = KVCache(manifest.kv, context, slots)  # address space only, for its sizes

    def decode(self, depth: int) -> KVCall:
        """A step of all sequences behind `depth` positions each; what single positions append is not counted."""
        return self._call(depth, depth + 1, self._slots)

    def prompt(self, first: int, end: int) -> KVCall:
        """Positions first..end of one prompt."""
        return self._call(first, end, 1)

    def _call(self, first: int, end: int, slots: int) -> KVCall:
        kv = self._kv
        layer = slots * kv.layer_bytes(end)
        left = self._limit - slots * kv.hot_bytes(end)
        fit = left // layer if layer else kv.layers
        if fit < 1:
            raise DiagnosticError(
                f"one layer of the KV cache takes {layer} bytes behind {end} positions",
                expected=f"at most {max(0, left)}: what the plan leaves for keys and values",
            )
        going, at_once = going_layers(kv.layers, fit)
        if not going:
            return KVCall()
        before, after = (slots * self._full_bytes(n) for n in (first, end))
        return KVCall(tuple(going), at_once, before, after - before if end - first > 1 else 0.0)

    def _full_bytes(self, positions: int) -> int:
        """Whole pages of one layer of one sequence."""
        return sum(end - start for start, end in self._kv.full_pages(0, 0, positions // GROUP * GROUP))

    def close(self) -> None:
        """Gives the address space back."""
        self._kv.close()


def kv_calls(problem: Problem, manifest: Manifest, kv_bytes: int | None, *, decode: bool) -> tuple[KVCall, ...]:
    """What each call of a phase reads of the cache; () where all of it has room (`kv_bytes` None)."""
    session = problem.session
    if kv_bytes is None:
        return ()
    reads = KVReads(manifest, kv_bytes, session.context, session.batch)
    try:
        if decode:
            return (reads.decode(min(session.decode_context, session.context - 1)),)
        ends = [min(session.prompt, (call + 1) * session.chunk) for call in range(session.passes)]
        return tuple(reads.prompt(first, end) for first, end in zip([0, *ends], ends, strict=False))
    finally:
        reads.close()


@dataclass
class KVQueue:
    """Layers on their way, over several calls. `fetch` begins to read so many bytes and gives when they are there."""

    fetch: Callable[[float], float]
    there: dict[int, float] = field(default_factory=dict)  # layer -> when it is there
    current: int = -1

    def wait(self, call: KVCall, layer: int) -> float:
        """The program comes to `layer`: when it may go on. Reads ahead as the runtime does."""
        if self.current != layer:
            self.there.pop(self.current, None)
        self.current = layer
        if layer in call.going and layer not in self.there:
            self.there[layer] = self.fetch(call.read_bytes)
        for following in (*(n for n in call.going if n > layer), *(n for n in call.going if n < layer)):
            if len(self.there) >= call.at_once:
                break
            if following not in self.there:  # for the next call, what this one has written as well
                written = call.written_bytes if following < layer else 0.0
                self.there[following] = self.fetch(call.read_bytes + written)
        return self.there.get(layer, 0.0)
