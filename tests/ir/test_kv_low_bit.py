"""Low-bit KV caches by their meaning: what is packed, what a row reads back, and how far off it may be."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.formats import BF16, F16, GroupedIntFormat
from ir.kv_low_bit import SMALLEST_SCALE, LowBitKVState, pack_symmetric, pack_with_zero, rotate, unpack
from ir.parse_value import parse_type
from ir.types import KVCacheType


def codes(bits: int) -> GroupedIntFormat:
    return GroupedIntFormat(bits, 0, zero_point=bits == 2, scale=F16)


TYPES = [
    KVCacheType(2, 24, codes(8)),
    KVCacheType(1, 24, codes(4), rotate=8, recent=16),
    KVCacheType(2, 16, codes(2), rotate=16, recent=32, key_group=32),
]
FAULTS = {
    KVCacheType(1, 24, BF16, rotate=8): "bf16 takes no options",
    KVCacheType(1, 24, codes(3)): "integers of 2, 4 or 8 bits with group=row",
    KVCacheType(1, 24, GroupedIntFormat(4, 8)): "group=row, got q4_sym<group=8, scale=f16>",
    KVCacheType(1, 24, codes(4), rotate=16): "a power of two that divides 24, got 16",
    KVCacheType(1, 24, codes(4), recent=17): "multiples of 16, got 17, 0",
    KVCacheType(1, 24, codes(2), key_group=32): "expected recent > 0 with key_group",
}


@pytest.mark.parametrize("type", TYPES, ids=str)
def test_text_parses_back(type: KVCacheType) -> None:
    assert not type.fault and parse_type(str(type)) == type


@pytest.mark.parametrize("type", FAULTS, ids=str)
def test_faults(type: KVCacheType) -> None:
    assert FAULTS[type] in type.fault


numbers = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed))
magnitudes = st.sampled_from([0.0, 1e-30, 1e-6, 1.0, 300.0, 6e4, 8e6])


@settings(max_examples=60)
@given(numbers, magnitudes, st.sampled_from([4, 8]))
def test_symmetric_codes_are_half_a_step_off_at_most(random: np.random.Generator, size: float, bits: int) -> None:
    most = 65504 * ((1 << bits - 1) - 1)  # larger numbers become this one
    x = (random.standard_normal((5, 24)) * size).clip(-most, most).astype(np.float32)
    found, scales = pack_symmetric(x, bits)
    back = unpack(found, scales, None, bits)
    wide = scales.astype(np.float64)[:, None]
    assert (np.abs(back - x.astype(np.float64)) <= 0.5001 * wide).all()
    assert (wide >= SMALLEST_SCALE).all() and np.isfinite(wide).all()


@settings(max_examples=60)
@given(numbers, magnitudes, st.sampled_from([0, 1]))
def test_codes_with_a_lowest_value(random: np.random.Generator, size: float, axis: int) -> None:
    x = (random.standard_normal((32, 16)) * size).clip(-6e4, 6e4).astype(np.float32)
    found, scales, lows = pack_with_zero(x, 2, axis)
    back = unpack(found, scales, lows, 2, axis)
    step = np.expand_dims(scales.astype(np.float64), axis)
    low_error = np.abs(np.expand_dims(lows.astype(np.float64), axis)) * 2.0**-10 + 2.0**-24  # it is an f16
    assert found.max() <= 3
    assert (np.abs(back - x.astype(np.float64)) <= 0.5001 * step + low_error).all()


@given(numbers, st.sampled_from([2, 8, 32]))
def test_rotation_is_its_own_inverse_and_keeps_products(random: np.random.Generator, block: int) -> None:
    q, k = random.standard_normal((2, 3, 64)).astype(np.float32)
    np.testing.assert_allclose(rotate(rotate(k, block), block), k, atol=1e-5)
    products = (rotate(q, block) * rotate(k, block)).sum(axis=-1)
    np.testing.assert_allclose(products, (q * k).sum(axis=-1), atol=1e-4)


@settings(max_examples=20)
@given(st.sampled_from(TYPES), numbers, st.lists(st.integers(1, 40), min_size=1, max_size=4))
def test_any_way_of_cutting_a_sequence_stores_the_same(
    type: KVCacheType, random: np.random.Generator, cuts: list[int]
) -> None:
    """Appending in pieces, in order, gives the state of one append."""
    length = min(64, sum(cuts))
    k, v = random.standard_normal((2, length, type.num_kv_heads, type.head_dim)).astype(np.float32)
    whole = LowBitKVState.empty(type, 1, 64).append(k, v, np.arange(length), np.zeros(length, int))
    pieces, start = LowBitKVState.empty(type, 1, 64), 0
    for count in cuts:
        at = np.arange(start, min(start + count, length))
        pieces = pieces.append(k[at], v[at], at, np.zeros(len(at), int))
        start += len(at)
    for name, array in vars(whole).items():
        if isinstance(array, np.ndarray):
            np.testing.assert_array_equal(getattr(pieces, name), array, err_msg=name)


def test_what_a_row_reads_depends_on_its_position_only() -> None:
    type = TYPES[2]
    assert [type.recent_start(p) for p in (0, 31, 62, 63, 94, 95)] == [0, 0, 0, 32, 32, 64]
    random = np.random.default_rng(0)
    k, v = random.standard_normal((2, 1, 128, 2, 16))
    state = LowBitKVState.of(type, k, v)
    keys, values = state.rows(0, 1, 95)
    exact = [rotate(kept[0, :, 1], type.rotate) for kept in (state.recent_keys, state.recent_values)]
    for read, near, packed in ((keys, exact[0], state.keys), (values, exact[1], state.values)):
        np.testing.assert_array_equal(read[64:], near[64:])
        np.testing.assert_array_equal(read[:64], packed[0, :64, 1])
        assert np.abs(read[:64] - near[:64]).max() > 0.1
