"""Rotary embedding: the tables of a step, and rope with what surrounds it up to the KV cache.

    attn.rope_table                      cos and sin [tokens, d/2] for the positions of this step
    tensor.fused kind = "rope_append"    qkv -> slices, [norms], rope of q and k, k and v into the cache
                                         (forms in docs/passes/fuse.md)

Angles are formed and reduced in f64, so that a position of a million is as exact as position one.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from codegen.kernels.call import Argument, EmitContext, KernelSpec, SizeArgument, emitter, rows_of, structure_key
from codegen.kernels.kv_append import GroupPacker, kv_writer
from codegen.kernels.kv_layout import CodeBlocks, KVLayout
from codegen.kernels.math import clip
from codegen.kernels.rowwise import LANES, row_scale
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, F64, I32
from ir.ops.attention import RopeOp, RopeTableOp
from ir.ops.builtin import FuncOp
from ir.ops.fused import FusedOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import ClipOp
from ir.types import KVCacheType, SymbolicDim, TensorType, VectorType

_SIN = (1.0, -1.6666654611e-1, 8.3321608736e-3, -1.9515295891e-4)  # of r, odd powers, |r| <= pi/4 (Cephes sinf)
_COS = (1.0, -0.5, 4.166664568298827e-2, -1.388731625493765e-3, 2.443315711809948e-5)  # even powers (Cephes cosf)
ROW_BLOCK = 16  # rows of a prompt that go through the heads together, where norms span heads


def sin_cos(k: KernelBuilder, angle: Expr) -> tuple[Expr, Expr]:
    """f32 sine and cosine of an f64 vector of angles (radians), to 1e-7 for |angle| < 2**31.

    Without fused multiply-add the reduction loses digits: 1e-7 up to 1e6, then 2e-7.
    """
    lanes = angle.lanes
    quarter = k.round(angle * (2 / math.pi))
    reduced = k.fma(quarter, -math.pi / 2, angle)
    reduced = k.fma(quarter, -6.123233995736766e-17, reduced)  # pi/2 in two parts
    r = reduced.cast(F32)
    square = r * r

    def polynomial(coefficients: tuple[float, ...]) -> Expr:
        value = k.f32(coefficients[-1], lanes)
        for c in reversed(coefficients[:-1]):
            value = k.fma(value, square, c)
        return value

    sine, cosine = polynomial(_SIN) * r, polynomial(_COS)
    quadrant = quarter.cast(I32)
    odd = (quadrant & 1).compare("ne", 0)
    negative_sine = (quadrant & 2).compare("ne", 0)
    negative_cosine = ((quadrant + 1) & 2).compare("ne", 0)
    s, c = k.select(odd, cosine, sine), k.select(odd, sine, cosine)
    return k.select(negative_sine, 0.0 - s, s), k.select(negative_cosine, 0.0 - c, c)


@emitter(RopeTableOp)
def emit_rope_table(op: RopeTableOp, context: EmitContext) -> KernelSpec:
    """Tokens are shared among the threads."""
    arguments: list[Argument] = [op.positions, op.cos, op.sin, SizeArgument(rows_of(op.positions.type))]

    def build(name: str) -> FuncOp:
        k = KernelBuilder(name)
        positions, cos, sin = k.buffer("positions", I32), k.buffer("cos", F32), k.buffer("sin", F32)
        rows = k.size("rows")
        frequencies = [float(f) for f in op.rope.inverse_frequencies()]
        half = len(frequencies)
        first, last = k.thread_share(rows)
        with k.loop(first, last) as row:
            position = k.splat(positions.load(row.i).cast(F64), LANES)
            for start in range(0, half, LANES):
                chunk = frequencies[start : start + LANES]
                table = tuple(chunk + [0.0] * (LANES - len(chunk)))
                s, c = sin_cos(k, position * k.constant(VectorType(LANES, F64), table))
                mask = None if len(chunk) == LANES else k.lanes_below(len(chunk), LANES)
                for buffer, value in ((sin, s), (cos, c)):
                    buffer.store(row.i * half + start, value * op.rope.attention_factor, mask)
        return k.finish()

    return KernelSpec(f"rope_table_{op.rope.dim}", structure_key(op), arguments, (1, 2), build)


class _RopeAppend:
    """The parts of a rope_append region, found by op class."""

    def __init__(self, op: FusedOp) -> None:
        self.op = op
        block = op.body.block
        self.outside: dict[Value, Value] = dict(zip(block.arguments, op.operands, strict=True))
        self.append = next(o for o in block.ops if isinstance(o, KVAppendOp))
        self.q_rope, self.k_rope = (o for o in block.ops if isinstance(o, RopeOp))
        norms = [o for o in block.ops if isinstance(o, RmsNormOp)]
        self.q_norm, self.k_norm = norms if norms else (None, None)
        self.clip = next((o for o in block.ops if isinstance(o, ClipOp)), None)
        cache, q = self.append.cache.type, self.q_rope.y.type
        assert isinstance(cache, KVCacheType) and isinstance(q, TensorType)
        self.kv = KVLayout.of(cache)
        heads, dim = q.shape[1:]
        assert isinstance(heads, int) and isinstance(dim, int)
        self.q_heads, self.kv_heads, self.dim = heads, cache.num_kv_heads, dim
        self.width = (heads + 2 * cache.num_kv_heads) * dim  # of a row of qkv
        # Norms over the heads of a whole row, by the name of their gain: (norm, first column, columns).
        wide = {"q_gain": (self.q_norm, 0, heads * dim), "k_gain": (self.k_norm, heads * dim, self.kv_heads * dim)}
        self.normed_rows = {
            name: (norm, start, width)
            for name, (norm, start, width) in wide.items()
            if norm is not None and norm.gain.type.shape[0] != dim
        }


def emit_rope_append(op: Op, context: EmitContext) -> KernelSpec:
    """One unit of work is one token and one kv head with its query heads."""
    assert isinstance(op, FusedOp)
    parts = _RopeAppend(op)
    if parts.dim % 4:
        message = f"rope kernels take head widths that are multiples of 4, got {parts.dim}"
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    names = ["qkv", "cos", "sin", "cache", "positions", "slots", "q_gain", "k_gain"]
    arguments: list[Argument] = [*op.operands, op.results[0]]
    out_at = len(op.operands)
    arguments += [SizeArgument(rows_of(op.results[0].type)), SizeArgument(SymbolicDim("ctx"))]

    def build(name: str) -> FuncOp:
        k = KernelBuilder(name)
        kv_element = parts.kv.element
        elements = [F32, F32, F32, kv_element, I32, I32, F32, F32]
        buffers = {n: k.buffer(n, e) for n, e in list(zip(names, elements, strict=True))[:out_at]}
        out = k.buffer("q", F32)
        rows, ctx = k.size("rows"), k.size("ctx")
        writer = _RopeWriter(k, parts, buffers, out, ctx)
        first, last = k.thread_share(rows * parts.kv_heads)
        if parts.normed_rows:
            writer.row_blocks(first, last, rows)
        else:
            # Head by head: the rows of a prompt fill a few blocks of one head, which then stay in the nearest cache.
            with k.loop(first, last) as unit:
                writer.unit(unit.i % rows, unit.i // rows)
        blocks = parts.kv.blocks
        if isinstance(blocks, CodeBlocks) and blocks.key_group:
            k.barrier()  # a group may have rows of several threads
            packer = GroupPacker(k, parts.kv, buffers["cache"], ctx)
            with k.loop(first, last) as unit:
                row = unit.i % rows
                position, slot = (buffers[name].load(row).to_index() for name in ("positions", "slots"))
                packer.pack(slot, unit.i // rows, position)
        return k.finish()

    return KernelSpec(
        f"rope_append_{parts.dim}",
        structure_key(op),
        arguments,
        (3, out_at),
        build,
        reads=tuple(i for i in range(out_at) if i != 3 or parts.kv.recent),
    )


class _RopeWriter:
    """Writes one unit of a rope_append kernel."""

    def __init__(
        self, k: KernelBuilder, parts: _RopeAppend, buffers: dict[str, Buffer], out: Buffer, ctx: Expr
    ) -> None:
        self.k, self.parts, self.buffers, self.out = k, parts, buffers, out
        self.writer = kv_writer(k, parts.kv, parts.dim, buffers["cache"], ctx)
        half = parts.dim // 2
        self.lanes = next(n for n in (16, 8, 4, 2) if half % n == 0)
        self.scales = {name: k.scratch(ROW_BLOCK, F32) for name in parts.normed_rows}

    def row_blocks(self, first: Expr, last: Expr, rows: Expr) -> None:
        """Units first .. last, counted by blocks of rows, in a block head by head. A row's norm is formed once a
        block, not once a head."""
        k, p = self.k, self.parts
        size = p.kv_heads * ROW_BLOCK
        with k.loop(first // size, (last + (size - 1)) // size) as block:
            start = block.i * ROW_BLOCK
            count = (rows - start).min(k.index(ROW_BLOCK))
            with k.loop(0, count) as row:
                source = self.buffers["qkv"].at((start + row.i) * p.width)
                for name, (norm, column, width) in p.normed_rows.items():
                    part = source.at(column)
                    scale = row_scale(k, lambda at, lanes, mask, part=part: part.load(at, lanes, mask), width, norm.eps)
                    self.scales[name].store(row.i, scale)
            before = block.i * size
            with k.loop(first.max(before) - before, last.min(before + size) - before) as unit:
                inside = unit.i % count
                self.unit(start + inside, unit.i // count, inside)

    def unit(self, row: Expr, head: Expr, inside: Expr | None = None) -> None:
        """Token `row`, kv head `head`: its query heads, its key, its value. `inside`: its place in a block of rows."""
        k, p = self.k, self.parts
        group, dim = p.q_heads // p.kv_heads, p.dim
        source = self.buffers["qkv"].at(row * p.width)
        position = self.buffers["positions"].load(row).to_index()
        slot = self.buffers["slots"].load(row).to_index()
        self.writer.begin(slot, head, position)
        with k.loop(0, group) as loop:
            q_head = head * group + loop.i
            start = q_head * dim
            first_column = k.index(0)

            def store_q(column: Expr, value: Expr) -> None:
                self.out.store(row * (p.q_heads * dim) + start + column, value)

            self._rope(source, first_column, start, row, p.q_norm, "q_gain", inside, store_q)
        k_columns = p.q_heads * dim
        columns = k.index(k_columns)
        self._rope(source, columns, head * dim, row, p.k_norm, "k_gain", inside, self.writer.key)
        v_start = head * dim + (p.q_heads + p.kv_heads) * dim
        with k.loop(0, dim, self.lanes) as loop:
            value = self._clip(source.load(v_start + loop.i, self.lanes))
            self.writer.value(loop.i, value)
        self.writer.end()

    def _clip(self, value: Expr) -> Expr:
        limits = self.parts.clip
        return clip(self.k, value, limits.low, limits.high) if limits else value

    def _rope(
        self,
        source: Buffer,
        base: Expr,
        start: Expr,
        row: Expr,
        norm: RmsNormOp | None,
        gain_name: str,
        inside: Expr | None,
        store: Callable[[Expr, Expr], None],
    ) -> None:
        """Norm, clip and rotate the head that begins at column base + start of `source`."""
        k, dim = self.k, self.parts.dim
        half = dim // 2
        scale = gain = gain_offset = None
        of_heads = norm is not None and norm.y.type.rank == 3
        clip_first = self._clip if of_heads else lambda value: value  # a clip stands between row norm and head norm
        if norm is not None:
            gain = self.buffers[gain_name]
            if gain_name in self.scales and inside is not None:
                scale, gain_offset = self.scales[gain_name].load(inside), start
            else:

                def load_all(column: Expr, lanes: int, mask: Expr | None) -> Expr:
                    return clip_first(source.load(base + start + column, lanes, mask))

                scale, gain_offset = row_scale(k, load_all, dim, norm.eps), k.index(0)
        angles = row * half

        def head(column: Expr) -> Expr:
            value = clip_first(source.load(base + start + column, self.lanes))
            if scale is not None and gain is not None and gain_offset is not None:
                value = value * scale * gain.load(gain_offset + column, self.lanes)
            return value if of_heads else self._clip(value)

        with k.loop(0, half, self.lanes) as loop:
            cos = self.buffers["cos"].load(angles + loop.i, self.lanes)
            sin = self.buffers["sin"].load(angles + loop.i, self.lanes)
            first, second = head(loop.i), head(loop.i + half)
            store(loop.i, first * cos - second * sin)
            store(loop.i + half, second * cos + first * sin)
