"""Rope, the append to the KV cache, and attention over it: kernels alone against the meaning of their ops."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.kernels.kv_layout import KVLayout
from ir.attributes import Rope
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, F64, I32, GroupedIntFormat, PlainFormat
from ir.kv_low_bit import LowBitKVState
from ir.kv_state import KVState
from ir.ops import tensor
from ir.ops.attention import AttentionOp, RopeOp, RopeTableOp
from ir.ops.cascades import build_deferred_division, build_online_softmax, build_softmax_cascade
from ir.ops.kv_cache import KVAppendOp
from ir.ops.norm import RmsNormOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from tests.codegen.harness import host_target
from tests.codegen.kernel_library import NativeKernels, native_kernels
from tests.codegen.op_kernels import DECODE, PREFILL, OpKernel, fused, single

TOKENS = SymbolicDim("tokens")
IDS = TensorType((TOKENS,), I32)
CTX, SLOTS = 192, 2
CODES = {bits: GroupedIntFormat(bits, 0, zero_point=bits == 2, scale=F16) for bits in (2, 4, 8)}
OPTIONS: dict[str, dict[str, Any]] = {  # what stands behind the sizes of a cache's type
    "f32": {"element": F32}, "bf16": {"element": BF16}, "f16": {"element": F16},
    "q8": {"element": CODES[8]}, "q8r": {"element": CODES[8], "rotate": 8}, "q4": {"element": CODES[4]},
    "q4r": {"element": CODES[4], "rotate": 16, "recent": 16}, "q4w": {"element": CODES[4], "rotate": 4, "recent": 48},
    "q2": {"element": CODES[2], "rotate": 8, "recent": 32, "key_group": 32},
}  # fmt: skip
# Largest difference as a share of the largest element. f32: sums in another order. bf16: the weights of the values are
# rounded, each by up to 2**-9 of itself (queries here are bf16 numbers already); a result that is rounded too, and what
# is appended, may come out beside the other side of a tie, 2**-8 away. Codes: queries and weights are rounded to eight
# bits, a query to 1/254 of its largest element, the weights of a step to 1/510 of their largest.
SHARE = {"f32": 1e-5, "bf16": 2.0**-7, "f16": 2.0**-10} | dict.fromkeys(("q8", "q8r", "q4", "q4r", "q4w", "q2"), 0.03)


def kv_type(element: str, kv_heads: int, dim: int) -> KVCacheType:
    return KVCacheType(kv_heads, dim, **OPTIONS[element])


# -- attention


def attention_op(
    element: str,
    dim: int,
    q_heads: int,
    kv_heads: int,
    window: int = 0,
    after: str = "",
    passes: Any = build_online_softmax,
) -> Op:
    """attn.attention alone, or with what follows it in a region of kind "attention"."""
    types = [TensorType((TOKENS, q_heads, dim), F32), kv_type(element, kv_heads, dim), IDS, IDS]

    def attention(*operands: Value) -> Op:
        return AttentionOp(*operands, scale=dim**-0.5, window=window, regions=[passes(dim)])

    def body(b: Builder, *arguments: Value) -> Value:
        y = b(tensor.ReshapeOp(b(attention(*arguments)), shape=(TOKENS, q_heads * dim)))
        return b(tensor.CastOp(y, to=BF16)) if after == "cast" else y

    return fused("attention", types, body) if after else single(types, attention)


ATTENTION: list[tuple[Any, ...]] = [
    ("f32", 16, 4, 2), ("f32", 24, 3, 1, 5), ("f32", 4, 2, 2), ("f32", 64, 8, 1, 70, "reshape"), ("f32", 16, 16, 1),
    ("bf16", 16, 4, 2), ("bf16", 24, 3, 1, 5, "cast"), ("bf16", 64, 2, 2, 33), ("bf16", 20, 16, 2, 0, "reshape"),
    ("q8", 16, 4, 2), ("q8", 20, 3, 1, 5, "cast"), ("q8", 64, 16, 1, 70), ("q8r", 24, 4, 4),
    ("q4", 64, 8, 1, 0, "reshape"), ("q4", 16, 2, 2), ("q4r", 32, 4, 2), ("q4r", 80, 1, 1, 20),
    ("q4w", 20, 5, 1, 0, "cast"), ("q2", 64, 4, 1), ("q2", 24, 2, 2, 45),
    ("f16", 24, 4, 2), ("f16", 16, 2, 2, 7, "cast"),
]  # fmt: skip


@cache
def attention(key: tuple[Any, ...]) -> OpKernel:
    return OpKernel(attention_op(*key), PREFILL)


@cache
def decoding(key: tuple[Any, ...]) -> OpKernel:
    """The same for the decode program, which takes one token at a time."""
    return OpKernel(attention_op(*key), DECODE)


def rounded(x: np.ndarray) -> np.ndarray:
    return x.astype(BF16.dtype).astype(np.float32)


def filled_cache(type: KVCacheType, seed: int) -> KVState:
    """Numbers at every position, so that one seen wrongly shows."""
    random = np.random.default_rng(seed)
    keys, values = random.standard_normal((2, SLOTS, CTX, type.num_kv_heads, type.head_dim))
    if type.low_bit:
        return LowBitKVState.of(type, keys, values)
    assert isinstance(type.element, PlainFormat)
    return KVState(keys.astype(type.element.dtype), values.astype(type.element.dtype))


Places = list[tuple[int, int]]  # (slot, position) of each token


def attention_values(made: OpKernel, places: Places, seed: int = 0) -> list[Any]:
    q, kv = (v.type for v in made.op.operands[:2])
    assert isinstance(q, TensorType) and isinstance(kv, KVCacheType)
    queries = rounded(np.random.default_rng(seed).standard_normal((len(places), *q.shape[1:])))
    slots, positions = np.array(places, np.int32).reshape(-1, 2).T
    state = filled_cache(kv, seed + 1)
    return [queries, state, np.ascontiguousarray(positions), np.ascontiguousarray(slots)]


def agree(got: np.ndarray, want: np.ndarray, share: float) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    wide, exact = got.astype(np.float64), want.astype(np.float64)
    assert np.isfinite(wide).all()
    assert np.abs(wide - exact).max(initial=0) <= share * max(1.0, np.abs(exact).max(initial=0))


def chunk(slot: int, start: int, count: int) -> Places:
    return [(slot, start + i) for i in range(count)]


# -- rope and append


def rope_append_op(element: str, dim: int, q_heads: int, kv_heads: int, norm: str = "", clip: float = 0.0) -> Op:
    """The region of docs/passes/fuse.md: slices, [row norm], [clip], reshapes, [head norm], rope, append."""
    counts = (q_heads, kv_heads, kv_heads)
    kv = kv_type(element, kv_heads, dim)
    table = TensorType((TOKENS, dim // 2), F32)
    types = [TensorType((TOKENS, sum(counts) * dim), F32), table, table, kv, IDS, IDS]
    if norm:
        types += [TensorType((dim if norm == "head" else count * dim,), F32) for count in counts[:2]]

    def body(
        b: Builder, qkv: Value, cos: Value, sin: Value, cache: Value, positions: Value, slots: Value, *gains: Value
    ):
        parts, start = [], 0
        for count in counts:
            parts.append(b(tensor.SliceOp(qkv, axis=1, start=start, size=count * dim)))
            start += count * dim
        if norm == "row":
            parts[:2] = [b(RmsNormOp(x, gain, eps=1e-5)) for x, gain in zip(parts[:2], gains, strict=True)]
        if clip:
            parts = [b(tensor.ClipOp(x, low=-clip, high=clip)) for x in parts]
        parts = [b(tensor.ReshapeOp(x, shape=(TOKENS, c, dim))) for x, c in zip(parts, counts, strict=True)]
        if norm == "head":
            parts[:2] = [b(RmsNormOp(x, gain, eps=1e-5)) for x, gain in zip(parts[:2], gains, strict=True)]
        q, k = (b(RopeOp(x, cos, sin)) for x in parts[:2])
        return q, b(KVAppendOp(cache, k, parts[2], positions, slots))

    return fused("rope_append", types, body)


ROPE_APPEND: list[tuple[Any, ...]] = [
    ("f32", 16, 4, 2), ("f32", 4, 2, 1, "head"), ("f32", 24, 3, 3, "row", 0.5), ("f32", 64, 2, 1, "", 0.25),
    ("bf16", 16, 4, 2, "head"), ("bf16", 20, 2, 2, "row"), ("bf16", 8, 3, 1, "", 0.5), ("bf16", 32, 1, 1, "row"),
    ("q8", 16, 4, 2), ("q8r", 24, 2, 1, "head"), ("q4", 64, 2, 1), ("q4r", 80, 1, 1, "row"), ("q4w", 20, 3, 3),
    ("q2", 64, 2, 1), ("q2", 24, 2, 2, "head", 0.5), ("f16", 20, 2, 1),
]  # fmt: skip


@cache
def rope_append(key: tuple[Any, ...]) -> OpKernel:
    return OpKernel(rope_append_op(*key))


def rope_append_values(made: OpKernel, places: Places, seed: int = 0) -> list[Any]:
    """Random rows, angles as if rotated by rope, and a cache that is full already."""
    random = np.random.default_rng([seed, 1])
    qkv, table, _, kv = (v.type for v in made.op.operands[:4])
    assert isinstance(qkv, TensorType) and isinstance(table, TensorType) and isinstance(kv, KVCacheType)
    angles = random.uniform(0, 7, (len(places), table.shape[1]))
    slots, positions = np.array(places, np.int32).reshape(-1, 2).T
    state = filled_cache(kv, seed)
    gains = [(1 + 0.1 * random.standard_normal(v.type.shape)).astype(np.float32) for v in made.op.operands[6:]]
    rows = random.standard_normal((len(places), qkv.shape[1])).astype(np.float32)
    tables = [f(angles).astype(np.float32) for f in (np.cos, np.sin)]
    return [rows, *tables, state, np.ascontiguousarray(positions), np.ascontiguousarray(slots), *gains]


def agree_on_append(got: list[Any], want: tuple[Any, ...], places: Places, key: tuple[Any, ...]) -> None:
    """Rotated queries, appended rows, and every other position as it was."""
    share = SHARE[key[0]]
    agree(got[0], want[0], SHARE["f32"])
    fresh = np.zeros((SLOTS, CTX), bool)
    for slot, position in places:
        fresh[slot, position] = True
    if isinstance(want[1], LowBitKVState):
        agree_on_codes(got[1], want[1], fresh)
        return
    for part in ("keys", "values"):
        mine, meant = getattr(got[1], part), getattr(want[1], part)
        agree(mine[fresh], meant[fresh], share)
        np.testing.assert_array_equal(mine[~fresh], meant[~fresh])


def agree_on_codes(parts: dict[str, np.ndarray], meant: LowBitKVState, fresh: np.ndarray) -> None:
    """The same codes and scales, but where a rounding error of rope moves a number past the middle of two codes."""
    group = meant.type.key_group
    ended = fresh[:, group - 1 :: group] if group else fresh
    touched = np.repeat(ended, group, axis=1) if group else fresh
    for name, mine in parts.items():
        want = getattr(meant, name)
        at = fresh
        if group and name.startswith("key"):
            at = touched if name == "key_codes" else ended
        np.testing.assert_array_equal(mine[~at], want[~at], err_msg=name)
        apart = np.abs(mine[at].astype(np.float64) - want[at].astype(np.float64))
        if name.endswith("codes"):
            assert apart.max(initial=0) <= 1 and apart.sum() <= 2 + apart.size // 200, name
        else:
            assert (apart <= 2.0**-7 * np.abs(want[at].astype(np.float64))).all(), name


ROPE_TABLES = [Rope(dim=d) for d in (4, 8, 20, 32, 128)] + [Rope(dim=40, attention_factor=0.75, theta=1e6)]


@cache
def rope_table(rope: Rope) -> OpKernel:
    return OpKernel(single([IDS], lambda positions: RopeTableOp(positions, rope=rope)))


@pytest.fixture(scope="module")
def kernels() -> Iterator[NativeKernels]:
    made = [*map(attention, ATTENTION), *map(decoding, ATTENTION[::2])]
    made += [*map(rope_append, ROPE_APPEND), *map(rope_table, ROPE_TABLES)]
    with native_kernels([m.kernel for m in made], host_target(), optimize_every=3) as loaded:
        yield loaded


# Chunks that begin, end or cross at a border of a block (16 positions) and of a step of several blocks (64), that are
# cut by the tile of a few tokens, one token, the last position; two sequences in turns; positions out of order.
BATCHES: list[Places] = [
    chunk(0, 0, 1), chunk(1, 15, 1), chunk(0, 16, 1), chunk(0, 0, 16), chunk(0, 15, 3), chunk(1, 12, 9),
    chunk(0, 60, 9), chunk(0, 63, 2), chunk(0, 64, 1), chunk(1, 126, 5), chunk(0, CTX - 9, 9), chunk(1, CTX - 1, 1),
    [*chunk(0, 30, 4), *chunk(1, 34, 5)], [(0, 9), (1, 70), (0, 10), (1, 71), (0, 11)], [(0, 20), (0, 19), (0, 100)],
]  # fmt: skip


@pytest.mark.parametrize("key", ATTENTION, ids=lambda key: "-".join(map(str, key)))
def test_attention_at_every_border(kernels: NativeKernels, key: tuple[Any, ...]) -> None:
    for seed, places in enumerate(BATCHES):
        values = attention_values(attention(key), places, seed)
        (want,) = attention(key).meant(values)
        (got,) = attention(key).native(kernels, values)
        agree(got, want, SHARE[key[0]])
        if key in ATTENTION[::2]:
            (decoded,) = decoding(key).native(kernels, values, threads=1)
            np.testing.assert_array_equal(decoded, got)


@st.composite
def ragged(draw: st.DrawFn) -> Places:
    """A few chunks of both sequences; no position twice."""
    places: Places = []
    for slot in draw(st.permutations(range(SLOTS))):
        start, count = draw(st.integers(0, CTX - 1)), draw(st.integers(0, 6))
        places += chunk(slot, start, min(count, CTX - start))
    return places or chunk(0, draw(st.integers(0, CTX - 1)), 1)


@settings(max_examples=25)
@given(st.sampled_from(ATTENTION), ragged(), st.integers(0, 99), st.integers(1, 3))
def test_attention_of_any_batch(
    kernels: NativeKernels, key: tuple[Any, ...], places: Places, seed: int, threads: int
) -> None:
    """Right, and the same bits for a token alone."""
    values = attention_values(attention(key), places, seed)
    (want,) = attention(key).meant(values)
    (got,) = attention(key).native(kernels, values, threads)
    agree(got, want, SHARE[key[0]])
    row = seed % len(places)
    q, state, positions, slots = values
    alone = [q[row : row + 1], state, positions[row : row + 1], slots[row : row + 1]]
    np.testing.assert_array_equal(attention(key).native(kernels, alone, 1)[0][0], got[row])


@pytest.mark.parametrize("key", ATTENTION[::3] + ATTENTION[5:6], ids=lambda key: "-".join(map(str, key)))
def test_attention_in_the_interpreter(kernels: NativeKernels, key: tuple[Any, ...]) -> None:
    values = attention_values(attention(key), [*chunk(0, 14, 3), *chunk(1, 64, 1)])
    agree(attention(key).interpreted(values)[0], attention(key).native(kernels, values)[0], SHARE[key[0]])


@pytest.mark.parametrize("key", ROPE_APPEND, ids=lambda key: "-".join(map(str, key)))
def test_rope_append_at_every_border(kernels: NativeKernels, key: tuple[Any, ...]) -> None:
    made = rope_append(key)
    for seed, places in enumerate(BATCHES):
        values = rope_append_values(made, places, seed)
        agree_on_append(made.native(kernels, values), made.meant(values), places, key)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("key", [key for key in ROPE_APPEND if "row" in key], ids=lambda key: "-".join(map(str, key)))
def test_norms_over_heads_of_long_prompts(kernels: NativeKernels, key: tuple[Any, ...], threads: int) -> None:
    """Their rows go through the heads in blocks of 16."""
    made = rope_append(key)
    for seed, places in enumerate((chunk(0, 3, 17), chunk(1, 0, 32), [*chunk(0, 0, 20), *chunk(1, 60, 19)])):
        values = rope_append_values(made, places, seed)
        agree_on_append(made.native(kernels, values, threads), made.meant(values), places, key)


@settings(max_examples=20)
@given(st.sampled_from(ROPE_APPEND), ragged(), st.integers(0, 99), st.integers(1, 3))
def test_rope_append_of_any_batch(
    kernels: NativeKernels, key: tuple[Any, ...], places: Places, seed: int, threads: int
) -> None:
    made = rope_append(key)
    values = rope_append_values(made, places, seed)
    agree_on_append(made.native(kernels, values, threads), made.meant(values), places, key)


@pytest.mark.parametrize("key", ROPE_APPEND, ids=lambda key: "-".join(map(str, key)))
def test_rope_append_in_the_interpreter(key: tuple[Any, ...]) -> None:
    made, places = rope_append(key), [*chunk(0, 14, 3), (1, 64)]
    values = rope_append_values(made, places)
    agree_on_append(made.interpreted(values), made.meant(values), places, key)


@pytest.mark.parametrize("rope", ROPE_TABLES, ids=str)
def test_rope_tables_to_a_million(kernels: NativeKernels, rope: Rope) -> None:
    made = rope_table(rope)
    for positions in (np.array([0]), np.arange(7), np.random.default_rng(0).integers(0, 10**6, 300), [10**6]):
        values = [np.asarray(positions, np.int32)]
        for got, want in zip(made.native(kernels, values), made.meant(values), strict=True):
            np.testing.assert_allclose(got, want, rtol=0, atol=2e-7)
    few = [np.array([0, 999_999], np.int32)]
    for got, want in zip(made.interpreted(few), made.native(kernels, few), strict=True):
        np.testing.assert_array_equal(got, want)


def refused(op: Op) -> str:
    with pytest.raises(DiagnosticError) as caught:
        OpKernel(op)
    return str(caught.value)


def test_refusals() -> None:
    for build, passes in ((build_softmax_cascade, 3), (build_deferred_division, 2)):
        words = f"'attn.attention' reads the keys in {passes} passes; fuse-attention brings it to one"
        assert words in refused(attention_op("f32", 16, 2, 1, passes=build))
    assert "rope kernels take head widths that are multiples of 4, got 6" in refused(rope_append_op("f32", 6, 2, 1))
    for element in (F64, GroupedIntFormat(4, 0, zero_point=True), GroupedIntFormat(8, 0, scale=BF16), CODES[2]):
        with pytest.raises(DiagnosticError, match=f"no layout of a KV cache of {element}"):
            KVLayout.of(KVCacheType(2, 16, element))
