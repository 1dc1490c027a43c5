"""Codes of 1 to 8 bits in a row, packed into bytes: code i has the bits [i * bits, (i + 1) * bits) of the row, counted
from the lowest bit of the first byte. Each row begins at a byte; the bits left over at its end are zero.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 22  # codes unpacked to single bits at a time


def row_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, count], each below 2**bits, to uint8 [n, row_bytes]."""
    n, count = codes.shape
    packed = np.zeros((n, row_bytes(count, bits)), np.uint8)
    for rows in _row_chunks(n, count):
        single = np.unpackbits(codes[rows][..., None], axis=-1, bitorder="little")[..., :bits]
        packed[rows] = np.packbits(single.reshape(single.shape[0], -1), axis=-1, bitorder="little")
    return packed


def unpack_codes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 [n, count]."""
    n = packed.shape[0]
    codes = np.zeros((n, count), np.uint8)
    for rows in _row_chunks(n, count):
        single = np.unpackbits(packed[rows], axis=-1, count=count * bits, bitorder="little")
        grouped = single.reshape(single.shape[0], count, bits)
        codes[rows] = np.packbits(grouped, axis=-1, bitorder="little")[..., 0]
    return codes


def _row_chunks(n: int, count: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, count))
    return [slice(start, start + step) for start in range(0, n, step)]
