"""Where the weights of a GPU's decode products lie: in the order in which the lanes of a warp want them.

A matrix [n, k] is cut into tiles of 16 rows and chunks of 64 columns, and filled up with zeros in both directions; k is
a multiple of 8. Where zeros stand, kernels read what x has elsewhere in the row, or zeros, and nothing behind it. A
chunk is two segments of 32 columns, a segment two products of `grid.mma`. Lane l = 4g + q of a warp holds, of every
segment, columns 8q .. 8q + 7 of rows g and g + 8: those of product m are 8q + 4m .. 8q + 4m + 3, so that the
activations of a segment are 8 neighbours too. Which columns a product takes is free as long as both factors agree.

    bits   a lane's loads of 16 bytes for a chunk       bytes of a load
    16     one for each product                         its 8 numbers
    8      one for each segment                         codes of product 0, then of product 1
    4      one                                          a word a product: code i in bits 4 * (i / 2) + 16 * (i % 2)

Scales lie beside them: for every tile and unit of columns (a chunk, or a group where that is wider), 8 times the scales
of row g by group, then of row g + 8 by group.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F8E4M3, F16, F32, FP8Format, GroupedIntFormat, PackedArray, PlainFormat

TILE, CHUNK, SEGMENT = 16, 64, 32
STEP = 8  # columns of x that a lane reads at once


@dataclass(frozen=True)
class Fragments:
    """The layout of a matrix [n, k] of `bits` 16 (bf16), 8 or 4; `group` columns share a scale, 0 without scales.

    Codes of other widths lie in the next one that there is, as the codes of the same levels. With `fp8` codes are
    f8e4m3 and scales f32, else codes are integers and scales f16.
    """

    n: int
    k: int
    bits: int
    group: int = 0
    fp8: bool = False

    @classmethod
    def of(cls, n: int, k: int, format: object) -> Fragments:
        """Raises DiagnosticError for matrices and formats that have no product on GPUs."""
        if isinstance(format, FP8Format):
            return cls._of_fp8(n, k, format)
        message = ""
        if k % STEP or k == 0:
            message = f"a matrix of {k} columns has no product on GPUs; expected a multiple of {STEP}"
        elif isinstance(format, GroupedIntFormat):
            plain = not format.zero_point and format.channel is None and format.scale == F16
            whole = format.group in (0, k)
            group = _padded(k) if whole else format.group
            fits = whole or group == SEGMENT or (group % CHUNK == 0 and k % group == 0)
            if format.bits < 2 or not plain or not fits:
                message = (
                    f"{format} has no product on GPUs; expected q2_sym to q8_sym with scale=f16 and groups of"
                    f" {SEGMENT}, a multiple of {CHUNK} columns that divides {k}, or whole rows"
                )
            else:
                return cls(n, k, 4 if format.bits <= 4 else 8, group)
        elif format != BF16:
            message = f"weights in {format} have no product on GPUs; expected bf16, f8e4m3, or q2_sym to q8_sym"
        if message:
            raise DiagnosticError(message)
        return cls(n, k, 16)

    @classmethod
    def _of_fp8(cls, n: int, k: int, format: FP8Format) -> Fragments:
        """Of f8e4m3 with scales of rows or of blocks."""
        whole = format.block_cols in (0, k)
        group = _padded(k) if whole else format.block_cols
        fits = whole or (group % CHUNK == 0 and k % group == 0)
        if k % STEP or k == 0 or format.element != F8E4M3 or not fits:
            message = f"{format} of {k} columns has no product on GPUs"
            expected = (
                f"a multiple of {STEP} columns in f8e4m3, with scales of rows or of blocks of a multiple of {CHUNK}"
                " columns that divides them"
            )
            raise DiagnosticError(message, expected=expected)
        return cls(n, k, 8, group, True)

    @property
    def scale_element(self) -> PlainFormat:
        return F32 if self.fp8 else F16

    @property
    def tiles(self) -> int:
        return -(-self.n // TILE)

    @property
    def columns(self) -> int:
        """Columns as they lie, those of zeros too."""
        return _padded(self.k)

    @property
    def ragged(self) -> bool:
        """Whether the last chunk has columns that x does not have."""
        return self.columns != self.k

    @property
    def chunks(self) -> int:
        return self.columns // CHUNK

    @property
    def loads(self) -> int:
        """Loads of 16 bytes that a lane makes for a chunk."""
        return self.bits // 4

    @property
    def groups_of_unit(self) -> int:
        """Scales of a row that lie together."""
        return 2 if self.group == SEGMENT else 1

    @property
    def chunks_of_unit(self) -> int:
        return max(1, self.group // CHUNK)

    @property
    def code_bytes(self) -> int:
        """Where scales begin when they lie behind the codes."""
        return self.tiles * TILE * self.columns * self.bits // 8

    @property
    def nbytes(self) -> int:
        """Codes and scales."""
        each = self.scale_element.dtype.itemsize
        scales = self.tiles * TILE * self.columns // self.group * each if self.group else 0
        return self.code_bytes + scales

    # -- packing

    def codes(self, w: np.ndarray | PackedArray) -> np.ndarray:
        """int32 words [tiles, chunks, loads, 32 lanes, 4], flat."""
        signed = isinstance(w, PackedArray) and not self.fp8
        zero = 1 << (self.bits - 1) if signed else 0  # the code that means 0
        if isinstance(w, PackedArray) and self.fp8:
            numbers = w.code_array()
        elif isinstance(w, PackedArray):
            numbers = w.code_array() + np.uint8(zero - (1 << (w.format.bits - 1)))
        else:
            numbers = w.view(np.uint16)
        padded = np.full((self.tiles * TILE, self.columns), zero, numbers.dtype)
        padded[: self.n, : self.k] = numbers
        tiles = padded.reshape(self.tiles, TILE, self.chunks, CHUNK).swapaxes(1, 2)
        rows, columns = fragment_places()
        lanes = tiles[:, :, rows, columns]  # [tile, chunk, segment, product, lane, i]
        return self._words(lanes.astype(np.uint32)).reshape(-1).view(np.int32)

    def _words(self, lanes: np.ndarray) -> np.ndarray:
        """The words of [tile, chunk, segment, product, lane, 8], as [tile, chunk, load, lane, word]."""
        tiles, chunks = lanes.shape[:2]
        if self.bits == 4:
            word = sum(lanes[..., i] << np.uint32(4 * (i // 2) + 16 * (i % 2)) for i in range(8))
            assert isinstance(word, np.ndarray)  # [tile, chunk, segment, product, lane]
            return np.moveaxis(word.reshape(tiles, chunks, 1, 4, 32), 3, 4)
        each = 32 // self.bits
        parts = lanes.reshape(*lanes.shape[:-1], 8 // each, each)
        words = sum(parts[..., i] << np.uint32(self.bits * i) for i in range(each))
        assert isinstance(words, np.ndarray)  # [tile, chunk, segment, product, lane, words]
        if self.bits == 16:
            return words.reshape(tiles, chunks, 4, 32, 4)
        return np.moveaxis(words, 3, 4).reshape(tiles, chunks, 2, 32, 4)

    def scales(self, w: PackedArray) -> np.ndarray:
        """[tiles, units, 8, 2 rows, groups of a unit] of `scale_element`, flat; those of blocks are repeated."""
        padded = np.zeros((self.tiles * TILE, self.columns // self.group), self.scale_element.dtype)
        rows = w.format.block_rows if isinstance(w.format, FP8Format) else 1
        padded[: self.n, : w.scales.shape[1]] = np.repeat(w.scales, rows, axis=0)[: self.n]
        shape = (self.tiles, 2, 8, -1, self.groups_of_unit)
        return np.ascontiguousarray(padded.reshape(shape).transpose(0, 3, 2, 1, 4)).reshape(-1)


def _padded(k: int) -> int:
    return -(-k // CHUNK) * CHUNK


def fragment_places() -> tuple[np.ndarray, np.ndarray]:
    """Row in the tile and column in the chunk of [segment, product, lane, i]."""
    s, m, lane, i = np.indices((2, 2, 32, 8))
    pair = i // 2
    rows = lane // 4 + 8 * (pair % 2)
    columns = SEGMENT * s + 8 * (lane % 4) + 4 * m + 2 * (pair // 2) + i % 2
    return rows, columns
