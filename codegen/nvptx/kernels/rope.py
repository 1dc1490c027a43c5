"""Tables of angles, rotation of heads by position, and appending to the cache, on GPUs. A block for each token.

The cache of a layer is bf16 [slots, kv heads, ctx, d] for keys and again for values (`attention_rows`).
"""

from __future__ import annotations

from math import gcd

from codegen.kernels.rope import sin_cos
from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, F64, I32, PlainFormat

LANES = 8
MAX_THREADS = 256


def _threads(pieces: int) -> int:
    return min(MAX_THREADS, -(-pieces // WARP) * WARP)


def rope_kernel(heads: int, width: int, element: PlainFormat, name: str) -> GridKernel:
    """A kernel (x [tokens, heads, d], cos and sin f32 [tokens, d / 2], y like x): attn.rope, a block for each token."""
    if width % 2:
        raise DiagnosticError(f"heads of {width} are not rotated", expected="an even width")
    half = width // 2
    lanes = gcd(LANES, half)
    pieces = half // lanes
    k = GridBuilder(name, _threads(heads * pieces))
    x, cos, sin, y = (k.buffer(n, e) for n, e in (("x", element), ("cos", F32), ("sin", F32), ("y", element)))
    token = k.block_id()
    with k.loop(k.thread_id(), heads * pieces, k.threads) as loop:
        head, column = loop.i // pieces, loop.i % pieces * lanes
        at = (token * heads + head) * width + column
        c, s = (table.load(token * half + column, lanes) for table in (cos, sin))
        first, second = x.load(at, lanes).cast(F32), x.load(at + half, lanes).cast(F32)
        y.store(at, (first * c - second * s).cast(element))
        y.store(at + half, (second * c + first * s).cast(element))
    return k.grid_kernel()


def rope_table_kernel(half: int, factor: float, name: str) -> GridKernel:
    """A kernel (positions i32 [tokens], frequencies f64 [half], cos and sin f32 [tokens, half]): attn.rope_table with
    `factor` times cosine and sine, a block for each token. Angles are formed and reduced in f64, as on CPUs."""
    k = GridBuilder(name, _threads(half))
    positions, frequencies = k.buffer("positions", I32), k.buffer("frequencies", F64)
    cos, sin = k.buffer("cos", F32), k.buffer("sin", F32)
    token = k.block_id()
    position = positions.load(token).cast(F64)
    with k.loop(k.thread_id(), half, k.threads) as loop:
        s, c = sin_cos(k, position * frequencies.load(loop.i))
        for table, value in ((cos, c), (sin, s)):
            table.store(token * half + loop.i, value * factor)
    return k.grid_kernel()


def append_kernel(kv_heads: int, width: int, element: PlainFormat, name: str) -> GridKernel:
    """A kernel (keys and values [tokens, kv heads, width], slots and positions i32 [tokens], the caches of keys and of
    values, ctx): kv.append, a block a token. No two tokens have one slot and position."""
    lanes = gcd(LANES, width)
    pieces = width // lanes
    k = GridBuilder(name, _threads(kv_heads * pieces))
    sources = [k.buffer(n, element) for n in ("keys", "values")]
    slots, positions = k.buffer("slots", I32), k.buffer("positions", I32)
    caches = [k.buffer(n, BF16) for n in ("key_cache", "value_cache")]
    ctx, token = k.size("ctx"), k.block_id()
    slot, position = slots.load(token).to_index(), positions.load(token).to_index()
    with k.loop(k.thread_id(), kv_heads * pieces, k.threads) as loop:
        head, column = loop.i // pieces, loop.i % pieces * lanes
        place = ((slot * kv_heads + head) * ctx + position) * width + column
        for source, cache in zip(sources, caches, strict=True):
            value = source.load((token * kv_heads + head) * width + column, lanes)
            cache.store(place, value.cast(F32).cast(BF16))
    return k.grid_kernel()
