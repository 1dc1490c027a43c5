"""The stored bytes of low-bit weights, a few strips at a time, and what they mean again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from codegen.pack_blocks import pack_blocks
from codegen.packed_reader import PackedReader, scales_by_row
from codegen.packed_strips import BLOCK, LANES, PackedStrips, planes_of, unpack_blocks, zero_code
from codegen.strips import strip_rows
from ir.formats import F32, PackedArray, ScaledFormat
from ir.formats.fp8 import FP8Format
from ir.types import Layout
from passes.quantize.rounding import RoundedRows


def packed_pieces(
    reader: PackedReader, layout: Layout, piece_bytes: int, chosen: Sequence[tuple[int, ...]] | None = None
) -> Iterator[memoryview]:
    """The bytes of a low-bit weight (of the `chosen` matrices of a stack), in order. Memory: a piece, and the floats
    behind it; a whole matrix where a table is learned from it."""
    n, k = reader.shape[-2:]
    s = PackedStrips(n, k, layout, reader.format)
    # Counted in floats, which are what takes the memory.
    per_piece = max(1, piece_bytes // (s.stored_k * layout.rows * 4 * layout.interleave)) * layout.interleave
    for matrix in itertools.product(*map(range, reader.shape[:-2])) if chosen is None else chosen:
        if s.learned:
            yield from matrix_pieces(reader.read(matrix, (0, n)), s, per_piece)
        else:
            yield from _strip_pieces(lambda rows, matrix=matrix: reader.read(matrix, rows), s, per_piece)


def matrix_pieces(whole: PackedArray | RoundedRows, s: PackedStrips, per_piece: int) -> Iterator[memoryview]:
    """One matrix [n, k] that is in memory: its table, if it has one, then its strips."""
    if s.learned:
        assert whole.table is not None
        stored = np.zeros(s.table_bytes, np.uint8)
        table = whole.table.reshape(-1)
        stored[: table.size] = table.astype(np.int16) + 128 if s.dim > 1 else table.view(np.uint8)
        yield stored.data
    by_row = scales_by_row(whole) if isinstance(whole, PackedArray) else whole
    yield from _strip_pieces(lambda rows: by_row.rows(*rows), s, per_piece)


def _strip_pieces(
    read: Callable[[tuple[int, int]], PackedArray | RoundedRows], s: PackedStrips, per_piece: int
) -> Iterator[memoryview]:
    """The strips of one matrix; a piece begins with the first half of an interleaved pair."""
    halves = s.layout.interleave
    for first in range(0, s.strips, per_piece):
        last = min(first + per_piece, s.strips)
        out = np.zeros((last - first, s.strip_bytes), np.uint8)
        for half in range(halves):
            members = range(first + half, last, halves)
            low, high = strip_rows(s.layout, s.n, members[0])[0], strip_rows(s.layout, s.n, members[-1])[1]
            out[half::halves] = pack_strips(read((low, high)) if low < high else None, s, len(members))
        yield out.reshape(-1).data


def pack_strips(part: PackedArray | RoundedRows | None, s: PackedStrips, count: int) -> np.ndarray:
    """Consecutive strips, uint8 [count, strip_bytes], from the rows there are; what is missing means zero."""
    rows = s.layout.rows
    out = np.zeros((count, s.strip_bytes), np.uint8)
    codes = np.full((count * rows, s.stored_k // s.dim), zero_code(s.format), np.uint8)
    groups = out[:, : s.channel_at].reshape(count, s.groups, s.group_bytes)
    if part is not None:
        given = part.codes.shape[0]
        codes[:given, : s.k // s.dim] = part.code_array()
        scales = part.scales if isinstance(s.format, ScaledFormat) else part.scales.astype(np.float32)
        _put(groups, 0, scales, rows)
        if s.has_zeros:
            _put(groups, s.zeros_at, part.zero_array(), rows)
        if s.has_channel:
            assert part.channel is not None
            channel = np.zeros(count * rows, np.float32)
            channel[:given] = part.channel.reshape(-1).astype(np.float32)
            out[:, s.channel_at :] = channel.view(np.uint8).reshape(count, -1)
    if s.dim > 1:
        groups[:, :, s.blocks_at :] = _by_steps(codes, s, count)
        return out
    planes = np.array(planes_of(s.bits), np.int64)
    pack_blocks(
        codes.reshape(count, rows, s.stored_k), out, s.groups, s.group_bytes, s.blocks_at, planes, s.layout.pack
    )
    return out


def _by_steps(codes: np.ndarray, s: PackedStrips, count: int) -> np.ndarray:
    """Codes of product quantization, a byte for each step and row: [strips, groups, bytes of the blocks of a group]."""
    blocks = s.stored_k // BLOCK
    shaped = codes.reshape(count, s.vectors, LANES, blocks, s.steps)
    return shaped.transpose(0, 3, 1, 4, 2).reshape(count, s.groups, -1)


def _put(groups: np.ndarray, at: int, values: np.ndarray, rows: int) -> None:
    """`values` [rows of all strips, groups] into bytes `at`.. of every group [strips, groups, bytes]."""
    count, per_row, _ = groups.shape
    padded = np.zeros((count * rows, per_row), values.dtype)
    padded[: values.shape[0]] = values
    turned = np.ascontiguousarray(padded.reshape(count, rows, per_row).transpose(0, 2, 1))
    groups[:, :, at : at + rows * values.dtype.itemsize] = turned.view(np.uint8)


def load_packed(
    stored: np.ndarray, format: ScaledFormat | FP8Format, shape: tuple[int, ...], layout: Layout
) -> np.ndarray:
    """f32 of `shape` from stored bytes: what the kernels make of them."""
    s = PackedStrips(shape[-2], shape[-1], layout, format)
    matrices = stored.reshape(math.prod(shape[:-2]), s.matrix_bytes)
    return np.stack([_load_matrix(m, s) for m in matrices]).reshape(shape)


def _load_matrix(stored: np.ndarray, s: PackedStrips) -> np.ndarray:
    levels = _levels(stored, s)  # [codes], or [codes, dim]
    out = np.zeros((s.n, s.k), np.float32)
    for number, strip in enumerate(stored[s.table_bytes :].reshape(s.strips, s.strip_bytes)):
        groups = strip[: s.channel_at].reshape(s.groups, s.group_bytes)
        blocks = groups[:, s.blocks_at :]
        codes = unpack_blocks(blocks, s) if s.dim == 1 else _from_steps(blocks, s)
        worth = levels[codes].reshape(s.layout.rows, s.groups, s.group)
        if s.has_zeros:
            worth = worth - groups[:, s.zeros_at : s.zeros_at + s.layout.rows].T.astype(np.float64)[:, :, None]
        raw = np.ascontiguousarray(groups[:, : s.zeros_at]).view(s.scale.dtype)
        rows = worth * _scale_numbers(raw, s).T[:, :, None]
        if s.has_channel:
            rows = rows * strip[s.channel_at :].view(np.float32).astype(np.float64)[:, None, None]
        first, last = strip_rows(s.layout, s.n, number)
        out[first:last] = rows.reshape(s.layout.rows, -1)[: last - first, : s.k]
    return out


def _from_steps(blocks: np.ndarray, s: PackedStrips) -> np.ndarray:
    """The inverse of `_by_steps` for one strip: codes [rows, stored_k / dim]."""
    shaped = blocks.reshape(s.stored_k // BLOCK, s.vectors, s.steps, LANES)
    return shaped.transpose(1, 3, 0, 2).reshape(s.layout.rows, -1)


def _levels(stored: np.ndarray, s: PackedStrips) -> np.ndarray:
    """f64: what each code is worth in scales, before zero points."""
    if isinstance(s.format, FP8Format):
        with np.errstate(invalid="ignore"):
            return np.arange(256, dtype=np.uint8).view(s.format.element.dtype).astype(np.float64)
    if s.dim > 1:
        return stored[: s.dim << s.bits].reshape(-1, s.dim).astype(np.float64) - 128
    if s.learned:
        return stored[: 1 << s.bits].view(np.int8).astype(np.float64)
    assert s.format.integer_levels is not None
    return np.asarray(s.format.integer_levels, np.float64)


def _scale_numbers(raw: np.ndarray, s: PackedStrips) -> np.ndarray:
    """f64 scales; those of MXFP4 go with levels counted in halves."""
    numbers: Any = raw.astype(np.float64)
    return numbers * 0.5 if s.scale != F32 and s.scale.name == "e8m0" else numbers
