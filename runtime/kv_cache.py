"""The key/value cache: one reservation of virtual memory that fills page by page as sequences grow.

Layout (the generated code's): layer-major, then slot, then key/value head; within a head, blocks of 16 positions, each
the keys of the block followed by its values, and behind the blocks of a low-bit cache a ring of the newest positions in
16 bits. What a block holds the runtime does not know: positions are copied out and in again as they are (`blocks`,
`ring`). Fresh memory is zero and nothing ever needs clearing: positions are written before they are read.
"""

from __future__ import annotations

import numpy as np

from runtime.errors import RuntimeDiagnostic
from runtime.manifest import KVInfo
from runtime.manifest_fields import REBUILD_HINT
from runtime.memory import PAGE_BYTES, Reservation

CONTEXT_MULTIPLE = 64
_MAX_RESERVATION_BYTES = 1 << 46  # half of the 47-bit user address space


class KVCache:
    """Room for `num_slots` sequences of `capacity` positions each; `capacity` is a multiple of 64."""

    def __init__(self, info: KVInfo, max_context: int, num_slots: int) -> None:
        self.capacity = _capacity(max_context)
        self.num_slots = num_slots
        self.reserved_bytes = self.bytes_for(info, max_context, num_slots)
        per_slot = self.reserved_bytes // max(1, num_slots)
        if self.reserved_bytes > _MAX_RESERVATION_BYTES:
            raise RuntimeDiagnostic(
                f"the KV cache for {num_slots} sequences of {max_context} positions takes {self.reserved_bytes} bytes",
                expected=f"at most {_MAX_RESERVATION_BYTES} bytes of address space",
                hint="ask for a smaller context or fewer sequences",
            )
        self.layers = info.layers
        self._slot_bytes = per_slot // max(1, info.layers)  # one slot in one layer
        self._shape = (info.layers, num_slots, info.num_kv_heads)
        heads = max(1, info.layers * info.num_kv_heads)
        self._position_bytes, odd = divmod(info.bytes_per_position, heads)  # of one head
        self._ring_block_bytes, uneven = divmod(info.bytes_per_slot, heads * max(1, info.ring // info.block))
        if odd or uneven or info.ring % info.block:
            raise RuntimeDiagnostic(
                f"a position of the KV cache has {info.bytes_per_position} bytes, its ring {info.bytes_per_slot}",
                expected=f"the same for each of {heads} heads and each block of {info.block} positions",
                hint=REBUILD_HINT,
            )
        self.ring_positions = info.ring
        self._block = info.block
        self.bytes_per_position = info.bytes_per_position
        self.reservation = Reservation(self.reserved_bytes, what="the KV cache")

    @staticmethod
    def bytes_for(info: KVInfo, max_context: int, num_slots: int) -> int:
        """What such a cache takes when it is full."""
        return (info.bytes_per_position * _capacity(max_context) + info.bytes_per_slot) * num_slots

    @property
    def heads(self) -> int:
        """Of all layers: each has its positions in one range."""
        return self._shape[0] * self._shape[2]

    @property
    def address(self) -> int:
        """Start of the cache, page-aligned."""
        return self.reservation.address

    def committed_bytes(self) -> int:
        """Resident bytes now."""
        return self.reservation.committed_bytes()

    def full_pages(self, layer: int, slot: int, positions: int) -> list[tuple[int, int]]:
        """By head, (first byte, end) of the whole pages that hold nothing but its first `positions`; may be empty."""
        head_bytes = self._slot_bytes // max(1, self._shape[2])
        spans = []
        for head in range(self._shape[2]):
            start = ((layer * self.num_slots + slot) * self._shape[2] + head) * head_bytes
            first = -(-start // PAGE_BYTES) * PAGE_BYTES
            spans.append((first, max(first, (start + positions * self._position_bytes) // PAGE_BYTES * PAGE_BYTES)))
        return spans

    def layer_bytes(self, positions: int) -> int:
        """Of so many positions in one layer, the ring not counted."""
        return positions * self.bytes_per_position // max(1, self.layers)

    @property
    def group_bytes(self) -> int:
        """Of 64 positions in one layer."""
        return self.layer_bytes(CONTEXT_MULTIPLE)

    def hot_bytes(self, positions: int) -> int:
        """What a sequence of so many positions always has in memory, beside its whole groups of 64: the positions after
        them, the ring, and pages that are there for a part: at the ends of both, and where what is there begins."""
        heads = self.layers * self._shape[2]
        tail = -(-CONTEXT_MULTIPLE * self._position_bytes // PAGE_BYTES) * PAGE_BYTES
        return heads * (tail + 4 * PAGE_BYTES) + self.ring_bytes(max(0, positions - 1))

    def blocks(self, slot: int, first: int, last: int) -> np.ndarray:
        """The bytes of positions first..last of a slot, whole groups of 64: a view u8 [layers, heads, bytes]."""
        start, end = first * self._position_bytes, last * self._position_bytes
        return self._heads(slot)[:, :, start:end]

    def ring(self, slot: int, newest: int) -> np.ndarray:
        """What a slot's ring holds once position `newest` is written: a view u8 [layers, heads, bytes]."""
        start = self.capacity * self._position_bytes
        return self._heads(slot)[:, :, start : start + self._ring_blocks(newest) * self._ring_block_bytes]

    def ring_bytes(self, newest: int) -> int:
        """Bytes of `ring`, all layers and heads."""
        layers, _, heads = self._shape
        return self._ring_blocks(newest) * self._ring_block_bytes * layers * heads

    def _ring_blocks(self, newest: int) -> int:
        return min(self.ring_positions // self._block, newest // self._block + 1)

    def used_bytes(self, filled: int, newest: int) -> int:
        """What a sequence of so many positions takes, all layers; its last pages are not counted."""
        rounded = -(-filled // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
        return rounded * self.bytes_per_position + self.ring_bytes(newest) if filled else 0

    def _heads(self, slot: int) -> np.ndarray:
        """All of a slot: u8 [layers, heads, bytes]."""
        return self.reservation.view()[: self.reserved_bytes].reshape(*self._shape, -1)[:, slot]

    def release(self, slot: int) -> int:
        """Gives back the memory of one slot; returns the bytes of its whole pages, resident or not."""
        given_back = 0
        for layer in range(self.layers):
            given_back += self.reservation.discard((layer * self.num_slots + slot) * self._slot_bytes, self._slot_bytes)
        return given_back

    def close(self) -> None:
        """Unmaps the cache."""
        self.reservation.close()


def _capacity(max_context: int) -> int:
    """Positions of a slot."""
    return -(-max_context // CONTEXT_MULTIPLE) * CONTEXT_MULTIPLE
