"""Codes of 1 to 8 bits in a row, packed into bytes: code i has the bits [i * bits, (i + 1) * bits) of the row, counted
from the lowest bit of the first byte. Each row begins at a byte; the bits left over at its end are zero.

Eight codes are one 64-bit word, whose fields are pushed together two by two.
"""

from __future__ import annotations

import numpy as np

_CHUNK = 1 << 18  # codes at a time: their words stay in a cache
_FIELDS = (0x00FF00FF00FF00FF, 0x0000FFFF0000FFFF, 0x00000000FFFFFFFF)


def row_bytes(count: int, bits: int) -> int:
    """Bytes of `count` packed codes."""
    return -(-count * bits // 8)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [n, count], each below 2**bits, to uint8 [n, row_bytes]."""
    n, count = codes.shape
    if bits == 8 or not codes.size:
        return codes.copy() if bits == 8 else np.zeros((n, row_bytes(count, bits)), np.uint8)
    packed = np.zeros((n, row_bytes(count, bits)), np.uint8)
    eights = -(-count // 8)
    for rows in _row_chunks(n, count):
        part = codes[rows]
        if count % 8:
            part = np.concatenate([part, np.zeros((part.shape[0], -count % 8), np.uint8)], axis=1)
        words = np.ascontiguousarray(part).view("<u8")
        for step, mask in enumerate(_FIELDS):
            wide = np.uint64(8 << step)
            words = (words & np.uint64(mask)) | ((words >> wide) & np.uint64(mask)) << np.uint64(bits << step)
        low = words.view(np.uint8).reshape(part.shape[0], eights, 8)[:, :, :bits]
        packed[rows] = low.reshape(part.shape[0], eights * bits)[:, : packed.shape[1]]
    return packed


def unpack_codes(packed: np.ndarray, count: int, bits: int) -> np.ndarray:
    """The inverse of `pack_codes`: uint8 [n, count]."""
    n = packed.shape[0]
    if bits == 8 or not packed.size:
        return packed.copy() if bits == 8 else np.zeros((n, count), np.uint8)
    codes = np.zeros((n, count), np.uint8)
    eights = -(-count // 8)
    for rows in _row_chunks(n, count):
        part = packed[rows]
        padded = np.zeros((part.shape[0], eights * bits), np.uint8)
        padded[:, : part.shape[1]] = part
        spread = np.zeros((part.shape[0], eights, 8), np.uint8)
        spread[:, :, :bits] = padded.reshape(part.shape[0], eights, bits)
        words = spread.view("<u8")
        for step in (2, 1, 0):
            field = np.uint64(sum(((1 << (bits << step)) - 1) << (i * (16 << step)) for i in range(4 >> step)))
            words = (words & field) | ((words >> np.uint64(bits << step)) & field) << np.uint64(8 << step)
        codes[rows] = words.view(np.uint8).reshape(part.shape[0], eights * 8)[:, :count]
    return codes


def _row_chunks(n: int, count: int) -> list[slice]:
    step = max(1, _CHUNK // max(1, count))
    return [slice(start, start + step) for start in range(0, n, step)]
