"""Attention over the KV cache in one pass (online softmax; Milakov and Gimelshein, arXiv:1805.02867).

One unit of work is one kv head and a tile of rows: its query heads (GQA) times a few consecutive tokens of a sequence.
Blocks of positions stream by once: scores, running maximum, rescaled sums, weighted values. A tile whose tokens are not
consecutive positions of one slot is done token by token, so that any ragged batch is right and a prompt chunk is fast.
"""

from __future__ import annotations

from codegen.kernels.call import Argument, EmitContext, KernelSpec, SizeArgument, emitter, rows_of, structure_key
from codegen.kernels.kv_layout import KVLayout
from codegen.kernels.math import LOG2_E, exp2
from codegen.kernels.micro import LANES, StripMatrix, TileShape, multiply_rows
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, I32, PlainFormat
from ir.ops.attention import AttentionOp
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from passes.analysis.cascade_passes import count_passes

MASKED = -1e30  # finite, so that the difference of two masked scores is a number
TILE_ROWS = 8  # query rows (tokens x heads) that share one read of the keys


@emitter(AttentionOp)
def emit_attention(op: Op, context: EmitContext) -> KernelSpec:
    """attn.attention, alone or followed by reshape and cast in a region of kind "attention"."""
    attention = op if isinstance(op, AttentionOp) else _inner(op)
    passes = count_passes(attention.body.block).count
    if passes != 1:
        message = (
            f"'attn.attention' reads the keys in {passes} passes; fuse-attention brings it to one before lower-to-tile"
        )
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    arguments: list[Argument] = [*op.operands, op.results[0]]
    arguments += [SizeArgument(rows_of(op.results[0].type)), SizeArgument(SymbolicDim("ctx"))]
    out = op.results[0].type
    assert isinstance(out, TensorType) and isinstance(out.element, PlainFormat)
    element = out.element
    key = (structure_key(op), context.program)
    return KernelSpec(
        f"attention_{attention.cache.type.head_dim}",
        key,
        arguments,
        (4,),
        lambda name: _build(name, attention, element, context),
    )


def _inner(op: Op) -> AttentionOp:
    assert isinstance(op, FusedOp)
    return next(inner for inner in op.body.block.ops if isinstance(inner, AttentionOp))


def _build(name: str, op: AttentionOp, out_element: PlainFormat, context: EmitContext) -> FuncOp:
    cache, q_type = op.cache.type, op.q.type
    assert isinstance(cache, KVCacheType) and isinstance(q_type, TensorType)
    kv, heads = KVLayout.of(cache), q_type.shape[1]
    assert isinstance(heads, int)
    group = heads // kv.heads
    tokens_per_tile = max(1, TILE_ROWS // group) if context.program == "prefill" else 1

    k = KernelBuilder(name)
    q, cache_buffer = k.buffer("q", F32), k.buffer("cache", kv.element)
    positions, slots = k.buffer("positions", I32), k.buffer("slots", I32)
    out = k.buffer("out", out_element)
    rows, ctx = k.size("rows"), k.size("ctx")

    def one_tile(first_row: Expr, head: Expr, tokens: int) -> None:
        slot = slots.load(first_row).to_index()
        keys = cache_buffer.at(kv.head_start(slot, head, ctx))
        tile.attend(first_row, head, tokens, keys)

    tile = _Tile(k, op, kv, cache.head_dim, heads, group, tokens_per_tile, q, positions, out)
    tiles = (rows + (tokens_per_tile - 1)) // tokens_per_tile
    first, last = k.thread_share(tiles * kv.heads)
    with k.loop(first, last) as unit:
        row, head = unit.i // kv.heads * tokens_per_tile, unit.i % kv.heads
        if tokens_per_tile == 1:
            one_tile(row, head, 1)
        else:
            end = (row + tokens_per_tile).min(rows)
            together = _consecutive(k, positions, slots, row, end, tokens_per_tile)
            with k.when(together.compare("ne", 0)):
                one_tile(row, head, tokens_per_tile)
            with k.when(together.compare("eq", 0)), k.loop(row, end) as single:
                one_tile(single.i, head, 1)
    return k.finish()


def _consecutive(k: KernelBuilder, positions: Buffer, slots: Buffer, row: Expr, end: Expr, count: int) -> Expr:
    """index 1 when rows row .. row + count exist, share a slot and have consecutive positions, else 0."""
    slot, position = slots.load(row), positions.load(row)
    short = end - row
    with k.loop(1, short, 1, [k.index(1)]) as loop:
        same = slots.load(row + loop.i).compare("eq", slot)
        follows = positions.load(row + loop.i).compare("eq", position + loop.i.from_index())
        zero = k.index(0)
        loop.carry(k.select(same, k.select(follows, loop.carried[0], zero), zero))
    return k.select(short.compare("eq", count), loop.results[0], k.index(0))


class _Tile:
    """Writes the attention of one tile of query rows over all blocks of one kv head."""

    def __init__(
        self, k: KernelBuilder, op: AttentionOp, kv: KVLayout, dim: int, heads: int, group: int, max_tokens: int,
        q: Buffer, positions: Buffer, out: Buffer,
    ) -> None:  # fmt: skip
        self.k, self.op, self.kv, self.dim, self.heads, self.group = k, op, kv, dim, heads, group
        self.q, self.positions, self.out = q, positions, out
        most = max_tokens * group
        self.blocks = _blocks_per_step(group)
        self.query = k.scratch(most * kv.dim, kv.element)  # query rows in the cache's element
        self.weights = k.scratch(most * self.blocks * kv.block, kv.element)  # exp of the scores of one step
        self.sums = k.scratch(most * kv.dim, F32)  # weighted values so far

    def attend(self, first_row: Expr, head: Expr, tokens: int, keys: Buffer) -> None:
        """Rows first_row .. + tokens (consecutive positions of one slot), the query heads of kv head `head`."""
        k, kv = self.k, self.kv
        count = tokens * self.group
        blocks = self.blocks
        step = blocks * kv.block
        self._load_queries(first_row, head, tokens)
        first_position = self.positions.load(first_row).to_index()
        end = first_position + tokens
        start = k.index(0)
        if self.op.window:
            start = (first_position - (self.op.window - 1)).max(0) // step * step
        initial = [k.f32(MASKED)] * count + [k.f32(0.0, LANES)] * count
        with k.loop(start, end, step, initial) as loop:
            maxima, totals = loop.carried[:count], loop.carried[count:]
            block = keys.at(loop.i * (2 * kv.dim))
            scores = self._scores(block, blocks, count)
            new_maxima, new_totals, corrections = [], [], []
            for i in range(count):
                position = first_position + i // self.group
                masked = [self._mask(scores[i][b], loop.i + b * kv.block, position) for b in range(blocks)]
                largest = masked[0]
                for other in masked[1:]:
                    largest = largest.max(other)
                maximum = largest.reduce("max").max(maxima[i])
                correction = exp2(k, maxima[i] - maximum)
                total = totals[i] * correction
                for b, score in enumerate(masked):
                    e = exp2(k, score - k.splat(maximum, LANES))
                    total = total + e
                    self.weights.store(i * step + b * kv.block, e.cast(kv.element))
                new_maxima.append(maximum)
                new_totals.append(total)
                corrections.append(correction)
            self._add_values(block, blocks, count, corrections)
            loop.carry(*new_maxima, *new_totals)
        self._store(first_row, head, loop.results[count:])

    def _load_queries(self, first_row: Expr, head: Expr, tokens: int) -> None:
        """Query rows into scratch, token by token and head by head, in the cache's element; sums start at zero."""
        k, kv = self.k, self.kv
        for t in range(tokens):
            with k.loop(0, self.group) as loop:
                source = ((first_row + t) * self.heads + head * self.group + loop.i) * self.dim
                target = (loop.i + t * self.group) * kv.dim
                for c in range(0, kv.dim, LANES):
                    mask = k.lanes_below(self.dim - c, LANES) if c + LANES > self.dim else None
                    self.query.store(target + c, self.q.load(source + c, LANES, mask).cast(kv.element))
                    self.sums.store(target + c, k.f32(0.0, LANES))

    def _scores(self, block: Buffer, blocks: int, count: int) -> list[list[Expr]]:
        """[count][blocks] vectors of 16 positions: q . k, scaled to base 2."""
        k, kv = self.k, self.kv
        matrix = StripMatrix(kv.block, kv.dim, kv.strips, kv.element)
        rows = [(self.query, k.index(i * kv.dim)) for i in range(count)]
        vectors = [(block.at(b * 2 * kv.dim * kv.block), 0) for b in range(blocks)]
        scores = multiply_rows(k, rows, vectors, matrix, TileShape(unroll=2))
        factor = self.op.scale * LOG2_E
        return [[s * factor for s in row] for row in scores]

    def _mask(self, score: Expr, first: Expr, position: Expr) -> Expr:
        """Scores of positions after `position`, or before its window, become MASKED."""
        k = self.k
        at = k.iota(LANES) + k.splat(first.from_index(), LANES)
        limit = k.splat(position.from_index(), LANES)
        score = k.select(at.compare("le", limit), score, MASKED)
        if self.op.window:
            score = k.select(at.compare("gt", limit - self.op.window), score, MASKED)
        return score

    def _add_values(self, block: Buffer, blocks: int, count: int, corrections: list[Expr]) -> None:
        """sums = sums * correction + weights . values, some strips of 16 columns at a time."""
        k, kv = self.k, self.kv
        matrix = StripMatrix(16, kv.block, kv.strips, kv.element)
        strips = kv.dim // 16
        width = max(1, min(strips, 16 // count))
        for first in range(0, strips, width):
            chosen = range(first, min(first + width, strips))
            sums = [[self.sums.load(i * kv.dim + s * 16, LANES) * corrections[i] for s in chosen] for i in range(count)]
            for b in range(blocks):
                values = block.at(b * 2 * kv.dim * kv.block + kv.block * kv.dim)
                rows = [(self.weights, k.index(i * blocks * kv.block + b * kv.block)) for i in range(count)]
                vectors = [(values.at(s * 16 * kv.block), 0) for s in chosen]
                sums = multiply_rows(k, rows, vectors, matrix, TileShape(unroll=8), sums)
            for i in range(count):
                for j, s in enumerate(chosen):
                    self.sums.store(i * kv.dim + s * 16, sums[i][j])

    def _store(self, first_row: Expr, head: Expr, totals: list[Expr]) -> None:
        """sums / totals into the output."""
        k, kv = self.k, self.kv
        for i, total in enumerate(totals):
            factor = 1.0 / total.reduce("add")
            row = first_row + i // self.group
            target = (row * self.heads + head * self.group + i % self.group) * self.dim
            for c in range(0, kv.dim, LANES):
                mask = k.lanes_below(self.dim - c, LANES) if c + LANES > self.dim else None
                value = self.sums.load(i * kv.dim + c, LANES) * factor
                self.out.store(target + c, value.cast(self.out.element), mask)


def _blocks_per_step(group: int) -> int:
    """Blocks of 16 positions per step: as many sums as registers hold for the query heads of one kv head.

    It depends on nothing else, neither the program nor how many tokens share a tile: the same positions are then
    joined in the same steps, and a token has the same bits in a prompt chunk and alone.
    """
    return 2 if group <= 10 else 1
