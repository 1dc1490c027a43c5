"""Tensors of low-bit formats: their parts, their numbers, and whole rows of them moved about without unpacking."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ir.formats import I8, U8, PackedArray, PlainFormat
from ir.formats.packed import concatenate_packed
from ir.op_def import expect
from ir.types import Dim, TensorType


def is_low_bit(type: TensorType) -> bool:
    """Whether the elements are stored in groups with scales, so that only whole rows can be moved."""
    return not isinstance(type.element, PlainFormat)


def has_table(format: Any) -> bool:
    """Whether every matrix in this format has a table of its own."""
    return getattr(format, "table_shape", None) is not None


def scale_parts(format: Any, shape: Sequence[Dim]) -> dict[str, TensorType]:
    """The parts beside the codes of a tensor [..., n, k] of known size in a low-bit format, by name, in order."""
    *outer, n, k = (d for d in shape if isinstance(d, int))
    blocks = n if format.block_rows == 1 else -(-n // format.block_rows)
    groups = (*outer, blocks, format.groups(k))
    parts = {"scales": TensorType(groups, format.scale)}
    if format.zero_point:
        parts["zeros"] = TensorType(groups, U8)
    if format.channel is not None:
        parts["channel"] = TensorType((*outer, n), format.channel)
    if has_table(format):
        parts["table"] = TensorType((*outer, *format.table_shape), I8)
    return parts


def unpacked(value: np.ndarray | PackedArray) -> np.ndarray:
    """The numbers of a tensor: f32 of a low-bit one, any other as it is."""
    return value.format.unpack(value) if isinstance(value, PackedArray) else value


# -- moving whole rows -----------------------------------------------------------------------------------------------


def expect_whole_rows(type: TensorType, axis: int) -> None:
    """Raises InferenceError unless a low-bit tensor can be cut or joined along `axis`."""
    if not is_low_bit(type):
        return
    expect(axis < type.rank - 1, f"expected whole rows of a low-bit tensor, got axis = {axis} of {type}")
    format: Any = type.element
    if axis == type.rank - 2:
        expect(not has_table(format), f"expected a format without a table for every matrix, got {type}")


def expect_whole_blocks(type: TensorType, axis: int, row: Dim) -> None:
    """Raises InferenceError when row `row` of `axis` stands inside of a block of rows that share a scale."""
    unit = getattr(type.element, "block_rows", 1) or 1
    if axis == type.rank - 2 and unit > 1:
        whole = isinstance(row, int) and row % unit == 0
        expect(whole, f"expected rows of {type.element} in whole blocks of {unit}, got {row}")


def expect_same_rows(old: TensorType, new: TensorType) -> None:
    """Raises InferenceError unless a low-bit tensor can be seen under another shape: its rows must stay rows."""
    if not is_low_bit(old):
        return
    expect(old.static and new.static, f"expected a low-bit tensor of known size, got {old} and {new}")
    format: Any = old.element
    kept = 2 if has_table(format) or getattr(format, "block_rows", 1) != 1 else 1
    what = "whole matrices" if kept == 2 else "whole rows"
    expect(old.shape[-kept:] == new.shape[-kept:], f"expected {what} of {format} to stay, got {old} and {new}")


def concatenate_rows(values: Sequence[PackedArray], axis: int) -> PackedArray:
    """Low-bit arrays of one format, one after another along `axis`, which is not the last."""
    first = values[0]
    outer = math.prod(first.shape[:axis])
    parts = []
    for index in range(outer):
        for value in values:
            rows = math.prod(value.shape[axis:-1])
            parts.append(value.rows(index * rows, (index + 1) * rows))
    joined = sum(value.shape[axis] for value in values)
    return replace(concatenate_packed(parts), shape=(*first.shape[:axis], joined, *first.shape[axis + 1 :]))


def slice_rows(value: PackedArray, axis: int, start: int, size: int) -> PackedArray:
    """Elements start .. start+size-1 along `axis`, which is not the last."""
    outer, inner = math.prod(value.shape[:axis]), math.prod(value.shape[axis + 1 : -1])
    extent = value.shape[axis] * inner
    parts = [value.rows(i * extent + start * inner, i * extent + (start + size) * inner) for i in range(outer)]
    return replace(concatenate_packed(parts), shape=(*value.shape[:axis], size, *value.shape[axis + 1 :]))
