"""Weight matrices in strips: the numpy pack and unpack of `ir.types.Layout`.

`pack_strips` turns a matrix [n, k] into the stored bytes' array [strips, k_padded/pack, rows, pack]; `unpack_strips`
is its inverse. The transposition runs at several GB/s in numpy because rows are first copied into a buffer whose row
stride is an odd number of cache lines (power-of-two strides would map a whole column to one cache set) and because
`pack` elements move as one machine word.
"""

from __future__ import annotations

import numpy as np

from ir.types import Layout

_CACHE_LINE = 64
_WORDS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class StripPacker:
    """Packs strips of matrices with `k` columns of `dtype`; holds the one staging buffer that this takes."""

    def __init__(self, layout: Layout, k: int, dtype: np.dtype) -> None:
        self.rows = layout.rows
        self.pack = layout.pack
        self.k = k
        self.groups = -(-k // layout.pack)  # packs in a row
        self.dtype = np.dtype(dtype)
        word_bytes = self.dtype.itemsize * self.pack
        lines = -(-self.groups * word_bytes // _CACHE_LINE) | 1
        buffer = np.zeros((self.rows, lines * _CACHE_LINE), np.uint8)
        self._staged = buffer.view(self.dtype)[:, : self.groups * self.pack]
        word = _WORDS.get(word_bytes)
        self._word = np.dtype(word) if word is not None else None
        self._staged_words = buffer.view(self._word)[:, : self.groups] if self._word is not None else None

    @property
    def strip_shape(self) -> tuple[int, int, int]:
        """[k_padded / pack, rows, pack] of one stored strip."""
        return self.groups, self.rows, self.pack

    def pack_into(self, out: np.ndarray, rows: np.ndarray) -> None:
        """Writes one strip: `rows` [0..R, k] into `out` [groups, R, pack], contiguous; what is missing is zero."""
        count = rows.shape[0]
        np.copyto(self._staged[:count, : self.k], rows)
        self._staged[count:, : self.k] = 0  # an earlier strip may have filled them; columns beyond k never are
        if self._word is not None and self._staged_words is not None:
            np.copyto(out.view(self._word)[..., 0], self._staged_words.T)
        else:
            np.copyto(out, self._staged.reshape(self.rows, self.groups, self.pack).transpose(1, 0, 2))


def strip_rows(layout: Layout, n: int, strip: int) -> tuple[int, int]:
    """The rows [first, last) of an n-row matrix that stored strip `strip` holds; empty for a strip of padding."""
    part_rows = n // layout.interleave
    first = strip // layout.interleave * layout.rows
    base = strip % layout.interleave * part_rows
    return base + min(first, part_rows), base + min(first + layout.rows, part_rows)


def strip_count(layout: Layout, n: int) -> int:
    """Stored strips of an n-row matrix."""
    return layout.padded(n, 1)[0] // layout.rows


def pack_strips(matrix: np.ndarray, layout: Layout) -> np.ndarray:
    """[n, k] -> [strips, k_padded / pack, rows, pack], zero-padded. n must be a multiple of the interleave."""
    n, k = matrix.shape
    if n % layout.interleave:
        raise ValueError(f"{n} rows do not divide into {layout.interleave} interleaved parts")
    packer = StripPacker(layout, k, matrix.dtype)
    out = np.empty((strip_count(layout, n), *packer.strip_shape), matrix.dtype)
    for strip in range(out.shape[0]):
        first, last = strip_rows(layout, n, strip)
        packer.pack_into(out[strip], matrix[first:last])
    return out


def unpack_strips(stored: np.ndarray, layout: Layout, n: int, k: int) -> np.ndarray:
    """The matrix [n, k] that `pack_strips` laid out; `stored` may have any shape of that many elements."""
    groups = -(-k // layout.pack)
    strips = stored.reshape(strip_count(layout, n), groups, layout.rows, layout.pack)
    out = np.empty((n, k), stored.dtype)
    for index, strip in enumerate(strips):
        first, last = strip_rows(layout, n, index)
        out[first:last] = strip.transpose(1, 0, 2).reshape(layout.rows, -1)[: last - first, :k]
    return out
