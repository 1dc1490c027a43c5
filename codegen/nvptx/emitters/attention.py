"""Launches of attention: tables of angles, queries and cache out of the joint projection, attention of prompts and of
single tokens."""

from __future__ import annotations

from codegen.kernels.call import SizeArgument, rows_of, structure_key
from codegen.nvptx.kernels.attention import prefill_kernel
from codegen.nvptx.kernels.attention_decode import join_kernel, split_kernel
from codegen.nvptx.kernels.attention_rows import AttentionShape
from codegen.nvptx.kernels.rope import rope_table_kernel
from codegen.nvptx.kernels.rope_append import WARPS, HeadNorm, Projection, rope_append_kernel
from codegen.nvptx.kv_planes import KvPlanes
from codegen.nvptx.launches import (
    Count,
    GridArgument,
    GridContext,
    GridLaunch,
    GridOptions,
    Pieces,
    Plane,
    Table,
    Temporary,
    grid_emitter,
    refused,
    refused_by,
    size_text,
)
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import F32, PlainFormat
from ir.ops.attention import AttentionOp, RopeTableOp
from ir.types import KVCacheType, SymbolicDim, TensorType
from passes.fuse.forms import AttentionForm, FormError, RopeAppendForm, describe

PIECE_TOKENS = 64  # tokens of a piece of a prompt
CTX = SizeArgument(SymbolicDim("ctx"))
BLOCKS_AT_ONCE = 2  # of `split_kernel` that a multiprocessor holds


@grid_emitter(RopeTableOp)
def emit_rope_table(op: RopeTableOp, context: GridContext) -> list[GridLaunch]:
    """Cosines and sines of a step's positions."""
    frequencies = tuple(float(f) for f in op.rope.inverse_frequencies())
    half, factor = len(frequencies), op.rope.attention_factor
    arguments: list[GridArgument] = [op.positions, Table(frequencies), op.cos, op.sin]
    return [
        GridLaunch(
            f"rope_table_{2 * half}", structure_key(op), arguments, (2, 3), size_text(rows_of(op.positions.type)),
            lambda name: rope_table_kernel(half, factor, name), True,
        )
    ]  # fmt: skip


def kv_planes(cache: Value, op: Op) -> KvPlanes:
    """Where a cache lies. Raises DiagnosticError for formats without kernels."""
    assert isinstance(cache.type, KVCacheType)
    try:
        return KvPlanes.of(cache.type)
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None


def emit_rope_append(op: Op, context: GridContext) -> list[GridLaunch]:
    """A region of kind "rope_append"."""
    try:
        form = describe(op)
    except FormError as fault:
        raise refused(op, f"no kernel for this '{op.name}' of kind \"rope_append\": {fault}") from None
    assert isinstance(form, RopeAppendForm)
    qkv, cos, sin, cache, positions, slots, *gains = op.operands
    planes = kv_planes(cache, op)
    q = op.results[0]
    assert isinstance(q.type, TensorType)
    heads = q.type.shape[1]
    assert isinstance(heads, int)
    found = form.q.row_norm or form.q.head_norm
    norm = HeadNorm(found.eps, form.q.row_norm is not None) if found is not None else None
    limits = (form.q.clip.low, form.q.clip.high) if form.q.clip is not None else None
    projection = Projection(heads, planes, norm, limits)
    context.types[q] = TensorType((q.type.shape[0], heads, planes.stored), planes.element)
    places = [Plane(cache, i) for i in range(len(planes.planes))]
    arguments: list[GridArgument] = [qkv, cos, sin, positions, slots, *gains, q, *places]
    arguments += [SizeArgument(rows_of(q.type)), CTX]
    writes = tuple(range(5 + len(gains), 6 + len(gains) + len(places)))
    each = heads + 2 * planes.heads
    return [
        GridLaunch(
            f"rope_append_{planes.width}", (structure_key(op), "rope_append"), arguments, writes,
            f"ceil({size_text(rows_of(q.type))} * {each}, {WARPS})",
            lambda name: rope_append_kernel(projection, name), True,
        )
    ]  # fmt: skip


@grid_emitter(AttentionOp)
def emit_attention(op: Op, context: GridContext) -> list[GridLaunch]:
    """attn.attention, alone or followed by reshape and cast in a region of kind "attention"."""
    try:
        form = describe(op)
    except FormError as fault:
        raise refused(op, f"no kernel for this '{op.name}' of kind \"attention\": {fault}") from None
    assert isinstance(form, AttentionForm)
    attention = form.attention
    q, cache, positions, slots = op.operands
    planes = kv_planes(cache, op)
    q_type = attention.q.type
    assert isinstance(q_type, TensorType) and isinstance(q_type.shape[1], int)
    if q not in context.types:
        raise refused(op, "queries of attention on GPUs come out of the fusion of rope and append", "fuse-rope-append")
    shape = AttentionShape(q_type.shape[1], planes.heads, planes.width, attention.window, planes.element)
    try:
        shape.check()
    except DiagnosticError as fault:
        raise refused_by(op, fault) from None
    out = context.element(op.results[0])
    rows = size_text(rows_of(op.results[0].type))
    places: list[GridArgument] = [Plane(cache, i) for i in range(len(planes.planes))]
    common = (shape, attention.scale, planes)
    if not context.few:
        return [_of_prompts(common, [q, *places], op.results[0], out)]
    return _of_tokens(common, [q, *places, positions, slots], op.results[0], out, rows, context)


def _of_prompts(
    common: tuple[AttentionShape, float, KvPlanes], sources: list[GridArgument], y: Value, out: PlainFormat
) -> GridLaunch:
    shape, scale, planes = common
    return GridLaunch(
        f"prefill_{shape.width}", ("prefill", *common, out), [*sources, Pieces(), y, CTX], (len(sources) + 1,),
        f"pieces * {shape.heads}", lambda name: prefill_kernel(shape, scale, name, out=out, planes=planes), True,
    )  # fmt: skip


def _of_tokens(
    common: tuple[AttentionShape, float, KvPlanes], sources: list[GridArgument], y: Value, out: PlainFormat, rows: str,
    context: GridContext,
) -> list[GridLaunch]:  # fmt: skip
    shape, scale, planes = common
    most, splits = splits_of(shape.kv_heads, rows, context.options)
    entries = most + context.few - 1  # ceil(most / tokens) parts of each token, at most
    parts = Temporary(TensorType((entries, shape.heads, shape.width), F32))
    sums = Temporary(TensorType((entries, shape.heads, 2), F32))
    first = len(sources)
    return [
        GridLaunch(
            f"split_{shape.width}", ("split", *common), [*sources, parts, sums, CTX, Count(splits)],
            (first, first + 1), f"{rows} * {shape.kv_heads} * {splits}",
            lambda name: split_kernel(shape, scale, name, planes=planes), True,
        ),
        GridLaunch(
            f"join_{shape.width}", ("join", shape, out, planes.rotate), [parts, sums, y, Count(splits)], (2,),
            f"{rows} * {shape.heads}", lambda name: join_kernel(shape, name, out=out, rotate=planes.rotate),
        ),
    ]  # fmt: skip


def splits_of(kv_heads: int, rows: str, options: GridOptions) -> tuple[int, str]:
    """How many parts positions are split into: at most, and as a size of the step.

    As many blocks as the multiprocessors hold at once share the tokens and kv heads of a step, but no part has fewer
    positions than it is worth where the whole cache is read. Both sizes stay what they are while a step is replayed.
    """
    most = -(-options.multiprocessors * BLOCKS_AT_ONCE // kv_heads)
    return most, f"min(ceil(ctx, {options.split_positions}), ceil({most}, {rows}))"
