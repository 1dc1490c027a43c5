"""Attention of a prompt on a GPU: y[t, h] = softmax(scale q[t, h] K^T) V over the positions that row t sees.

A block has one query head and a piece of a prompt: up to 64 tokens of one slot at consecutive positions, 16 for each of
its 4 warps. It walks over tiles of 64 positions (32 of wide heads) with the sums of softmax kept as they come
(arXiv:2205.14135). Tiles that all rows see whole are not masked.
"""

from __future__ import annotations

from collections.abc import Iterable

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.attention_packed import ring_of, tiles_of
from codegen.nvptx.kernels.attention_rows import (
    LOG2_E,
    AttentionShape,
    HeldQueries,
    KvTiles,
    Rows,
    Sight,
    load_queries,
    masked,
    rotated_back,
    scores_of,
)
from codegen.nvptx.kv_planes import KvPlanes
from codegen.tile_builder import Expr
from ir.formats import F32, I32, PlainFormat

PIECE_WORDS = 4  # of a piece of a prompt: first token, tokens, slot, position of the first token


def prefill_kernel(
    shape: AttentionShape, scale: float, name: str, *, warps: int = 4, tile: int = 0, out: PlainFormat = F32,
    planes: KvPlanes | None = None,
) -> GridKernel:  # fmt: skip
    """A kernel (q [tokens, heads, stored d], keys and values [slots, kv heads, ctx, stored d] in `shape.element`,
    pieces i32 [n, 4], y f32 or bf16 [tokens, heads, d], ctx), launched with n * heads blocks; a piece has at most
    16 * warps tokens. With `planes` those of the cache come in the place of keys and values."""
    shape.check()
    tile = tile or (32 if shape.wide else 64)
    cache = planes or KvPlanes(shape.kv_heads, shape.width, shape.element)
    k = GridBuilder(name, warps * WARP)
    q, held = k.buffer("q", shape.element), [k.buffer(p.name, p.element) for p in cache.planes]
    pieces, y, ctx = k.buffer("pieces", I32), k.buffer("y", out), k.size("ctx")
    width, block = shape.stored, k.block_id()
    head, piece = block % shape.heads, block // shape.heads
    first, count, slot, start = (pieces.load(piece * PIECE_WORDS + i).to_index() for i in range(PIECE_WORDS))
    line, end = slot * shape.kv_heads + head // shape.group, start + count
    tiles = tiles_of(k, cache, held, tile, line, ctx, end)
    lane, warp = k.lane_and_warp()
    rows = [warp * 16 + lane // 4 + half * 8 for half in range(2)]
    inside = [row.min(count - 1) for row in rows]

    def begin(row: Expr) -> Expr:
        return ((first + row.min(count - 1)) * shape.heads + head) * width

    if shape.wide:
        queries: Iterable[Expr] = HeldQueries(k, q, width, warps * 16, warp * 16, begin)
    else:
        queries = load_queries(k, q, [begin(row) for row in rows], width)
    positions = [start + row for row in inside]

    lowest = (start + (1 - shape.window)).max(0) // tile if shape.window else k.index_value(0)
    last = (end + (tile - 1)) // tile
    seen_by_all = cache.recent_start(start) if cache.recent else start + 1
    whole = lowest if shape.window else seen_by_all // tile  # tiles below it are seen by all rows
    border = [cache.recent_start(p) for p in positions] if cache.recent else None
    tiles.fetch(lowest)
    state = Rows.empty(k, width).flat()

    def walk(tiles: KvTiles, lower: Expr, upper: Expr, state: list[Expr], sight: Sight | None) -> list[Expr]:
        with k.loop(lower, upper, 1, state) as loop:
            tiles.arrive(loop.i)
            tiles.fetch(loop.i + 1)
            scores = scores_of(k, queries, tiles, loop.i, 0, tile)
            if sight is not None:
                scores = masked(k, scores, loop.i * tile, sight, shape)
            made, weights = Rows.of(k, loop.carried).add(scores, scale * LOG2_E)
            made.add_values(weights, tiles, loop.i, 0)
            loop.carry(*made.flat())
        return loop.results

    if not shape.window:
        state = walk(tiles, lowest, whole, state, None)
    after = [p + 1 for p in positions]
    if border is None:
        state = walk(tiles, whole, last, state, Sight(after, positions))
    else:
        packed = (cache.recent_start(end - 1) + (tile - 1)) // tile
        state = walk(tiles, whole, packed, state, Sight(border, positions))
        newest = ring_of(tiles, held, line)
        state = walk(newest, lowest.max(seen_by_all // tile), last, state, Sight(after, positions, border))
    done = Rows.of(k, state)
    k.async_wait(0)
    if cache.rotate:
        done.outputs = rotated_back(k, done.outputs, cache.rotate)
    inverse = done.by_rows([1.0 / done.over_lanes(total, "add") for total in done.total])
    for half in range(2):
        with k.when(rows[half].compare("lt", count)):
            at = ((first + rows[half]) * shape.heads + head) * shape.width + lane % 4 * 2
            for number, output in enumerate(done.outputs[: shape.width // 8]):
                y.store(at + 8 * number, k.part(output * inverse, 2 * half, 2).cast(out))
    return k.grid_kernel()
