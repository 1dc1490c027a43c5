"""kv.*: one row, rows of several slots out of order, the last position, rounding to bf16."""

from __future__ import annotations

from ir.attributes import SymbolRef
from ir.formats import GroupedIntFormat
from ir.types import KVCacheType
from tests.samples.base import (
    BF16,
    F32,
    I32,
    TOKENS,
    Fault,
    Sample,
    cache,
    fault,
    ints,
    low_bit_cache,
    normal,
    sample,
    t,
)

_IDS = t(TOKENS, element=I32)


def _append(label: str, element, slots: int, positions: tuple[int, ...], at: tuple[int, ...], heads=2, dim=4) -> Sample:
    tokens = len(positions)
    return sample(
        "kv.append", label, cache(slots, 8, heads, dim, element), normal(tokens, heads, dim),
        normal(tokens, heads, dim, seed="v"), ints(*positions), ints(*at),
        types=(KVCacheType(heads, dim, element), t(TOKENS, heads, dim), t(TOKENS, heads, dim), _IDS, _IDS),
    )  # fmt: skip


def _codes(bits: int) -> GroupedIntFormat:
    return GroupedIntFormat(bits, 0, zero_point=bits == 2)


def _low_bit(label: str, type: KVCacheType, positions: tuple[int, ...], at: tuple[int, ...]) -> Sample:
    """A cache of two slots of 32 positions."""
    rows = (len(positions), type.num_kv_heads, type.head_dim)
    return sample(
        "kv.append", label, low_bit_cache(2, 32, type), normal(*rows), normal(*rows, seed="v"), ints(*positions),
        ints(*at), types=(type, t(TOKENS, *rows[1:]), t(TOKENS, *rows[1:]), _IDS, _IDS),
    )  # fmt: skip


KV8 = KVCacheType(2, 6, _codes(8))
KV4 = KVCacheType(1, 24, _codes(4), rotate=8, recent=16)
KV2 = KVCacheType(2, 8, _codes(2), rotate=4, recent=16, key_group=16)
SAMPLES = (
    Sample(
        "kv.state", "layer", (), (), {"symbol": SymbolRef("layers.3")},
        result_types=(KVCacheType(2, 4, BF16),), states={"layers.3": cache(1, 8, 2, 4, BF16)},
    ),
    _append("one_row", F32, 1, (0,), (0,)),
    _append("last_position", F32, 2, (7,), (1,)),
    _append("ragged", F32, 3, (2, 5, 3, 0), (2, 0, 2, 1)),
    _append("bf16", BF16, 2, (4, 4), (0, 1), heads=1, dim=6),
    _low_bit("eight_bits", KV8, (4, 4, 31), (0, 1, 1)),
    _low_bit("four_bits_rotated", KV4, (0, 17), (1, 1)),
    _low_bit("two_bits_by_column", KV2, (14, 15, 16), (0, 0, 1)),  # the second ends a group
)  # fmt: skip
FAULTS = (
    Fault("kv.state", (), "to give a kv cache, got tensor<3 x f32>", {"symbol": SymbolRef("a")}, result_types=(t(3),)),
    fault(
        "kv.append", "kv heads of cache and k to match, got 2 and 4",
        KVCacheType(2, 4, F32), t(TOKENS, 4, 4), t(TOKENS, 4, 4), _IDS, _IDS,
    ),
    fault(
        "kv.append", "head width of cache and k to match, got 4 and 8",
        KVCacheType(2, 4, F32), t(TOKENS, 2, 8), t(TOKENS, 2, 8), _IDS, _IDS,
    ),
    fault("kv.append", "cache to be a kv cache, got tensor<3 x f32>", t(3), t(3, 2, 4), t(3, 2, 4), _IDS, _IDS),
    fault("kv.append", "shapes of k and v to match", KVCacheType(2, 4, F32), t(3, 2, 4), t(2, 2, 4), _IDS, _IDS),
    fault(
        "kv.append", "tokens of k and slots to match, got tokens and 3",
        KVCacheType(2, 4, F32), t(TOKENS, 2, 4), t(TOKENS, 2, 4), _IDS, t(3, element=I32),
    ),
)  # fmt: skip
