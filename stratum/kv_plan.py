"""A context whose KV cache does not fit into the budget: what of it stays in memory.

`waits_for_kv` says whether an artifact's programs can do with a part of their cache, `kv_limit` what the cache takes
where the oldest positions of its layers go. `KVOnDisk` is the account of a process in which the cache takes so much and
no more.
"""

from __future__ import annotations

from collections.abc import Sequence

from runtime.kv_books import GROUP, wanted_ahead
from runtime.kv_cache import KVCache
from runtime.manifest import Manifest
from stratum.process_account import ProcessAccount


class KVOnDisk(ProcessAccount):
    """An account in which the cache takes `kv_limit`, whatever the context."""

    kv_limit = 0

    def kv_bytes(self, context: int) -> int:
        return self.kv_limit

    def lent_kv_bytes(self, context: int) -> int:
        """None: parts of layers come and go in all of it."""
        return 0


def waits_for_kv(manifest: Manifest) -> bool:
    """Whether every program waits for its cache, so that parts of its layers may come and go."""
    waits = all(len(set(program.kv_awaits)) == manifest.kv.layers for program in manifest.programs)
    return waits and manifest.kv.layers > 0


def kv_limit(manifest: Manifest, context: int, num_slots: int, old: Sequence[int], *, ahead: bool = True) -> int:
    """What the cache takes in memory where of sequences of `context` positions the oldest `old` groups of 64 (by layer)
    are there only while their layer is in use. `ahead`: decode steps read from the next layer meanwhile."""
    kv = KVCache(manifest.kv, context, num_slots)
    kv.close()
    groups, most = num_slots * (context // GROUP), num_slots * max(old)
    wanted = wanted_ahead(groups, num_slots, num_slots) if ahead and kv.layers > 2 else 0
    room = kv.layers * groups - num_slots * sum(old) + most + min(most, wanted)
    return num_slots * kv.hot_bytes(context) + room * kv.group_bytes


def kv_block_bytes(manifest: Manifest, num_slots: int) -> int:
    """Of 64 positions of every sequence, in all layers."""
    return manifest.kv.bytes_per_position * GROUP * num_slots
