"""The loops that put codes into the registers of `codegen.packed_strips`, compiled by numba: numpy would need a pass
over the matrix for each of a code's planes and slots."""

from __future__ import annotations

import numba
import numpy as np


@numba.njit(cache=True, nogil=True, parallel=True)
def pack_blocks(
    codes: np.ndarray, out: np.ndarray, groups: int, group_bytes: int, blocks_at: int, planes: np.ndarray, pack: int
) -> None:
    """uint8 codes [strips, rows, stored_k] -> the blocks of `out`, uint8 [strips, strip bytes]."""
    strips, rows, stored_k = codes.shape
    columns = stored_k // groups
    slot_bits = 32 // pack
    for strip in numba.prange(strips):
        for group in range(groups):
            at = group * group_bytes + blocks_at
            for block in range(columns // 32):
                column = group * columns + block * 32
                for first_row in range(0, rows, 16):
                    low = 0
                    for width in planes:
                        per_register = slot_bits // width
                        mask = (1 << width) - 1
                        for register in range(width):
                            first = column + register * per_register * pack
                            for row in range(first_row, first_row + 16):
                                word = np.uint32(0)
                                for slot in range(pack):
                                    for step in range(per_register):
                                        code = (codes[strip, row, first + step * pack + slot] >> low) & mask
                                        word |= np.uint32(code) << np.uint32(slot * slot_bits + step * width)
                                out[strip, at] = word & 255
                                out[strip, at + 1] = (word >> 8) & 255
                                out[strip, at + 2] = (word >> 16) & 255
                                out[strip, at + 3] = word >> 24
                                at += 4
                        low += width
