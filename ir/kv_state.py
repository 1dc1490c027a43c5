"""KVState: the value of one layer's KV cache in the interpreter.

The meaning of `kv<...>`: keys and values of every sequence slot, stored in the cache's element (so storing rounds),
read back as floats. How the compiled program lays the cache out in memory is not visible here. A low-bit cache is an
`ir.kv_low_bit.LowBitKVState`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class KVState:
    """keys, values: arrays [slots, ctx, kv heads, head width], both of the cache's dtype. Never changed in place."""

    keys: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        if self.keys.ndim != 4 or self.keys.shape != self.values.shape or self.keys.dtype != self.values.dtype:
            raise ValueError(
                "expected keys and values as equal arrays [slots, ctx, heads, dim], got "
                f"{self.keys.dtype}{list(self.keys.shape)} and {self.values.dtype}{list(self.values.shape)}"
            )

    @classmethod
    def zeros(cls, slots: int, ctx: int, heads: int, dim: int, dtype: np.dtype | type = np.float32) -> KVState:
        """An empty cache. Nothing distinguishes a fresh position from one that holds zeros."""
        shape = (slots, ctx, heads, dim)
        return cls(np.zeros(shape, dtype), np.zeros(shape, dtype))

    @property
    def slots(self) -> int:
        return self.keys.shape[0]

    @property
    def heads(self) -> int:
        """Key and value heads."""
        return self.keys.shape[2]

    @property
    def ctx(self) -> int:
        """Positions that one slot can hold."""
        return self.keys.shape[1]

    @property
    def dtype(self) -> np.dtype:
        return self.keys.dtype

    def append(self, k: np.ndarray, v: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> KVState:
        """A new state with row t of k and v [tokens, heads, dim] stored at (slots[t], positions[t]).

        Raises IndexError when a row lies outside of the cache.
        """
        self.check_rows(positions, slots)
        keys, values = self.keys.copy(), self.values.copy()
        keys[slots, positions] = k.astype(self.dtype)
        values[slots, positions] = v.astype(self.dtype)
        return KVState(keys, values)

    def check_rows(self, positions: np.ndarray, slots: np.ndarray) -> None:
        """Raises IndexError when a row lies outside of the cache."""
        for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
            if not (0 <= slot < self.slots and 0 <= position < self.ctx):
                raise IndexError(
                    f"row {t} goes to slot {slot}, position {position}, "
                    f"but the cache has {self.slots} slots of {self.ctx} positions"
                )

    def rows(self, slot: int, head: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """keys and values [ctx, d] of a slot and head as the row at `position` of that slot reads them."""
        return self.keys[slot, :, head], self.values[slot, :, head]
