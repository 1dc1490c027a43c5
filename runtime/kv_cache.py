"""The key/value cache: one reservation of virtual memory that fills page by page as sequences grow.

Layout (the generated code's): layer-major, then slot, then key/value head; within a head, blocks of 16 positions, each
the keys of the block followed by its values, and behind the blocks of a low-bit cache a ring of the newest positions in
16 bits. The runtime needs of it only that the bytes of one slot in one layer are contiguous. Fresh memory is zero and
nothing ever needs clearing: positions are written before they are read.
"""

from __future__ import annotations

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import KVInfo
from runtime.memory import Reservation

CONTEXT_MULTIPLE = 64
_MAX_RESERVATION_BYTES = 1 << 46  # half of the 47-bit user address space


class KVCache:
    """Room for `num_slots` sequences of `capacity` positions each; `capacity` is a multiple of 64."""

    def __init__(self, info: KVInfo, max_context: int, num_slots: int) -> None:
        self.capacity = -(-max_context // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        self.num_slots = num_slots
        per_slot = info.bytes_per_position * self.capacity + info.bytes_per_slot
        self.reserved_bytes = per_slot * num_slots
        if self.reserved_bytes > _MAX_RESERVATION_BYTES:
            raise RuntimeDiagnostic(
                f"the KV cache for {num_slots} sequences of {max_context} positions takes {self.reserved_bytes} bytes",
                expected=f"at most {_MAX_RESERVATION_BYTES} bytes of address space",
                hint="ask for a smaller context or fewer sequences",
            )
        self._layers = info.layers
        self._slot_bytes = per_slot // max(1, info.layers)  # one slot in one layer
        self._memory = Reservation(self.reserved_bytes, what="the KV cache")

    @property
    def address(self) -> int:
        """Start of the cache, page-aligned."""
        return self._memory.address

    def committed_bytes(self) -> int:
        """Resident bytes now."""
        return self._memory.committed_bytes()

    def release(self, slot: int) -> int:
        """Gives back the memory of one slot; returns the bytes of its whole pages, resident or not."""
        given_back = 0
        for layer in range(self._layers):
            given_back += self._memory.discard((layer * self.num_slots + slot) * self._slot_bytes, self._slot_bytes)
        return given_back

    def close(self) -> None:
        """Unmaps the cache."""
        self._memory.close()
