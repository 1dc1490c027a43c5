"""Where the numbers of a matrix product lie on a wave of 64 lanes, and which lanes bring them there.

`grid.mma` has 32 lanes, 4g + q, with 32-bit words of a [16, k], b [k, 8] and sums [16, 8] (ir/ops/grid_matrix.py). The
wave's instruction (AMD, "CDNA3 Instruction Set Architecture", 7: v_mfma_f32_16x16x16) has 64: lane l = 16 j + i holds
words 2j and 2j + 1 of row i of a, of column i of b, and of the result rows 4j .. 4j + 3 of column i. A word has 2
numbers of 16 bits or 4 of 8; which it is makes no difference here. Both halves of the wave hold the same 32 lanes'
words, b's columns 8 .. 15 are those of 0 .. 7 again, and what comes of them is not read.

Each function gives, for every lane, the lane that has what it needs, and in which of its words.
"""

from __future__ import annotations

import numpy as np

LANES = 64
Places = tuple[np.ndarray, np.ndarray]  # [64] lanes, [64] words

_LANE = np.arange(LANES)
_I, _J = _LANE % 16, _LANE // 16
_G, _Q = _LANE % 32 // 4, _LANE % 4


def places_of_a(number: int) -> Places:
    """Word `number` (0, 1) of the left factor, out of 4 words."""
    return _I % 8 * 4 + 2 * (_J % 2) + number, _I // 8 + 2 * (_J // 2)


def places_of_b(number: int) -> Places:
    """Word `number` (0, 1) of the right factor, out of 2 words."""
    return _I % 8 * 4 + 2 * (_J % 2) + number, _J // 2


def places_of_sums(number: int) -> Places:
    """Sum `number` (0 .. 3) of a lane of `grid.mma`, out of the 4 of the instruction."""
    row, column = _G + 8 * (number // 2), 2 * _Q + number % 2
    return 16 * (row // 4) + column, row % 4


def places_of_rows(matrix: int) -> np.ndarray:
    """`grid.load_matrix`: the lane that says where row g of a matrix begins."""
    return 8 * matrix + _G


def places_of_columns(matrix: int, odd: int) -> np.ndarray:
    """The same with rows and columns exchanged: of row 2q, or 2q + 1."""
    return 8 * matrix + 2 * _Q + odd
