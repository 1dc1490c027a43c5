"""A context whose KV cache does not fit into the budget: what of it stays in memory.

`waits_for_kv` says whether an artifact's programs can do with a part of their cache, `kv_limit` what the cache takes
where some of its layers stay. `KVOnDisk` is the account of a process in which the cache takes so much and no more.
"""

from __future__ import annotations

from runtime.kv_cache import KVCache
from runtime.kv_stream import LAYERS_AT_ONCE
from runtime.manifest import Manifest
from stratum.process_account import ProcessAccount


class KVOnDisk(ProcessAccount):
    """An account in which the cache takes `kv_limit`, whatever the context."""

    kv_limit = 0

    def kv_bytes(self, context: int) -> int:
        return self.kv_limit

    def lent_kv_bytes(self, context: int) -> int:
        """None: layers come and go in all of it."""
        return 0


def waits_for_kv(manifest: Manifest) -> bool:
    """Whether every program waits for its cache, so that layers of it may come and go."""
    waits = all(len(set(program.kv_awaits)) == manifest.kv.layers for program in manifest.programs)
    return waits and manifest.kv.layers > 0


def kv_limit(manifest: Manifest, context: int, num_slots: int, staying: int, at_once: int = LAYERS_AT_ONCE) -> int:
    """What the cache takes in memory where so many of its layers stay, and `at_once` of the others are there at a time,
    of sequences of `context` positions."""
    kv = KVCache(manifest.kv, context, num_slots)
    layers = min(kv.layers, staying + at_once)
    limit = num_slots * (kv.hot_bytes(context) + layers * kv.layer_bytes(context) + 1)
    kv.close()
    return limit
