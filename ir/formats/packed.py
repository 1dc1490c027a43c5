"""Arrays in a low-bit format: packed codes and what belongs to them, cut and joined along rows.

    packed = format.pack(values)              from floats
    PackedArray.assemble(format, shape, ...)  from parts that exist: nothing is rounded
    PackedArray.frombytes(format, shape, b)   from its bytes: codes, scales, zero points, channel scales, tables

Refused: parts whose shapes, dtypes or codes do not fit the format.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats.bit_packing import pack_codes, row_bytes, unpack_codes


@dataclass(frozen=True)
class PackedArray:
    """An array `shape` [..., n, k] in a low-bit format. R counts the rows of all its matrices.

    - `codes`: u8 [R, row bytes], each row bit-packed;
    - `scales`: [R, groups]; of a format with blocks of rows [matrices * row blocks, column blocks];
    - `zeros`: u8 [R, bytes], the zero points of a row bit-packed as its codes are; None without zero points;
    - `channel`: [R], the second level of scales; None without one;
    - `table`: int8, one for each matrix: [..., codes], or [..., codes, dim]; None unless the format learns one.
    """

    format: Any  # ScaledFormat | FP8Format, which import this module
    shape: tuple[int, ...]
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None = None
    channel: np.ndarray | None = None
    table: np.ndarray | None = None

    def parts(self) -> tuple[np.ndarray, ...]:
        """The arrays there are, in the order of `tobytes`."""
        return tuple(
            part for part in (self.codes, self.scales, self.zeros, self.channel, self.table) if part is not None
        )

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts())

    def code_array(self, rows: slice = slice(None)) -> np.ndarray:
        """uint8 [rows, codes of a row]: one code an element."""
        return unpack_codes(self.codes[rows], self.format.codes_per_row(self.shape[-1]), self.format.bits)

    def zero_array(self, rows: slice = slice(None)) -> np.ndarray:
        """uint8 [rows, groups]: the zero points of a format that has them."""
        if self.zeros is None:
            raise ValueError(f"{self.format} has no zero points")
        return unpack_codes(self.zeros[rows], self.scales.shape[1], self.format.bits)

    # -- bytes -------------------------------------------------------------------------------------------------------

    def tobytes(self) -> bytes:
        """The parts one after another, each in C order."""
        return b"".join(np.ascontiguousarray(part).tobytes() for part in self.parts())

    @classmethod
    def frombytes(cls, format: Any, shape: tuple[int, ...], data: bytes) -> PackedArray:
        """The inverse of `tobytes`. Raises DiagnosticError unless there are exactly as many bytes as it takes."""
        if len(data) != format.nbytes(shape):
            raise DiagnosticError(
                f"{len(data)} bytes are no array {list(shape)} in {format}", expected=f"{format.nbytes(shape)} bytes"
            )
        parts: dict[str, np.ndarray] = {}
        offset = 0
        for name, (dtype, part_shape) in stored_parts(format, shape).items():
            count = math.prod(part_shape)
            parts[name] = np.frombuffer(data, dtype, count, offset).reshape(part_shape)
            offset += count * dtype.itemsize
        return cls(format, shape, **parts)

    @classmethod
    def assemble(
        cls,
        format: Any,
        shape: tuple[int, ...],
        codes: np.ndarray,
        scales: np.ndarray,
        zeros: np.ndarray | None = None,
        channel: np.ndarray | None = None,
        table: np.ndarray | None = None,
    ) -> PackedArray:
        """`codes` u8 [R, codes of a row] and `zeros` u8 [R, groups] are not packed yet, else as in the class.

        Raises DiagnosticError for parts that are missing or too many, other shapes or dtypes, and codes too large.
        """
        given = {"codes": codes, "scales": scales, "zeros": zeros, "channel": channel, "table": table}
        rows, groups = math.prod(shape[:-1]), format.groups(shape[-1])
        wanted = dict(stored_parts(format, shape))
        wanted["codes"] = (np.dtype(np.uint8), (rows, format.codes_per_row(shape[-1])))
        if "zeros" in wanted:
            wanted["zeros"] = (np.dtype(np.uint8), (rows, groups))
        for name, part in given.items():
            if (part is not None) != (name in wanted):
                raise DiagnosticError(
                    f"{format} is assembled {'with' if part is not None else 'without'} {name}",
                    expected=f"the parts {', '.join(wanted)}",
                )
            if part is not None and (part.dtype != wanted[name][0] or part.shape != wanted[name][1]):
                dtype, part_shape = wanted[name]
                raise DiagnosticError(
                    f"{name} of {list(shape)} in {format} cannot be {part.dtype} {list(part.shape)}",
                    expected=f"{dtype} {list(part_shape)}",
                )
        for name, part, limit in (("code", codes, format.code_count), ("zero point", zeros, 1 << format.bits)):
            if part is not None and limit < 256 and part.size and int(part.max()) >= limit:
                row, column = (int(i) for i in np.argwhere(part >= limit)[0])
                raise DiagnosticError(
                    f"{name} {part[row, column]} of row {row}, column {column} does not exist in {format}",
                    expected=f"0 to {limit - 1}",
                )
        packed_zeros = pack_codes(zeros, format.bits) if zeros is not None else None
        return cls(format, tuple(shape), pack_codes(codes, format.bits), scales, packed_zeros, channel, table)

    # -- rows --------------------------------------------------------------------------------------------------------

    def rows(self, first: int, last: int) -> PackedArray:
        """Rows [first, last) of all R as a matrix [last - first, k]; whole matrices of a stack as a stack of them.

        Raises ValueError for a cut through a block of rows that share a scale, and for rows of several matrices, not
        all whole, whose parts (blocks, tables) belong to matrices.
        """
        fmt, k = self.format, self.shape[-1]
        n = self.shape[-2] if len(self.shape) > 1 else 1
        if not 0 <= first <= last <= math.prod(self.shape[:-1]):
            raise IndexError(f"rows {first} to {last} of {list(self.shape)}")
        low, high = first // max(1, n), -(-last // max(1, n))  # the matrices that are touched
        whole = len(self.shape) > 2 and n > 0 and first % n == 0 and last % n == 0
        block, shape = fmt.block_rows, (last - first, k)
        scale_rows = slice(first, last)
        if block > 1 or self.table is not None:
            if whole:
                shape = (high - low, n, k)
            elif high - low > 1:
                raise ValueError(f"rows {first} to {last} of {list(self.shape)} in {fmt} are of several matrices")
        if block > 1:
            per_matrix, start = -(-n // block), first - low * n
            if start % block or ((last - low * n) % block and last % max(1, n)):
                raise ValueError(f"rows {first} to {last} cut through a block of {block} rows of {fmt}")
            begin = low * per_matrix + start // block
            scale_rows = slice(begin, begin + (shape[0] * per_matrix if whole else -(-shape[0] // block)))
        table = self.table
        if table is not None and len(self.shape) > 2:
            flat = table.reshape(-1, *table.shape[len(self.shape) - 2 :])
            table = flat[low:high] if whole else flat[min(low, len(flat) - 1)]
        return PackedArray(
            fmt,
            shape,
            self.codes[first:last],
            self.scales[scale_rows],
            self.zeros[first:last] if self.zeros is not None else None,
            self.channel[first:last] if self.channel is not None else None,
            table,
        )


def concatenate_packed(values: Sequence[PackedArray]) -> PackedArray:
    """Arrays of one format, one after another along axis 0. Raises ValueError where the result would not exist."""
    first = values[0]
    if any(v.format != first.format or v.shape[1:] != first.shape[1:] for v in values):
        raise ValueError(
            "arrays of unlike formats or shapes: " + ", ".join(f"{list(v.shape)} {v.format}" for v in values)
        )
    table = first.table
    if table is not None:
        tables = [v.table for v in values if v.table is not None]
        if len(first.shape) > 2:
            table = np.concatenate(tables)
        elif any(not np.array_equal(table, t) for t in tables):
            raise ValueError(f"matrices in {first.format} with unlike tables cannot become one")
    return PackedArray(
        first.format,
        (sum(v.shape[0] for v in values), *first.shape[1:]),
        np.concatenate([v.codes for v in values]),
        np.concatenate([v.scales for v in values]),
        np.concatenate([v.zeros for v in values if v.zeros is not None]) if first.zeros is not None else None,
        np.concatenate([v.channel for v in values if v.channel is not None]) if first.channel is not None else None,
        table,
    )


def stored_parts(format: Any, shape: tuple[int, ...]) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """dtype and shape of every part of an array, by field, in the order of its bytes."""
    *outer, k = shape
    rows, groups = math.prod(outer), format.groups(k)
    byte = np.dtype(np.uint8)
    parts: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    parts["codes"] = (byte, (rows, row_bytes(format.codes_per_row(k), format.bits)))
    matrices, n = math.prod(outer[:-1]), outer[-1] if outer else 1
    scale_rows = rows if format.block_rows == 1 else matrices * -(-n // format.block_rows)
    parts["scales"] = (format.scale.dtype, (scale_rows, groups))
    if format.zero_point:
        parts["zeros"] = (byte, (rows, row_bytes(groups, format.bits)))
    if format.channel is not None:
        parts["channel"] = (format.channel.dtype, (rows,))
    if format.table_shape is not None:
        parts["table"] = (np.dtype(np.int8), (*outer[:-1], *format.table_shape))
    return parts


def stored_bytes(format: Any, shape: tuple[int, ...]) -> int:
    """Bytes of all parts of an array."""
    return sum(dtype.itemsize * math.prod(part) for dtype, part in stored_parts(format, shape).values())
