"""Weights in the order of a GPU's lanes as an artifact stores them: bytes of a matrix, some tiles at a time.

A matrix [n, k] is its codes, tile by tile, and behind them its scales (`codegen.nvptx.fragments`). With `interleave` 2
rows of the first and the second half take turns of 8. What is in memory at once is a piece and the scales of a matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from codegen.constant_reader import ConstantReader, TensorSource, fixed_shape
from codegen.nvptx.fragments import CHUNK, TILE, Fragments, fragment_places
from codegen.nvptx.kernels.gate import turns
from codegen.packed_reader import PackedReader
from ir.core import Value
from ir.formats import F8E4M3, NumberFormat, PackedArray, PlainFormat, concatenate_packed
from ir.types import Layout, TensorType

Rows = tuple[int, int]
Reader = Callable[[Rows], Any]  # an array of numbers, or a PackedArray


def fragment_pieces(
    value: Value, layout: Layout, source: TensorSource, piece_bytes: int, matrix: int | None = None
) -> Iterator[memoryview]:
    """The stored bytes of a matrix, or of those of a stack [E, n, k] (one of them where `matrix` says which)."""
    *stack, n, k = fixed_shape(value)
    chosen = [()] if not stack else [(i,) for i in (range(stack[0]) if matrix is None else (matrix,))]
    for place in chosen:
        yield from _matrix_pieces(value, place, (n, k), layout, source, piece_bytes)


def _matrix_pieces(
    value: Value, place: tuple[int, ...], shape: tuple[int, int], layout: Layout, source: TensorSource, most: int
) -> Iterator[memoryview]:
    n, k = shape
    assert isinstance(value.type, TensorType)
    whole = Fragments.of(n, k, value.type.element)
    read = _reader(value, place, k, source)
    together = max(1, most // (TILE * k * 4))
    scales: list[np.ndarray] = []
    for first in range(0, whole.tiles, together):
        last = min(first + together, whole.tiles)
        rows = _rows(read, n, first * TILE, min(last * TILE, n), layout)
        part = replace(whole, n=min(last * TILE, n) - first * TILE)
        yield part.codes(rows).view(np.uint8).data
        if isinstance(rows, PackedArray):
            scales.append(part.scales(rows))
    if scales:
        yield np.concatenate(scales).view(np.uint8).data


def _reader(value: Value, place: tuple[int, ...], k: int, source: TensorSource) -> Reader:
    """Rows of the matrix at `place` of a stack, as numbers or as codes with their scales."""
    assert isinstance(value.type, TensorType)
    if not isinstance(value.type.element, PlainFormat):
        packed = PackedReader(value, source)
        return lambda rows: packed.read_packed(place, rows)
    plain = ConstantReader(value, source)
    box = tuple((i, i + 1) for i in place)
    return lambda rows: plain.read((*box, rows, (0, k))).reshape(-1, k)


def _rows(read: Reader, n: int, first: int, last: int, layout: Layout) -> np.ndarray | PackedArray:
    """Stored rows first .. last - 1 of a matrix."""
    if layout.interleave == 1:
        return read((first, last))
    low, high = first // 2, last // 2
    halves = [read((low, high)), read((n // 2 + low, n // 2 + high))]
    order = turns(last - first)
    if isinstance(halves[0], np.ndarray):
        return np.concatenate(halves)[order]
    both = concatenate_packed(halves)
    return replace(both, codes=both.codes[order], scales=both.scales[order])


def load_fragments(raw: np.ndarray, format: NumberFormat, shape: tuple[int, ...], layout: Layout) -> np.ndarray:
    """The logical array behind stored bytes: of numbers in their element, f32 of low-bit ones."""
    n, k = shape[-2:]
    whole = Fragments.of(n, k, format)
    matrices = [_load_matrix(part, whole, format, layout) for part in raw.reshape(-1, whole.nbytes)]
    return np.stack(matrices).reshape(shape)


def _load_matrix(raw: np.ndarray, whole: Fragments, format: NumberFormat, layout: Layout) -> np.ndarray:
    size = whole.code_bytes
    codes = stored_codes(np.ascontiguousarray(raw[:size]).view(np.uint32), whole)
    if isinstance(format, PlainFormat):
        numbers = codes.astype(np.uint16).view(format.dtype)
    else:
        scales = raw[size:].view(whole.scale_element.dtype).reshape(whole.tiles, -1, 8, 2, whole.groups_of_unit)
        by_row = scales.transpose(0, 3, 2, 1, 4).reshape(whole.tiles * TILE, -1).astype(np.float32)
        zero = 0 if whole.fp8 else 1 << (whole.bits - 1)
        held = codes.astype(np.uint8).view(F8E4M3.dtype) if whole.fp8 else codes
        levels = held.astype(np.float32) - zero
        numbers = (levels.reshape(*by_row.shape, -1) * by_row[:, :, None]).reshape(-1, whole.columns)
    rows = numbers[: whole.n, : whole.k]
    if layout.interleave == 1:
        return rows
    back = np.empty_like(rows)
    back[turns(whole.n)] = rows
    return back


def stored_codes(words: np.ndarray, whole: Fragments) -> np.ndarray:
    """The codes [rows, columns], filled up to whole tiles and chunks, of u32 words as `Fragments.codes` lays them."""
    shape = (whole.tiles, whole.chunks, 2, 2, 32, 8)  # segment, product, lane, number
    if whole.bits == 4:
        by_product = np.moveaxis(words.reshape(*shape[:2], 32, 4), 2, 3).reshape(shape[:-1])
        shifts = np.array([4 * (i // 2) + 16 * (i % 2) for i in range(8)], np.uint32)
        lanes = by_product[..., None] >> shifts & np.uint32(15)
    else:
        each = 32 // whole.bits
        shifts = np.arange(each, dtype=np.uint32) * np.uint32(whole.bits)
        numbers = words[:, None] >> shifts & np.uint32((1 << whole.bits) - 1)
        if whole.bits == 16:
            lanes = numbers.reshape(shape)
        else:
            lanes = np.moveaxis(numbers.reshape(*shape[:3], 32, 2, 8), 4, 3).reshape(shape)
    tiles = np.zeros((whole.tiles, whole.chunks, TILE, CHUNK), np.uint32)
    rows, columns = fragment_places()
    tiles[:, :, rows, columns] = lanes
    return tiles.swapaxes(1, 2).reshape(whole.tiles * TILE, whole.columns)
