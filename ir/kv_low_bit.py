"""The value of a low-bit KV cache in the interpreter: what a position is packed to, and what a row reads back.

Keys and values of one position and head are a group: codes of 2, 4 or 8 bits and one scale (docs/kv_cache.md). Every
step is written here in float32, in the order in which the kernels do it, so that both choose the same codes.

With `key_group`, keys share scale and zero by column over that many positions; a group is packed from bf16 when its
last position is stored. With `recent`, a row reads the positions from `type.recent_start(its position)` on in bf16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ir.formats import BF16, GroupedIntFormat, PlainFormat
from ir.kv_state import KVState
from ir.types import KVCacheType

SMALLEST_SCALE = 2.0**-14  # the smallest normal f16: tinier numbers become zeros
LARGEST_SCALE = 65504.0


def rotate(x: np.ndarray, block: int) -> np.ndarray:
    """x [..., d] times the orthonormal Hadamard matrix in blocks of columns, in float32; twice is x again."""
    if not block:
        return x.astype(np.float32)
    out = x.astype(np.float32).reshape(*x.shape[:-1], x.shape[-1] // block, block)
    distance = 1
    while distance < block:
        pairs = out.reshape(*out.shape[:-1], block // (2 * distance), 2, distance)
        first, second = pairs[..., 0, :], pairs[..., 1, :]
        out = np.stack([first + second, first - second], axis=-2).reshape(out.shape)
        distance *= 2
    return (out * np.float32(block**-0.5)).reshape(x.shape)


def scale_for(extent: np.ndarray, levels: int) -> np.ndarray:
    """f16 scales with which `levels` steps reach `extent` >= 0 (float32): rounded up, limited to normal numbers."""
    wanted = np.clip(extent * np.float32(1 / levels), np.float32(SMALLEST_SCALE), np.float32(LARGEST_SCALE))
    bits = (wanted.view(np.int32) + 0x1FFF) & ~0x1FFF
    return bits.view(np.float32).astype(np.float16)


def pack_symmetric(x: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(uint8 codes like x, f16 scales without the last axis): x = scale * (code - 2**(bits - 1))."""
    offset = 1 << (bits - 1)
    x = x.astype(np.float32)
    scales = scale_for(np.abs(x).max(axis=-1), offset - 1)
    inverse = np.float32(1) / scales.astype(np.float32)
    levels = np.clip(np.rint(x * inverse[..., None]), 1 - offset, offset - 1)
    return (levels + offset).astype(np.uint8), scales


def pack_with_zero(x: np.ndarray, bits: int, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(uint8 codes like x, f16 scales and f16 lowest values without `axis`): x = scale * code + lowest."""
    x = x.astype(np.float32)
    largest = (1 << bits) - 1
    low = np.clip(x.min(axis=axis), -np.float32(LARGEST_SCALE), np.float32(LARGEST_SCALE)).astype(np.float16)
    wide = low.astype(np.float32)
    scales = scale_for(np.maximum(x.max(axis=axis) - wide, np.float32(0)), largest)
    inverse = np.float32(1) / scales.astype(np.float32)
    steps = (x - np.expand_dims(wide, axis)) * np.expand_dims(inverse, axis)
    return np.clip(np.rint(steps), 0, largest).astype(np.uint8), scales, low


def unpack(codes: np.ndarray, scales: np.ndarray, low: np.ndarray | None, bits: int, axis: int = -1) -> np.ndarray:
    """float32 like `codes`. Without `low` the codes are symmetric."""
    step = np.expand_dims(scales.astype(np.float32), axis)
    if low is None:
        return (codes.astype(np.float32) - np.float32(1 << (bits - 1))) * step
    return codes.astype(np.float32) * step + np.expand_dims(low.astype(np.float32), axis)


@dataclass(frozen=True)
class LowBitKVState(KVState):
    """`keys` and `values` [slots, ctx, heads, d] are what the codes stand for, float32, rotated back.

    Codes are uint8, one each; scales and lowest values f16: [slots, ctx, heads], of grouped keys
    [slots, ctx / key_group, heads, d]. `recent_keys` and `recent_values` hold every position in bf16, rotated as stored
    (a real cache keeps the last few hundred).
    """

    type: KVCacheType
    key_codes: np.ndarray
    key_scales: np.ndarray
    key_lows: np.ndarray | None
    value_codes: np.ndarray
    value_scales: np.ndarray
    value_lows: np.ndarray | None
    recent_keys: np.ndarray
    recent_values: np.ndarray

    @classmethod
    def of(cls, type: KVCacheType, keys: np.ndarray, values: np.ndarray) -> LowBitKVState:
        """The cache in which every position of keys and values [slots, ctx, heads, d] was stored."""
        element = type.element
        assert isinstance(element, GroupedIntFormat) and not type.fault, type.fault
        k, v = rotate(keys, type.rotate), rotate(values, type.rotate)
        kept = (k.astype(BF16.dtype), v.astype(BF16.dtype))
        slots, ctx, heads, dim = k.shape
        bits, group = element.bits, type.key_group
        key_low = value_low = None
        if group:
            grouped = kept[0].astype(np.float32).reshape(slots, ctx // group, group, heads, dim)
            codes, key_scale, key_low = pack_with_zero(grouped, bits, axis=2)
            read_keys = unpack(codes, key_scale, key_low, bits, axis=2).reshape(k.shape)
            key_code = codes.reshape(k.shape)
        elif element.zero_point:
            key_code, key_scale, key_low = pack_with_zero(k, bits, axis=-1)
            read_keys = unpack(key_code, key_scale, key_low, bits)
        else:
            key_code, key_scale = pack_symmetric(k, bits)
            read_keys = unpack(key_code, key_scale, None, bits)
        if element.zero_point:
            value_code, value_scale, value_low = pack_with_zero(v, bits, axis=-1)
        else:
            value_code, value_scale = pack_symmetric(v, bits)
        read_values = unpack(value_code, value_scale, value_low, bits)
        return cls(
            rotate(read_keys, type.rotate), rotate(read_values, type.rotate), type,
            key_code, key_scale, key_low, value_code, value_scale, value_low, *kept,
        )  # fmt: skip

    @classmethod
    def empty(cls, type: KVCacheType, slots: int, ctx: int) -> LowBitKVState:
        """A cache of zero bytes. Nothing distinguishes a fresh position from one that holds them."""
        element = type.element
        assert isinstance(element, GroupedIntFormat)
        whole = (slots, ctx, type.num_kv_heads, type.head_dim)
        zero, none = np.zeros(whole, np.float32), np.zeros(whole, np.uint8)
        by_row = np.zeros(whole[:3], np.float16)
        by_group = np.zeros((slots, ctx // type.key_group, *whole[2:]), np.float16) if type.key_group else by_row
        lows = (by_group, by_row) if element.zero_point else (None, None)
        recent = np.zeros(whole, BF16.dtype)
        return cls(zero, zero, type, none, by_group, lows[0], none, by_row, lows[1], recent, recent)

    def append(self, k: np.ndarray, v: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> LowBitKVState:
        """A new state with row t of k and v [tokens, heads, d] stored at (slots[t], positions[t]).

        Raises IndexError when a row lies outside of the cache.
        """
        self.check_rows(positions, slots)
        parts = {name: array.copy() for name, array in vars(self).items() if isinstance(array, np.ndarray)}
        fresh = LowBitKVState.of(_without_groups(self.type), k[None], v[None])
        at = (slots, positions)
        group = self.type.key_group
        for name in parts:
            if not (group and name in ("keys", "key_codes", "key_scales", "key_lows")):
                parts[name][at] = getattr(fresh, name)[0]
        if group:
            for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
                if position % group == group - 1:
                    where = slice(position + 1 - group, position + 1)
                    self._pack_group(parts, slot, where)
        return replace(self, **parts)

    def _pack_group(self, parts: dict[str, np.ndarray], slot: int, where: slice) -> None:
        """Packs the keys of one whole group of positions from what was kept of them."""
        assert isinstance(self.type.element, GroupedIntFormat)
        bits, number = self.type.element.bits, where.start // self.type.key_group
        kept = parts["recent_keys"][slot, where].astype(np.float32)
        codes, scales, lows = pack_with_zero(kept, bits, axis=0)
        parts["key_codes"][slot, where] = codes
        parts["key_scales"][slot, number], parts["key_lows"][slot, number] = scales, lows
        parts["keys"][slot, where] = rotate(unpack(codes, scales, lows, bits, axis=0), self.type.rotate)

    def rows(self, slot: int, head: int, position: int) -> tuple[np.ndarray, np.ndarray]:
        """Codes before `type.recent_start(position)`, bf16 from there on."""
        keys, values = self.keys[slot, :, head], self.values[slot, :, head]
        if not self.type.recent:
            return keys, values
        late = np.arange(self.ctx)[:, None] >= self.type.recent_start(position)
        recent = [rotate(kept[slot, :, head], self.type.rotate) for kept in (self.recent_keys, self.recent_values)]
        return np.where(late, recent[0], keys), np.where(late, recent[1], values)


def _without_groups(type: KVCacheType) -> KVCacheType:
    """The type in which a row can be packed alone; keys of groups are packed later."""
    return KVCacheType(type.num_kv_heads, type.head_dim, type.element, type.rotate, type.recent)


def empty_state(type: KVCacheType, slots: int, ctx: int) -> KVState:
    """An empty cache of any type."""
    if type.low_bit:
        return LowBitKVState.empty(type, slots, ctx)
    assert isinstance(type.element, PlainFormat)
    return KVState.zeros(slots, ctx, type.num_kv_heads, type.head_dim, type.element.dtype)
