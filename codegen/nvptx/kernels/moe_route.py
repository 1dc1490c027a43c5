"""Routing on a GPU: the experts of every token, and the order that groups pairs (token, choice) by expert.

`route_kernel` is moe.route: a warp has a token, a lane every 32nd expert. Choices go by logit, and of equal ones the
lower expert comes first.

`dispatch_kernel` is moe.dispatch, in one block whatever the number of pairs: a thread counts the pairs of one expert in
a part of the list, sums over experts and parts say where each goes, and a second pass puts them there, in the order of
the list. It also writes what products of experts go by: tiles of rows of one expert. Their number depends on the
routing, the launch does not: `most_tiles` are enough for any, and those that are not needed have no rows.
"""

from __future__ import annotations

from codegen.kernels.math import LOG2_E
from codegen.nvptx.builder import WARP, GridBuilder, GridKernel
from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32, PlainFormat
from ir.types import ScalarType, VectorType

MOST_EXPERTS = 1024
MOST_PARTS = 32  # of the list of pairs, each with a thread for every expert
TILE_WORDS = 4  # of a tile: expert, first row in grouped order, rows, 0
MASKED = -3e38  # a logit that no expert has
LOWEST = float("-inf")


def most_tiles(pairs: int, experts: int, tile: int) -> int:
    """Tiles of up to `tile` rows that hold any routing of `pairs` pairs: each expert may have one that is not full."""
    return min(pairs, (pairs + experts * (tile - 1)) // tile)


def route_kernel(experts: int, top_k: int, normalize: bool, element: PlainFormat, name: str) -> GridKernel:
    """A kernel (logits [tokens, experts], ids i32 [tokens, top_k], weights f32 [tokens, top_k]), a block a token."""
    if experts > MOST_EXPERTS:
        raise DiagnosticError(f"{experts} experts on GPUs", expected=f"at most {MOST_EXPERTS}")
    k = GridBuilder(name, WARP)
    logits, ids, weights = k.buffer("logits", element), k.buffer("ids", I32), k.buffer("weights", F32)
    token, lane = k.block_id(), k.thread_id()
    masked, lowest = k.f32(MASKED), k.f32(LOWEST)
    numbers = [lane + first for first in range(0, experts, WARP)]  # of the experts of this lane
    values: list[Expr] = []
    for first, number in zip(range(0, experts, WARP), numbers, strict=True):
        value = logits.load(token * experts + number.min(experts - 1)).cast(F32).max(MASKED)  # NaN becomes MASKED
        values.append(value if first + WARP <= experts else k.select(number.compare("lt", experts), value, lowest))
    top = values[0]
    for value in values[1:]:
        top = top.max(value)
    top = k.warp_reduce(top.max(masked), Expr.max)
    total = k.f32(0.0)
    for value in values:
        total = total + k.exp2((value - top) * LOG2_E)
    total = k.warp_reduce(total, Expr.__add__)
    at = [number.from_index() for number in numbers]
    chosen: list[tuple[Expr, Expr]] = []
    for _ in range(top_k):
        best, place = values[0], at[0]
        for value, number in zip(values[1:], at[1:], strict=True):
            better = value.compare("gt", best)  # strictly: the lower number wins a tie
            best, place = k.select(better, value, best), k.select(better, number, place)
        best, place = _best_of_warp(k, best, place)
        values = [k.select(n.compare("eq", place), lowest, value) for n, value in zip(at, values, strict=True)]
        chosen.append((place, k.exp2((best - top) * LOG2_E) / total))
    if normalize:
        over = chosen[0][1]
        for _, probability in chosen[1:]:
            over = over + probability
        chosen = [(place, probability / over) for place, probability in chosen]
    with k.when(lane.compare("eq", 0)):
        for i, (place, probability) in enumerate(chosen):
            ids.store(token * top_k + i, place)
            weights.store(token * top_k + i, probability)
    return k.grid_kernel()


def _best_of_warp(k: GridBuilder, best: Expr, place: Expr) -> tuple[Expr, Expr]:
    """The largest value of all lanes and its number, the lower one of equal values."""
    mask = WARP // 2
    while mask:
        value, number = k.shuffle(best, mask), k.shuffle(place, mask)
        other = value.compare("gt", best) | (value.compare("eq", best) & number.compare("lt", place))
        best, place = k.select(other, value, best), k.select(other, number, place)
        mask //= 2
    return best, place


def dispatch_kernel(experts: int, tile: int, name: str) -> GridKernel:
    """A kernel (ids i32 [pairs], order i32 [pairs], offsets i32 [experts + 1], inverse i32 [pairs], tiles i32
    [max tiles, 4], pairs, max tiles), launched with one block. inverse[order[j]] = j; max tiles >= `most_tiles`."""
    if experts > MOST_EXPERTS:
        raise DiagnosticError(f"{experts} experts on GPUs", expected=f"at most {MOST_EXPERTS}")
    parts = min(MOST_PARTS, MOST_EXPERTS // experts)
    k = GridBuilder(name, -(-parts * experts // WARP) * WARP)
    ids, order, offsets = k.buffer("ids", I32), k.buffer("order", I32), k.buffer("offsets", I32)
    inverse, tiles = k.buffer("inverse", I32), k.buffer("tiles", I32)
    pairs, most = k.size("pairs"), k.size("tiles")
    counts = k.shared(parts * experts, I32)
    sums = [k.shared(2 * experts, I32) for _ in range(2)]  # rows and tiles of experts, of those up to it
    thread = k.thread_id()
    expert, part = thread % experts, thread // experts
    works = part.compare("lt", parts)
    number = expert.from_index()
    each = (pairs + (parts - 1)) // parts
    first, last = (part * each).min(pairs), ((part + 1) * each).min(pairs)
    zero, one = (k.constant(ScalarType(I32), x) for x in (0, 1))
    with k.when(works):
        with k.loop(first, last, 1, [zero]) as loop:
            loop.carry(loop.carried[0] + k.select(ids.load(loop.i).compare("eq", number), one, zero))
        counts.store(thread, loop.results[0])
    k.barrier()
    leads = thread.compare("lt", experts)
    with k.when(leads):
        with k.loop(0, parts, 1, [zero]) as loop:
            loop.carry(loop.carried[0] + counts.load(loop.i * experts + thread))
        rows = loop.results[0]
        sums[0].store(thread * 2, k.join(rows, (rows + (tile - 1)) // tile))
    up_to = _scan(k, sums, thread, experts)
    all_rows, all_tiles = (up_to.load((experts - 1) * 2 + i) for i in range(2))
    with k.when(leads):
        _write_tiles(k, up_to, thread, tile, offsets, tiles)
        with k.when(thread.compare("eq", 0)):
            offsets.store(experts, all_rows)
    with k.loop(all_tiles.to_index() + thread, most, k.threads) as loop:
        tiles.store(loop.i * TILE_WORDS, k.constant(VectorType(TILE_WORDS, I32), 0))
    with k.when(works):
        before = _rows_before(k, up_to, expert)
        with k.loop(0, part, 1, [before]) as loop:
            loop.carry(loop.carried[0] + counts.load(loop.i * experts + expert))
        with k.loop(first, last, 1, [loop.results[0].to_index()]) as loop:
            place = loop.carried[0]
            mine = ids.load(loop.i).compare("eq", number)
            with k.when(mine):
                order.store(place, loop.i.from_index())
                inverse.store(loop.i, place.from_index())
            loop.carry(k.select(mine, place + 1, place))
    return k.grid_kernel()


def _scan(k: GridBuilder, sums: list[Buffer], thread: Expr, experts: int) -> Buffer:
    """Sums over all experts up to each, by doubling distances from one buffer to the other; the one that has them."""
    distance = 1
    source, target = sums
    while distance < experts:
        k.barrier()
        with k.when(thread.compare("lt", experts)):
            own, back = source.load(thread * 2, 2), source.load((thread - distance).max(0) * 2, 2)
            there = thread.compare("ge", distance)
            target.store(thread * 2, k.select(there, own + back, own))
        source, target = target, source
        distance *= 2
    k.barrier()
    return source


def _rows_before(k: GridBuilder, up_to: Buffer, expert: Expr) -> Expr:
    """Rows of all experts before one."""
    zero = k.constant(ScalarType(I32), 0)
    return k.select(expert.compare("eq", 0), zero, up_to.load((expert - 1).max(0) * 2))


def _write_tiles(k: GridBuilder, up_to: Buffer, expert: Expr, tile: int, offsets: Buffer, tiles: Buffer) -> None:
    """The offset of an expert and its tiles."""
    own = up_to.load(expert * 2, 2)
    begin = _rows_before(k, up_to, expert)
    end, last = own.extract(0), own.extract(1).to_index()
    offsets.store(expert, begin)
    first = last - ((end - begin + (tile - 1)) // tile).to_index()
    zero = k.constant(ScalarType(I32), 0)
    with k.loop(first, last) as loop:
        row = begin + (loop.i - first).from_index() * tile
        tiles.store(loop.i * TILE_WORDS, k.join(expert.from_index(), row, (end - row).min(tile), zero))
