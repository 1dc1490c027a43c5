"""Codes of a few bits out of the 32-bit words that quantizers pack them into, lowest bits first.

Three ways to pack are in use: `dense`, code i at the bits [i * bits, (i + 1) * bits) of the row, maybe across two
words; `loose`, as many whole codes as fit into each word, the rest of it unused (the same where bits divides 32); and
that of AWQ, eight codes of four bits a word in an order of their own.
"""

from __future__ import annotations

import numpy as np

from ir.formats.bit_packing import unpack_codes

# Code i of a word of AWQ, counted from the lowest bits, belongs to column AWQ_ORDER[i] of eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def dense_words(count: int, bits: int) -> int:
    """Words that `count` codes take, packed densely."""
    return -(-count * bits // 32)


def loose_words(count: int, bits: int) -> int:
    """Words that `count` codes take, each code within one word."""
    return -(-count // (32 // bits))


def unpack_dense(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """int32 [rows, words] -> u8 [rows, count]."""
    data = np.ascontiguousarray(words, "<i4").view(np.uint8)
    if bits == 8:
        return data[:, :count]
    if bits == 4:
        return unpack_nibbles(data)[:, :count]
    return unpack_codes(data[:, : -(-count * bits // 8)], count, bits)


def unpack_loose(words: np.ndarray, count: int, bits: int) -> np.ndarray:
    """int32 [rows, words] -> u8 [rows, count]."""
    per_word = 32 // bits
    out = np.empty((words.shape[0], words.shape[1], per_word), np.uint8)
    for index in range(per_word):
        out[..., index] = (words >> np.int32(bits * index)) & ((1 << bits) - 1)
    return out.reshape(words.shape[0], words.shape[1] * per_word)[:, :count]


def unpack_nibbles(data: np.ndarray) -> np.ndarray:
    """u8 [..., n] -> u8 [..., 2 n], the low half of each byte first."""
    out = np.empty((*data.shape, 2), np.uint8)
    np.bitwise_and(data, 15, out=out[..., 0])
    np.right_shift(data, 4, out=out[..., 1])
    return out.reshape(*data.shape[:-1], 2 * data.shape[-1])


def unpack_awq(words: np.ndarray) -> np.ndarray:
    """int32 [rows, words] -> u8 [rows, 8 * words] in order of the columns."""
    packed = unpack_nibbles(np.ascontiguousarray(words, "<i4").view(np.uint8)).reshape(*words.shape, 8)
    out = np.empty_like(packed)
    out[..., list(AWQ_ORDER)] = packed
    return out.reshape(words.shape[0], words.shape[1] * 8)
