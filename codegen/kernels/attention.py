"""Attention over the KV cache in one pass (online softmax; Milakov and Gimelshein, arXiv:1805.02867).

One unit of work is one kv head and a tile of rows: its query heads (GQA) times a few consecutive tokens of a sequence.
Steps of 64 positions stream by once: scores of all rows; maximum, exponentials and sum row by row; weighted values. The
bytes of the next step are prefetched meanwhile. A tile whose tokens are not consecutive positions of one slot is done
token by token, so that any ragged batch is right and a prompt chunk is fast.

A low-bit cache with recent positions is read in two runs of steps: codes up to `KVLayout.recent_start`, then the ring.
Where steps begin depends on the position of the row, not on the chunk it came in: a token has the same bits in a prompt
chunk and alone.
"""

from __future__ import annotations

from codegen.kernels.call import Argument, EmitContext, KernelSpec, SizeArgument, emitter, rows_of, structure_key
from codegen.kernels.hadamard import rotate_stored
from codegen.kernels.kv_layout import BLOCK, KVLayout
from codegen.kernels.kv_products import LANES, MOST_SUMS, STEP, STEP_BLOCKS, BlockOf, Products, chunks, products
from codegen.kernels.math import LOG2_E, exp2, exp2_short
from codegen.tickets import Tickets
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F16, F32, I32, PlainFormat
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
    decode = context.program != "prefill"
    tokens_per_tile = 1 if decode else max(1, TILE_ROWS // group)

    k = KernelBuilder(name)
    q, cache_buffer = k.buffer("q", F32), k.buffer("cache", kv.element)
    positions, slots = k.buffer("positions", I32), k.buffer("slots", I32)
    out = k.buffer("out", out_element)
    rows, ctx = k.size("rows"), k.size("ctx")
    tile = _Tile(k, op, kv, cache.head_dim, heads, tokens_per_tile, q, positions, out, prefetch=decode)

    def one_tile(first_row: Expr, head: Expr, tokens: int) -> None:
        slot = slots.load(first_row).to_index()
        tile.attend(first_row, head, tokens, kv.head(cache_buffer, slot, head, ctx), ctx)

    tiles = (rows + (tokens_per_tile - 1)) // tokens_per_tile

    def unit(number: Expr) -> None:
        row, head = number // kv.heads * tokens_per_tile, number % kv.heads
        if tokens_per_tile == 1:
            one_tile(row, head, 1)
        else:
            end = (row + tokens_per_tile).min(rows)
            together = _consecutive(k, positions, slots, row, end, tokens_per_tile, kv)
            with k.when(together.compare("ne", 0)):
                one_tile(row, head, tokens_per_tile)
            with k.when(together.compare("eq", 0)), k.loop(row, end) as single:
                one_tile(single.i, head, 1)

    # Units differ: later tokens of a prompt see more positions, and each sequence of a batch has its own length. Each
    # goes to whoever is free, a prompt's long ones first.
    tickets, count = Tickets(k), tiles * kv.heads
    with k.loop(0, count) as number, tickets.piece(number.i):
        unit(count - 1 - number.i)
    return k.finish()


def _consecutive(
    k: KernelBuilder, positions: Buffer, slots: Buffer, row: Expr, end: Expr, count: int, kv: KVLayout
) -> Expr:
    """index 1 when rows row .. row + count exist, share a slot, have consecutive positions and read the same ones in
    the ring, else 0."""
    slot, position = slots.load(row), positions.load(row)
    short, zero = end - row, k.index(0)
    with k.loop(1, short, 1, [k.index(1)]) as loop:
        same = slots.load(row + loop.i).compare("eq", slot)
        follows = positions.load(row + loop.i).compare("eq", position + loop.i.from_index())
        loop.carry(k.select(same, k.select(follows, loop.carried[0], zero), zero))
    together = k.select(short.compare("eq", count), loop.results[0], zero)
    if kv.recent:
        first = position.to_index()
        alike = kv.recent_start(first).compare("eq", kv.recent_start(first + (count - 1)))
        together = k.select(alike, together, zero)
    return together


class _Tile:
    """Writes the attention of one tile of query rows over all blocks of one kv head."""

    def __init__(
        self, k: KernelBuilder, op: AttentionOp, kv: KVLayout, dim: int, heads: int, max_tokens: int, q: Buffer,
        positions: Buffer, out: Buffer, prefetch: bool,
    ) -> None:  # fmt: skip
        self.k, self.op, self.kv, self.dim, self.heads = k, op, kv, dim, heads
        self.group = heads // kv.heads
        self.q, self.positions, self.out = q, positions, out
        most = max_tokens * self.group
        self.row = k.scratch(kv.dim, F32)  # one query, rotated
        self.scores = k.scratch(most * STEP, F32)  # of one step, in base 2
        padded = -(-most // LANES) * LANES
        self.largest = k.scratch(padded, F32)  # largest score of this step
        self.maxima = k.scratch(padded, F32)  # largest score so far
        self.corrections = k.scratch(padded, F32)  # what the sums before this step are worth after it
        self.totals = k.scratch(most * LANES, F32)  # sums of the weights so far, in 16 parts
        self.sums = k.scratch(most * kv.dim, F32)  # weighted values so far
        factor = op.scale * LOG2_E  # scores in base 2: exponentials become powers of two
        self.exp2 = exp2 if kv.element in (F32, F16) else exp2_short  # weights have no more digits than that
        ahead = STEP_BLOCKS * kv.blocks.size if prefetch else 0  # the same place in the next step
        self.parts: list[Products] = [products(k, kv.blocks, most, factor, ahead)]
        if kv.recent:
            self.parts.append(products(k, kv.ring, most, factor))

    def attend(self, first_row: Expr, head: Expr, tokens: int, blocks: Buffer, ctx: Expr) -> None:
        """Rows first_row .. + tokens (consecutive positions of one slot), the query heads of kv head `head`."""
        k, kv = self.k, self.kv
        count = tokens * self.group
        self._begin(first_row, head, tokens)
        first_position = self.positions.load(first_row).to_index()
        end = first_position + tokens
        start = k.index(0)
        if self.op.window:
            start = (first_position - (self.op.window - 1)).max(0) // STEP * STEP
        border = kv.recent_start(first_position) if kv.recent else end

        def stored(position: Expr) -> Buffer:
            return kv.block_of(blocks, position)

        def recent(position: Expr) -> Buffer:
            return kv.ring_of(blocks, position, ctx)

        with k.loop(start, border, STEP) as loop:
            self._step(self.parts[0], stored, loop.i, border, count, first_position)
        if kv.recent:
            with k.loop(border, end, STEP) as loop:
                self._step(self.parts[1], recent, loop.i, end, count, first_position)
        self._store(first_row, head, count)

    def _begin(self, first_row: Expr, head: Expr, tokens: int) -> None:
        """Queries, token by token and head by head; sums start at zero."""
        k, kv = self.k, self.kv
        for c in range(self.dim // LANES * LANES, kv.dim, LANES):
            self.row.store(c, k.f32(0.0, LANES))
        for t in range(tokens):
            with k.loop(0, self.group) as loop:
                source = ((first_row + t) * self.heads + head * self.group + loop.i) * self.dim
                row = loop.i + t * self.group
                for c in range(0, self.dim, LANES):
                    mask = k.lanes_below(self.dim - c, LANES) if c + LANES > self.dim else None
                    self.row.store(c, self.q.load(source + c, LANES, mask))
                if kv.rotate:
                    rotate_stored(k, self.row, self.dim, kv.rotate)
                for part in self.parts:
                    part.take_query(row, self.row)
                self.maxima.store(row, k.f32(MASKED))
                self.totals.store(row * LANES, k.f32(0.0, LANES))
                for c in range(0, kv.dim, LANES):
                    self.sums.store(row * kv.dim + c, k.f32(0.0, LANES))

    def _step(self, part: Products, block_of: BlockOf, at: Expr, end: Expr, count: int, first_position: Expr) -> None:
        """Positions at .. at + STEP, those before `end` only, joined to what was summed before."""
        k = self.k
        blocks = ((end - at + (BLOCK - 1)) // BLOCK).min(STEP_BLOCKS)
        part.begin_step(block_of, at, count)
        for rows in chunks(count, MOST_SUMS):
            together = max(1, min(STEP_BLOCKS, 8 // len(rows)))  # sums that wait for no other
            with k.loop(0, blocks, together) as loop:
                places = [block_of(at + (loop.i + u) * BLOCK) for u in range(together)]
                scores = part.scores([(place, loop.i + u) for u, place in enumerate(places)], rows)
                for row, vectors in zip(rows, scores, strict=True):
                    for u, vector in enumerate(vectors):
                        self.scores.store((loop.i + u) * BLOCK + row * STEP, vector)
        self._mask(at, end, count, first_position)
        with k.loop(0, count) as loop:
            scores = [self.scores.load(loop.i * STEP + b * BLOCK, LANES) for b in range(STEP_BLOCKS)]
            largest = scores[0].max(scores[1]).max(scores[2].max(scores[3]))
            self.largest.store(loop.i, largest.reduce("max"))
            part.bound_weights(loop.i, scores)
        for row in range(0, count, LANES):  # of 16 rows at once
            before, largest = self.maxima.load(row, LANES), self.largest.load(row, LANES)
            maximum = largest.max(before)
            self.maxima.store(row, maximum)
            self.corrections.store(row, self.exp2(k, before - maximum))
            part.scale_weights(row, maximum)
        with k.loop(0, count) as loop:
            self._weigh(part, loop.i)
        part.add_values(block_of, at, blocks, count, self.sums, self.corrections)

    def _weigh(self, part: Products, row: Expr) -> None:
        """Scores of one row become weights, and are added to the sum of its weights."""
        k = self.k
        maximum, correction = self.maxima.load(row), self.corrections.load(row)
        weights = []
        total = self.totals.load(row * LANES, LANES) * correction
        for b in range(STEP_BLOCKS):
            weight = self.exp2(k, self.scores.load(row * STEP + b * BLOCK, LANES) - maximum)
            total = total + weight
            weights.append(weight)
        self.totals.store(row * LANES, total)
        self.parts[0].scale_constant_part(row, correction)
        part.store_weights(row, weights)

    def _mask(self, at: Expr, end: Expr, count: int, first_position: Expr) -> None:
        """Scores of positions that a row does not see, or from `end` on, become MASKED. Most steps have none."""
        k, window = self.k, self.op.window
        partly = (at + STEP).compare("gt", end.min(first_position + 1))
        if window:
            newest = first_position + (count // self.group - 1)
            partly = partly | (at + window).compare("le", newest)
        with k.when(partly), k.loop(0, count) as row:
            position = first_position + row.i // self.group
            limit = k.splat(position.min(end - 1).from_index(), LANES)
            for b in range(STEP_BLOCKS):
                place = row.i * STEP + b * BLOCK
                score = self.scores.load(place, LANES)
                here = k.iota(LANES) + k.splat((at + b * BLOCK).from_index(), LANES)
                score = k.select(here.compare("le", limit), score, MASKED)
                if window:
                    oldest = k.splat(position.from_index(), LANES) - window
                    score = k.select(here.compare("gt", oldest), score, MASKED)
                self.scores.store(place, score)

    def _store(self, first_row: Expr, head: Expr, count: int) -> None:
        """sums / totals into the output."""
        k, kv = self.k, self.kv
        with k.loop(0, count) as loop:
            factor = 1.0 / self.totals.load(loop.i * LANES, LANES).reduce("add")
            constant = self.parts[0].constant_part(loop.i)
            start = loop.i * kv.dim
            if constant is not None:
                for c in range(0, kv.dim, LANES):
                    self.sums.store(start + c, self.sums.load(start + c, LANES) + constant)
            if kv.rotate:
                rotate_stored(k, self.sums.at(start), self.dim, kv.rotate)
            row = first_row + loop.i // self.group
            target = (row * self.heads + head * self.group + loop.i % self.group) * self.dim
            for c in range(0, self.dim, LANES):
                mask = k.lanes_below(self.dim - c, LANES) if c + LANES > self.dim else None
                value = self.sums.load(start + c, LANES) * factor
                self.out.store(target + c, value.cast(self.out.element), mask)
