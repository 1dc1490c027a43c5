"""What sequences take of the KV cache, counted before they take it: a budget lends the rest to experts meanwhile.

use = KVUse(cache)
use.after(positions, slots)        # bytes when these are written; never less until a slot is released
"""

from __future__ import annotations

import numpy as np

from runtime.kv_cache import KVCache
from runtime.piece_info import PAGE_BYTES


class KVUse:
    """Counts by slot the most positions ever written since it was empty: pages stay until a slot is released."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._written = np.zeros(cache.num_slots, np.int64)
        # A head's positions begin and end anywhere in a page.
        self._page_bytes = 2 * PAGE_BYTES * cache.heads

    def after(self, positions: np.ndarray, slots: np.ndarray) -> int:
        """Bytes of the cache in memory, at most, once these positions of these slots are written."""
        np.maximum.at(self._written, slots, np.asarray(positions, np.int64) + 1)
        used = [n for n in self._written.tolist() if n]
        return sum(self._cache.used_bytes(n, n - 1) + self._page_bytes for n in used)

    def forget(self, slot: int) -> None:
        """The slot's memory was given back."""
        self._written[slot] = 0
