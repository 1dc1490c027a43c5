"""attn.*: one token, position 0, full context, ragged slots, GQA, MHA, MQA, windows crossed, bf16, every cascade."""

from __future__ import annotations

import numpy as np

from ir.attributes import Rope
from ir.core import Block, Region
from ir.formats import GroupedIntFormat
from ir.kv_low_bit import LowBitKVState
from ir.kv_state import KVState
from ir.ops.attention import row_argument_types
from ir.ops.cascades import build_deferred_division, build_online_softmax, build_softmax_cascade
from ir.ops.fused import YieldOp
from ir.types import KVCacheType
from tests.samples.base import BF16, CTX, F32, I32, TOKENS, Sample, cache, fault, ints, low_bit_cache, normal, sample, t

_IDS = t(TOKENS, element=I32)
_KV = KVCacheType(2, 8, F32)
_Q = t(TOKENS, 4, 8)

# label, query heads, state, positions, slots, window
ROWS = (
    ("gqa", 4, cache(3, 12, 2, 8), (5, 11, 0), (2, 0, 2), 0),
    ("mha", 2, cache(1, 5, 2, 8), (4,), (0,), 0),
    ("mqa_first_position", 3, cache(2, 4, 1, 6), (0,), (1,), 0),
    ("window_crossed", 4, cache(2, 20, 2, 8), (2, 3, 4, 19), (0, 0, 0, 1), 3),
    ("window_of_one", 2, cache(1, 6, 2, 8), (5, 0), (0, 0), 1),
    ("bf16", 4, cache(2, 9, 2, 8, BF16), (8, 3), (1, 0), 0),
    ("codes", 2, low_bit_cache(1, 9, KVCacheType(2, 8, GroupedIntFormat(8, 0), rotate=4)), (8, 3), (0, 0), 4),
)
_RECENT = low_bit_cache(1, 64, KVCacheType(2, 8, GroupedIntFormat(4, 0), rotate=8, recent=16))


def _row_types(heads: int, state: KVState) -> tuple:
    kv = KVCacheType(state.keys.shape[2], state.keys.shape[3], BF16 if state.dtype != np.float32 else F32)
    kv = state.type if isinstance(state, LowBitKVState) else kv
    return t(TOKENS, heads, kv.head_dim), kv, _IDS, _IDS


def _scores(label, heads, state, positions, slots, window) -> Sample:
    q = normal(len(positions), heads, state.keys.shape[3])
    types = _row_types(heads, state)
    return sample(
        "attn.scores", label, q, state, ints(*positions), ints(*slots), types=types, scale=0.25, window=window
    )


def _combine(label, heads, state, positions, slots, window) -> Sample:
    p = np.abs(normal(len(positions), heads, state.ctx))
    p = p / p.sum(axis=-1, keepdims=True)
    _, kv, ids, _ = _row_types(heads, state)
    return sample("attn.combine", label, p, state, ints(*slots), types=(t(TOKENS, heads, CTX), kv, ids))


def _attention(cascade: str, label, heads, state, positions, slots, window) -> Sample:
    width = state.keys.shape[3]

    def regions() -> tuple[Region, ...]:
        builders = {
            "three": lambda: build_softmax_cascade(width),
            "two": lambda: build_deferred_division(width),
            "one": lambda: build_online_softmax(width, block=4),  # blocks end before and after a window, and at ctx
        }
        return (builders[cascade](),)

    return sample(
        "attn.attention", f"{label}_{cascade}", normal(len(positions), heads, width), state, ints(*positions),
        ints(*slots), types=_row_types(heads, state), scale=0.25, window=window, regions=regions,
    )  # fmt: skip


_MASKED = np.where(np.arange(6) < 4, normal(2, 3, 6), -np.inf).astype(np.float32)
_ANGLES = normal(3, 4, seed="angle")

SAMPLES = (
    _scores("recent_positions", 2, _RECENT, (40, 14), (0, 0), 0),
    _attention("one", "recent_positions", 2, _RECENT, (40, 14), (0, 0), 30),
    sample("attn.rope_table", "default", ints(0, 1, 4095), types=(_IDS,), rope=Rope(8)),
    sample("attn.rope_table", "linear", ints(7), rope=Rope(6, theta=500000.0, scaling="linear", factor=4.0)),
    sample(
        "attn.rope_table", "llama3", ints(3, 9000),
        rope=Rope(64, 500000.0, "llama3", 8.0, original_context=8192),
    ),
    sample(
        "attn.rope_table", "yarn", ints(3, 9000),
        rope=Rope(64, 10000.0, "yarn", 4.0, original_context=4096, attention_factor=1.1386),
    ),
    sample(
        "attn.rope", "many", normal(3, 2, 8), np.cos(_ANGLES), np.sin(_ANGLES),
        types=(t(TOKENS, 2, 8), t(TOKENS, 4), t(TOKENS, 4)),
    ),
    sample("attn.rope", "one_pair", normal(1, 1, 2), np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)),
    sample("attn.rope", "bf16", normal(3, 2, 8, element=BF16), np.cos(_ANGLES), np.sin(_ANGLES)),
    *(_scores(*row) for row in ROWS),
    sample("attn.softmax", "masked", _MASKED, types=(t(TOKENS, 3, CTX),)),
    sample("attn.softmax", "one", normal(1, 1, 1)),
    sample("attn.softmax", "large", normal(2, 7, scale=1e4)),
    *(_combine(*row) for row in ROWS),
    *(_attention(cascade, *row) for row in ROWS for cascade in ("three", "two", "one")),
)  # fmt: skip


def _yield_mask() -> tuple[Region, ...]:
    block = Block(row_argument_types(8))
    block._insert(0, YieldOp(block.arguments[3]))
    return (Region(block),)


def _no_end() -> tuple[Region, ...]:
    return (Region(Block(row_argument_types(8))),)


FAULTS = (
    fault(
        "attn.combine", "without the rows' positions: fuse attention before setting its format",
        t(TOKENS, 2, CTX), _RECENT.type, _IDS,
    ),
    fault("attn.rope_table", "expected positions of i32", t(3), rope=Rope(8)),
    fault("attn.rope_table", "an even rope dim > 0, got 7", _IDS, rope=Rope(7)),
    fault("attn.rope", "cos and sin of one type", t(3, 2, 8), t(3, 4), t(3, 8)),
    fault("attn.rope", "tokens of x and cos to match, got 3 and 2", t(3, 2, 8), t(2, 4), t(2, 4)),
    fault("attn.rope", "head width of x and width of cos to match, got 4 and 8", t(3, 2, 8), t(3, 8), t(3, 8)),
    fault("attn.rope", "head width of x to be a multiple of 2, got 7", t(3, 2, 7), t(3, 3), t(3, 3)),
    fault("attn.scores", "head width of q and cache to match, got 16 and 8", t(3, 4, 16), _KV, _IDS, _IDS, scale=1.0),
    fault("attn.scores", "query heads to be a multiple of 2 kv heads, got 3", t(3, 3, 8), _KV, _IDS, _IDS, scale=1.0),
    fault("attn.scores", "tokens of q and positions to match, got 3", t(3, 4, 8), _KV, _IDS, _IDS, scale=1.0),
    fault("attn.scores", "window >= 0 (0 = none), got -1", _Q, _KV, _IDS, _IDS, scale=1.0, window=-1),
    fault("attn.scores", "cache to be a kv cache", _Q, _Q, _IDS, _IDS, scale=1.0),
    fault("attn.scores", "a known number of query heads", t(3, TOKENS, 8), _KV, _IDS, _IDS, scale=1.0),
    fault("attn.softmax", "expected s of rank 1 or more", t()),
    fault("attn.combine", "query heads to be a multiple of 2 kv heads, got 3", t(TOKENS, 3, CTX), _KV, _IDS),
    fault("attn.combine", "tokens of q and slots to match, got 5 and tokens", t(5, 4, CTX), _KV, _IDS),
    fault(
        "attn.attention", "expected block arguments of attn.attention of types (tensor<8 x f32>",
        _Q, _KV, _IDS, _IDS, scale=1.0, regions=lambda: (build_softmax_cascade(16),),
    ),
    fault("attn.attention", "to yield tensor<8 x f32>, got tensor<ctx x i1>", _Q, _KV, _IDS, _IDS, scale=1.0,
          regions=_yield_mask),
    fault("attn.attention", "to end in tensor.yield, got nothing", _Q, _KV, _IDS, _IDS, scale=1.0, regions=_no_end),
    fault("attn.attention", "head width of q and cache to match", t(TOKENS, 4, 4), _KV, _IDS, _IDS, scale=1.0,
          regions=lambda: (build_softmax_cascade(8),)),
)  # fmt: skip
