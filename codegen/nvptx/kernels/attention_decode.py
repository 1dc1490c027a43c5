"""Attention of single tokens on a GPU, the positions of each split over blocks, and the kernel that joins the parts.

A block has one token, one kv head with the up to 16 query heads that share it (the rows of its products), and one part
of the positions. Its 4 warps (2 of wide heads) each take 16 positions of every tile of 64; what they have is joined in
shared memory, what the blocks have by the second kernel. All parts of a sum of softmax are kept relative to the part's
largest score.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.nvptx.kernels.attention_packed import ring_of, tiles_of
from codegen.nvptx.kernels.attention_rows import (
    LOG2_E,
    NARROW,
    NEVER,
    AttentionShape,
    HeldQueries,
    KvTiles,
    Rows,
    Sight,
    load_queries,
    masked,
    scores_of,
)
from codegen.nvptx.kv_planes import KvPlanes
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32, PlainFormat

WARPS, WIDE_WARPS = 4, 2
POSITIONS = 16  # of a tile that one warp takes
ROWS = 16


def split_kernel(shape: AttentionShape, scale: float, name: str, *, planes: KvPlanes | None = None) -> GridKernel:
    """A kernel (q [tokens, heads, stored d], keys and values [slots, kv heads, ctx, stored d] in `shape.element`,
    positions and slots i32 [tokens], parts f32 [tokens, heads, splits, d], sums f32 [tokens, heads, splits, 2], ctx,
    splits), launched with tokens * kv heads * splits blocks. Sums are the largest score (times scale log2(e)) and the
    sum of weights. With `planes` those of the cache come in the place of keys and values; parts stay rotated."""
    shape.check()
    cache = planes or KvPlanes(shape.kv_heads, shape.width, shape.element)
    if shape.group > ROWS:
        raise DiagnosticError(f"{shape.group} query heads share a kv head", expected=f"at most {ROWS}")
    warps = WIDE_WARPS if shape.wide else WARPS
    k = GridBuilder(name, warps * WARP)
    q, held = k.buffer("q", shape.element), [k.buffer(p.name, p.element) for p in cache.planes]
    positions, slots = k.buffer("positions", I32), k.buffer("slots", I32)
    parts, sums, ctx, splits = k.buffer("parts", F32), k.buffer("sums", F32), k.size("ctx"), k.size("splits")
    width, tile, block = shape.stored, warps * POSITIONS, k.block_id()
    split, kv_head, token = block % splits, block // splits % shape.kv_heads, block // (splits * shape.kv_heads)
    position, slot = positions.load(token).to_index(), slots.load(token).to_index()
    line = slot * shape.kv_heads + kv_head
    tiles = tiles_of(k, cache, held, tile, line, ctx, position + 1)
    lane, warp = k.lane_and_warp()

    def begin(row: Expr) -> Expr:
        return (token * shape.heads + kv_head * shape.group + row.min(shape.group - 1)) * width

    if shape.wide:
        queries: Iterable[Expr] = HeldQueries(k, q, width, ROWS, 0, begin)
    else:
        queries = load_queries(k, q, [begin(lane // 4 + half * 8) for half in range(2)], width)

    lowest = (position + (1 - shape.window)).max(0) // tile if shape.window else k.index_value(0)
    end = cache.recent_start(position) if cache.recent else position + 1
    count = ((end + (tile - 1)) // tile - lowest).max(0)  # tiles that hold something to see
    lower, upper = lowest + count * split // splits, lowest + count * (split + 1) // splits
    with k.when(lower.compare("lt", upper)):
        tiles.fetch(lower)
    own = warp * POSITIONS

    def walk(tiles: KvTiles, lower: Expr, upper: Expr, state: list[Expr], sight: Sight) -> list[Expr]:
        with k.loop(lower, upper, 1, state) as loop:
            tiles.arrive(loop.i)
            tiles.fetch(loop.i + 1)
            scores = scores_of(k, queries, tiles, loop.i, own, POSITIONS)
            scores = masked(k, scores, loop.i * tile + own, sight, shape)
            made, weights = Rows.of(k, loop.carried).add(scores, scale * LOG2_E)
            made.add_values(weights, tiles, loop.i, own)
            loop.carry(*made.flat())
        return loop.results

    state = walk(tiles, lower, upper, Rows.empty(k, width).flat(), Sight([end] * 2, [position] * 2))
    if cache.recent:  # the last split has the newest positions too
        newest, after = ring_of(tiles, held, line), position + 1
        last = (after + (tile - 1)) // tile
        first = k.select(split.compare("eq", splits - 1), lowest.max(end // tile), last)
        state = walk(newest, first, last, state, Sight([after] * 2, [position] * 2, [end] * 2))
    k.async_wait(0)
    rows = Rows.of(k, state)
    outs = parts.at((token * shape.heads + kv_head * shape.group) * (splits * shape.width))
    ends = sums.at((token * shape.heads + kv_head * shape.group) * (splits * 2))
    _join_warps(k, rows, shape, splits, split, scale * LOG2_E, outs, ends)
    return k.grid_kernel()


def _join_warps(
    k: GridBuilder,
    rows: Rows,
    shape: AttentionShape,
    splits: Expr,
    split: Expr,
    factor: float,
    outs: Buffer,
    ends: Buffer,
) -> None:
    """Adds up what the warps have, under the largest score of all, and stores the rows that are query heads: up to
    `NARROW` columns at a time."""
    warps, most = k.threads // WARP, min(shape.stored, NARROW)
    stride = most + 8  # so that the rows of a store lie in different banks
    lane, warp = k.lane_and_warp()
    work, tops = k.shared(warps * ROWS * stride, F32), k.shared(warps * ROWS * 2, F32)
    for half in range(2):
        row = warp * ROWS + lane // 4 + half * 8
        total = rows.over_lanes(rows.total[half], "add")
        with k.when((lane % 4).compare("eq", 0)):
            tops.store(row * 2, k.join(rows.largest[half] * factor, total))
    for first in range(0, shape.width, most):
        if first:
            k.barrier()  # all have read the columns before
        for half in range(2):
            row = warp * ROWS + lane // 4 + half * 8
            for number, output in enumerate(rows.outputs[first // 8 : (first + most) // 8]):
                work.store(row * stride + 8 * number + lane % 4 * 2, k.part(output, 2 * half, 2))
        k.barrier()
        there = shape.width - first
        width = most if shape.wide else there  # whole passes: their rows begin at one bank
        with k.loop(k.thread_id(), shape.group * width, k.threads) as loop:
            row, column = loop.i // width, loop.i % width
            each = [tops.load((other * ROWS + row) * 2, 2) for other in range(warps)]
            top = each[0].extract(0)
            for one in each[1:]:
                top = top.max(one.extract(0))
            value, total = k.f32(0.0), k.f32(0.0)
            for other, one in enumerate(each):
                share = k.exp2(one.extract(0) - top)
                value = k.fma(work.load((other * ROWS + row) * stride + column), share, value)
                total = k.fma(one.extract(1), share, total)
            at = (row * splits + split) * shape.width + first + column
            with k.when(column.compare("lt", there)) if there < width else nullcontext():
                outs.store(at, value)
            if not first:
                with k.when(column.compare("eq", 0)):
                    ends.store((row * splits + split) * 2, k.join(top, total))


def join_kernel(shape: AttentionShape, name: str, *, out: PlainFormat = F32, rotate: int = 0) -> GridKernel:
    """A kernel (parts f32 [rows, splits, d], sums f32 [rows, splits, 2], y f32 or bf16 [rows, d], splits) for rows =
    tokens * heads, launched with a block for each row. Values of a cache that is rotated in blocks of `rotate` are
    rotated back."""
    shape.check()
    k = GridBuilder(name, -(-shape.width // WARP) * WARP)
    parts, sums, y, splits = k.buffer("parts", F32), k.buffer("sums", F32), k.buffer("y", out), k.size("splits")
    row, column = k.block_id(), k.thread_id().min(shape.width - 1)
    top = k.f32(NEVER)
    with k.loop(0, splits, 1, [top]) as loop:
        loop.carry(loop.carried[0].max(sums.load((row * splits + loop.i) * 2)))
    top = loop.results[0]
    with k.loop(0, splits, 1, [k.f32(0.0), k.f32(0.0)]) as loop:
        pair = sums.load((row * splits + loop.i) * 2, 2)
        share = k.exp2(pair.extract(0) - top)
        value = parts.load((row * splits + loop.i) * shape.width + column)
        loop.carry(k.fma(value, share, loop.carried[0]), k.fma(pair.extract(1), share, loop.carried[1]))
    value, total = loop.results
    if rotate:
        value = _rotated_back(k, value, rotate)
    with k.when(k.thread_id().compare("lt", shape.width)):
        y.store(row * shape.width + column, (value / total).cast(out))
    return k.grid_kernel()


def _rotated_back(k: GridBuilder, value: Expr, block: int) -> Expr:
    """A row of which every thread has a column, times Hadamard's matrix in blocks of columns."""
    thread = k.thread_id()
    work = k.shared(k.threads, F32) if block > WARP else None
    distance = 1
    while distance < block:
        if distance < WARP:
            other = k.shuffle(value, distance)
        else:
            assert work is not None
            k.barrier()
            work.store(thread, value)
            k.barrier()
            other = work.load(k.xor(thread, k.index_value(distance)))
        value = k.select((thread // distance % 2).compare("eq", 1), other - value, value + other)
        distance *= 2
    return value * block**-0.5
