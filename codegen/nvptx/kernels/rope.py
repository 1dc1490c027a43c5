"""Tables of angles on GPUs: cos and sin for the positions of a step. What uses them is `rope_append`."""

from __future__ import annotations

from codegen.kernels.rope import sin_cos
from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from ir.formats import F32, F64, I32

MAX_THREADS = 256


def rope_table_kernel(half: int, factor: float, name: str) -> GridKernel:
    """A kernel (positions i32 [tokens], frequencies f64 [half], cos and sin f32 [tokens, half]): attn.rope_table with
    `factor` times cosine and sine, a block for each token. Angles are formed and reduced in f64, as on CPUs."""
    k = GridBuilder(name, min(MAX_THREADS, -(-half // WARP) * WARP))
    positions, frequencies = k.buffer("positions", I32), k.buffer("frequencies", F64)
    cos, sin = k.buffer("cos", F32), k.buffer("sin", F32)
    token = k.block_id()
    position = positions.load(token).cast(F64)
    with k.loop(k.thread_id(), half, k.threads) as loop:
        s, c = sin_cos(k, position * frequencies.load(loop.i))
        for table, value in ((cos, c), (sin, s)):
            table.store(token * half + loop.i, value * factor)
    return k.grid_kernel()
