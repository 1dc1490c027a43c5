"""From the joint projection to queries and cache on GPUs: what the ops of the region mean, in every cache format."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.nvptx.kernels.rope_append import HeadNorm, Projection, rope_append_kernel
from codegen.nvptx.kv_planes import KvPlanes
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, GroupedIntFormat
from ir.grid_interpreter import interpret_grid
from ir.kv_low_bit import pack_symmetric, rotate
from ir.ops.attention import RopeOp
from ir.ops.norm import RmsNormOp
from ir.tile_memory_model import KernelFault
from ir.types import KVCacheType
from tests.samples.base import normal

Q8, Q4 = GroupedIntFormat(8, 0), GroupedIntFormat(4, 0)
SLOTS, CTX = 2, 32
POSITIONS, TOKEN_SLOTS = np.array([5, 0, 31], np.int32), np.array([1, 0, 1], np.int32)


def codes_of(words: np.ndarray, bits: int) -> np.ndarray:
    """The codes of planes of words, in the order of columns."""
    wide = words.view(np.uint32)
    places = [bits * i if bits == 8 else 4 * (i // 2) + 16 * (i % 2) for i in range(32 // bits)]
    codes = np.stack([(wide >> np.uint32(p)) & np.uint32((1 << bits) - 1) for p in places], axis=-1)
    return codes.reshape(*words.shape[:-1], -1).astype(np.uint8)


def meant(form: Projection, qkv: np.ndarray, cos: np.ndarray, sin: np.ndarray, gains: list[np.ndarray]) -> list[Any]:
    """q, k and v [tokens, heads, d] as they go on, before they are rounded or packed."""
    kv, tokens = form.kv, len(qkv)
    cuts = np.split(qkv, [form.heads * kv.width, (form.heads + kv.heads) * kv.width], axis=1)
    made = []
    for number, cut in enumerate(cuts):
        x: Any = cut
        if form.norm is not None and form.norm.over_rows and number < 2:
            x = RmsNormOp.reference(x, gains[number], eps=form.norm.eps)
        if form.clip is not None:
            x = np.clip(x, *form.clip)
        x = x.reshape(tokens, -1, kv.width)
        if form.norm is not None and not form.norm.over_rows and number < 2:
            x = RmsNormOp.reference(x, gains[number], eps=form.norm.eps)
        made.append(RopeOp.reference(x, cos, sin) if number < 2 else x)
    return [rotate(x, kv.rotate) for x in made]


def run(form: Projection) -> tuple[list[Any], np.ndarray, list[np.ndarray]]:
    """(what is meant, q, the planes)"""
    kv, tokens = form.kv, len(POSITIONS)
    qkv, angles = normal(tokens, form.columns), normal(tokens, kv.width // 2, seed="angles")
    cos, sin = np.cos(angles), np.sin(angles)
    gains = []
    if form.norm is not None:
        wide = form.norm.over_rows
        gains = [1 + normal(n * kv.width if wide else kv.width, seed=str(n), scale=0.1) for n in (form.heads, kv.heads)]
    q = np.full((tokens, form.heads, kv.stored), 7).astype(kv.element.dtype)
    planes = [
        np.full((SLOTS, kv.heads, p.positions or CTX, p.row), 3).astype(p.element.dtype) for p in kv.planes
    ]  # fmt: skip
    kernel = rope_append_kernel(form, "rope_append")
    arguments = [qkv, cos, sin, POSITIONS, TOKEN_SLOTS, *gains, q, *planes, tokens, CTX]
    interpret_grid(kernel.func, arguments, blocks=form.blocks(tokens), threads=kernel.threads)
    return meant(form, qkv, cos, sin, gains), q, planes


CACHES = [
    *(KVCacheType(2, width, element) for width, element in ((8, BF16), (24, F16), (64, BF16), (128, F16), (80, BF16))),
    KVCacheType(2, 8, Q8), KVCacheType(1, 128, Q8), KVCacheType(2, 96, Q4), KVCacheType(1, 128, Q4, rotate=64),
    KVCacheType(2, 64, Q4, rotate=64, recent=16), KVCacheType(1, 16, Q8, rotate=8),
]  # fmt: skip
NEAR = 2.0**-8
NORMS = [None, HeadNorm(1e-5, False), HeadNorm(1e-6, True)]


@settings(max_examples=14, deadline=None)
@given(st.sampled_from(CACHES), st.sampled_from(NORMS), st.sampled_from([None, (-0.5, 0.75)]), st.sampled_from([1, 3]))
def test_queries_and_cache(
    cache: KVCacheType, norm: HeadNorm | None, limits: tuple[float, float] | None, group: int
) -> None:
    kv = KvPlanes.of(cache)
    (q, key, value), made, planes = run(Projection(group * kv.heads, kv, norm, limits))
    np.testing.assert_allclose(made[..., : kv.width].astype(np.float32), q, rtol=NEAR, atol=NEAR)
    assert not made[..., kv.width :].astype(np.float32).any()
    at = (TOKEN_SLOTS, slice(None), POSITIONS)
    for plane, want in enumerate((key, value)):
        if kv.bits:
            codes, scales = codes_of(planes[plane], kv.bits)[at][..., : kv.width], planes[2 + plane][at][..., 0]
            back = (codes.astype(np.float32) - (1 << (kv.bits - 1))) * scales.astype(np.float32)[..., None]
            assert (np.abs(back - want) <= scales.astype(np.float32)[..., None] * 0.5 + 1e-5).all()
        else:
            np.testing.assert_allclose(
                planes[plane][at][..., : kv.width].astype(np.float32), want, rtol=NEAR, atol=NEAR
            )
            untouched = np.ones(planes[plane].shape[:3], bool)
            untouched[at] = False
            assert (planes[plane][untouched] == 3).all()
        if kv.recent:
            ring = planes[4 + plane][TOKEN_SLOTS, :, POSITIONS % kv.ring]
            np.testing.assert_allclose(ring.astype(np.float32), want, rtol=NEAR, atol=NEAR)


def test_two_tokens_of_one_place_race() -> None:
    form = Projection(1, KvPlanes.of(KVCacheType(1, 16, BF16)))
    qkv, tables, place = normal(2, form.columns), normal(2, 8), np.zeros(2, np.int32)
    planes = [np.zeros((1, 1, 8, 16)).astype(BF16.dtype) for _ in range(2)]
    made = rope_append_kernel(form, "rope_append")
    arguments = [qkv, tables, tables, place, place, np.zeros((2, 1, 16)).astype(BF16.dtype), *planes, 2, 8]
    with pytest.raises(KernelFault, match="written by another without a barrier"):
        interpret_grid(made.func, arguments, blocks=form.blocks(2), threads=made.threads)


@pytest.mark.parametrize("cache", [KVCacheType(2, 16, Q8, rotate=8), KVCacheType(1, 128, Q4, rotate=64)], ids=str)
def test_codes_are_those_of_the_reference(cache: KVCacheType) -> None:
    """Values are neither normalised nor rotated by position: every step is as the reference has it, bit for bit."""
    kv = KvPlanes.of(cache)
    (_, _, value), _, planes = run(Projection(kv.heads, kv))
    codes, scales = pack_symmetric(value, kv.bits)
    at = (TOKEN_SLOTS, slice(None), POSITIONS)
    np.testing.assert_array_equal(planes[3][at][..., 0], scales)
    np.testing.assert_array_equal(codes_of(planes[1], kv.bits)[at], codes)


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (KVCacheType(2, 64, F32), "no KV cache of f32 on GPUs"),
        (KVCacheType(2, 64, GroupedIntFormat(2, 0, True)), "no KV cache of q2_zp"),
        (KVCacheType(2, 8, Q4), "no KV cache of heads of 8 in 4 bits on GPUs"),
        (KVCacheType(2, 256, Q4), "no KV cache of heads of 256 in 4 bits on GPUs\nexpected: at most 128 columns, or a"),
        (KVCacheType(2, 80, Q8, rotate=16), "no rotated KV cache of heads of 80 on GPUs"),
        (KVCacheType(2, 260, BF16), "heads of 260 are not rotated on GPUs"),
    ],
)
def test_caches_without_a_kernel(cache: KVCacheType, message: str) -> None:
    with pytest.raises(DiagnosticError, match=message):
        rope_append_kernel(Projection(2, KvPlanes.of(cache)), "rope_append")
