"""Attention of a prompt on a GPU: y[t, h] = softmax(scale q[t, h] K^T) V over the positions that row t sees.

A block has one query head and a piece of a prompt: up to 64 tokens of one slot at consecutive positions, 16 for each of
its 4 warps. It walks over tiles of 64 positions with the sums of softmax kept as they come (arXiv:2205.14135). Tiles
that all rows see whole are not masked.
"""

from __future__ import annotations

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.attention_rows import (
    LOG2_E,
    AttentionShape,
    KvTiles,
    Rows,
    load_queries,
    masked,
    scores_of,
)
from codegen.tile_builder import Expr
from ir.formats import F32, I32, PlainFormat

PIECE_WORDS = 4  # of a piece of a prompt: first token, tokens, slot, position of the first token


def prefill_kernel(
    shape: AttentionShape, scale: float, name: str, *, warps: int = 4, tile: int = 64, out: PlainFormat = F32
) -> GridKernel:
    """A kernel (q [tokens, heads, stored d], keys and values [slots, kv heads, ctx, stored d] in `shape.element`,
    pieces i32 [n, 4], y f32 or bf16 [tokens, heads, d], ctx), launched with n * heads blocks; a piece has at most
    16 * warps tokens."""
    shape.check()
    k = GridBuilder(name, warps * WARP)
    q, keys, values = (k.buffer(name, shape.element) for name in ("q", "keys", "values"))
    pieces, y, ctx = k.buffer("pieces", I32), k.buffer("y", out), k.size("ctx")
    width, block = shape.stored, k.block_id()
    head, piece = block % shape.heads, block // shape.heads
    first, count, slot, start = (pieces.load(piece * PIECE_WORDS + i).to_index() for i in range(PIECE_WORDS))
    base = (slot * shape.kv_heads + head // shape.group) * ctx * width
    end = start + count
    tiles = KvTiles(k, (keys, values), tile, width, base, end)
    lane, warp = k.lane_and_warp()
    rows = [warp * 16 + lane // 4 + half * 8 for half in range(2)]
    inside = [row.min(count - 1) for row in rows]
    queries = load_queries(k, q, [((first + row) * shape.heads + head) * width for row in inside], width)
    positions = [start + row for row in inside]

    lowest = (start + (1 - shape.window)).max(0) // tile if shape.window else k.index_value(0)
    last = (end + (tile - 1)) // tile
    whole = lowest if shape.window else (start + 1) // tile  # tiles below it are seen by all rows
    tiles.fetch(lowest)
    state = Rows.empty(k, width).flat()

    def walk(lower: Expr, upper: Expr, state: list[Expr], with_mask: bool) -> list[Expr]:
        with k.loop(lower, upper, 1, state) as loop:
            tiles.arrive(loop.i)
            tiles.fetch(loop.i + 1)
            scores = scores_of(k, queries, tiles, loop.i, 0, tile)
            if with_mask:
                scores = masked(k, scores, loop.i * tile, positions, shape)
            made, weights = Rows.of(k, loop.carried).add(scores, scale * LOG2_E)
            made.add_values(weights, tiles, loop.i, 0)
            loop.carry(*made.flat())
        return loop.results

    if not shape.window:
        state = walk(lowest, whole, state, False)
    done = Rows.of(k, walk(whole, last, state, True))
    k.async_wait(0)
    inverse = done.by_rows([1.0 / done.over_lanes(total, "add") for total in done.total])
    for half in range(2):
        with k.when(rows[half].compare("lt", count)):
            at = ((first + rows[half]) * shape.heads + head) * shape.width + lane % 4 * 2
            for number, output in enumerate(done.outputs[: shape.width // 8]):
                y.store(at + 8 * number, k.part(output * inverse, 2 * half, 2).cast(out))
    return k.grid_kernel()
