"""The memory of a low-bit KV cache, written from docs/kv_cache.md and not from the code of the kernels."""

from __future__ import annotations

from typing import Any

import numpy as np

from ir.formats import BF16, F16, GroupedIntFormat
from ir.kv_low_bit import LowBitKVState
from ir.types import KVCacheType
from tests.codegen.harness import aligned

STEP = 512  # most tokens of a step


class _Places:
    """Byte numbers of every part of the cache of one layer."""

    def __init__(self, type: KVCacheType, slots: int, ctx: int) -> None:
        assert isinstance(type.element, GroupedIntFormat)
        bits = type.element.bits
        fields, signed = 8 // bits, not type.element.zero_point
        width = -(-type.head_dim // (16 * fields)) * 16 * fields
        codes = 16 * width // fields
        key_scales = codes
        values = key_scales + (2 * width if type.key_group else 32)
        value_scales = values + codes
        size = value_scales + (32 if signed else 64)
        unit = type.key_group or 16
        self.ring = (STEP + type.recent + unit) // 16 * 16 if type.recent else 0
        head_bytes = ctx // 16 * size + self.ring * width * 4
        heads = type.num_kv_heads
        self.total = slots * heads * head_bytes
        s, c, h, d = np.indices((slots, ctx, heads, type.head_dim))
        head = (s * heads + h) * head_bytes
        block, inside = head + c // 16 * size, c % 16
        word, field, byte = d // 4 // fields, d // 4 % fields, d % 4
        self.keys, self.key_shift = block + (word * 16 + inside) * 4 + byte, field * bits
        strip, field = d // 16 // fields, d // 16 % fields
        self.values = block + values + ((strip * 4 + inside // 4) * 16 + d % 16) * 4 + inside % 4
        self.value_shift = field * bits
        first = (slice(None), slice(None), slice(None), 0)
        self.key_scales = (block + key_scales + 2 * inside)[first]
        if type.key_group:
            starts = (slice(None), slice(None, None, type.key_group))
            self.key_scales = (block + key_scales + 2 * d)[starts]
            self.key_lows = self.key_scales + size
        self.value_scales = (block + value_scales + 2 * inside)[first]
        self.value_lows = self.value_scales + 32
        if type.recent:
            p = c % self.ring
            start = head + ctx // 16 * size + p // 16 * (16 * width * 4)
            self.recent_keys = start + ((d // 2 * 16 + p % 16) * 2 + d % 2) * 2
            self.recent_values = start + 32 * width + ((d // 16 * 8 + p % 16 // 2) * 16 + d % 16) * 4 + p % 2 * 2


def low_bit_memory(state: LowBitKVState) -> np.ndarray:
    """The bytes of one layer. Where positions share a place in the ring, the last one lies in it."""
    type = state.type
    assert isinstance(type.element, GroupedIntFormat)
    at, memory = _Places(type, state.slots, state.ctx), aligned(_Places(type, state.slots, state.ctx).total)
    np.bitwise_or.at(memory, at.keys, state.key_codes << at.key_shift.astype(np.uint8))
    codes = state.value_codes
    stored = codes ^ 128 if type.element.bits == 8 else codes << at.value_shift.astype(np.uint8)  # eight bits: signed
    np.bitwise_or.at(memory, at.values, stored)
    _put(memory, at.key_scales, state.key_scales)
    _put(memory, at.value_scales, state.value_scales)
    if state.key_lows is not None and state.value_lows is not None:
        _put(memory, at.key_lows, state.key_lows)
        _put(memory, at.value_lows, state.value_lows)
    if type.recent:
        for position in range(state.ctx):
            here = (slice(None), position)
            _put(memory, at.recent_keys[here], state.recent_keys[here])
            _put(memory, at.recent_values[here], state.recent_values[here])
    return memory


def low_bit_parts(memory: np.ndarray, type: KVCacheType, slots: int, ctx: int) -> dict[str, Any]:
    """The arrays of a `LowBitKVState` by name, as far as they are stored."""
    assert isinstance(type.element, GroupedIntFormat)
    at, mask = _Places(type, slots, ctx), np.uint8((1 << type.element.bits) - 1)
    values = memory[at.values]
    parts = {
        "key_codes": memory[at.keys] >> at.key_shift.astype(np.uint8) & mask,
        "key_scales": _get(memory, at.key_scales, F16.dtype),
        "value_codes": values ^ 128 if mask == 255 else values >> at.value_shift.astype(np.uint8) & mask,
        "value_scales": _get(memory, at.value_scales, F16.dtype),
    }
    if type.element.zero_point:
        parts["key_lows"] = _get(memory, at.key_lows, F16.dtype)
        parts["value_lows"] = _get(memory, at.value_lows, F16.dtype)
    if type.recent:
        parts["recent_keys"] = _get(memory, at.recent_keys, BF16.dtype)
        parts["recent_values"] = _get(memory, at.recent_values, BF16.dtype)
    return parts


def _put(memory: np.ndarray, places: np.ndarray, numbers: np.ndarray) -> None:
    """Stores numbers of two bytes."""
    words = np.ascontiguousarray(numbers).view(np.uint16)
    memory[places], memory[places + 1] = (words & 255).astype(np.uint8), (words >> 8).astype(np.uint8)


def _get(memory: np.ndarray, places: np.ndarray, dtype: np.dtype) -> np.ndarray:
    words = memory[places].astype(np.uint16) | memory[places + 1].astype(np.uint16) << 8
    return words.view(dtype)
