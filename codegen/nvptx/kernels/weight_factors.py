"""Weights in the order of `codegen.nvptx.fragments` as left factors of the matrix unit, in registers.

Codes become bf16 exactly: of 4 bits in the mantissa of 128 with 136 taken away, two at a time; of 8 bits in that of
2**23 as f32; f8e4m3 by moving its bits. Scales multiply the f32 sum over their group: nothing is rounded to 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.fragments import Fragments
from codegen.tile_builder import Expr
from ir.formats import BF16, F8E4M3, F32, I8, I32
from ir.types import VectorType

_MAGIC_4 = 0x43004300  # 128.0 twice, as bf16: a code of 4 bits in its lowest bits makes 128 + code
_MAGIC_8 = 0x4B000000  # 2**23 as f32: a code of 8 bits in its lowest bits makes 2**23 + code


def left_factor(k: GridBuilder, layout: Fragments, words: Sequence[Expr], s: int, m: int) -> Expr:
    """The 8 bf16 numbers of this lane for product m of segment s; `words`: its loads of the chunk, 4 i32 each."""
    if layout.bits == 16:
        return words[2 * s + m].bitcast(VectorType(8, BF16))
    if layout.fp8:
        return k.join(*(from_fp8(k, words[s].extract(2 * m + i // 2), i % 2) for i in range(4)))
    if layout.bits == 8:
        return k.join(*(from_bytes(k, words[s].extract(2 * m + half)) for half in range(2)))
    word = words[0].extract(2 * s + m)
    return k.join(*(from_nibbles(k, word, pair) for pair in range(4)))


def add_scaled(k: GridBuilder, layout: Fragments, total: Expr, partial: Expr, scale: Expr, group: int) -> Expr:
    """total + partial under the scales of rows g (elements 0, 1) and g + 8 (elements 2, 3)."""
    low, high = scale.extract(group), scale.extract(layout.groups_of_unit + group)
    return k.fma(partial, k.join(low, low, high, high), total)


def from_nibbles(k: GridBuilder, word: Expr, pair: int) -> Expr:
    """Codes 2 * pair and 2 * pair + 1 of a word, less 8, as bf16."""
    bits = (word.shifted_right(4 * pair) if pair else word) & 0x000F000F
    pairs = VectorType(2, BF16)
    one, offset = (k.constant(bits.type, number).bitcast(pairs) for number in (0x3F803F80, -0x3CF73CF8))
    return k.fma_pairs((bits | _MAGIC_4).bitcast(pairs), one, offset)


def from_fp8(k: GridBuilder, word: Expr, half: int) -> Expr:
    """Two f8e4m3 of a word as bf16: exponent and mantissa moved to theirs, and 2**120 for the other bias. Exact."""
    low, high = (word, word.shifted_left(8)) if half == 0 else (word.shifted_right(16), word.shifted_right(8))
    codes = (low & 0xFF) | (high & 0xFF0000)
    bits = (codes & 0x800080).shifted_left(8) | (codes & 0x7F007F).shifted_left(4)
    pairs = VectorType(2, BF16)
    factor, zero = (k.constant(bits.type, number).bitcast(pairs) for number in (0x7B807B80, -0x7FFF8000))
    return k.fma_pairs(bits.bitcast(pairs), factor, zero)


def from_bytes(k: GridBuilder, word: Expr) -> Expr:
    """The four codes of a word, less 128, as bf16."""
    numbers = []
    for i in range(4):
        bits = (word.shifted_right(8 * i) if i else word) & 0xFF
        numbers.append((bits | _MAGIC_8).bitcast(k.f32(0.0).type) - (2.0**23 + 128))
    return k.join(*numbers).cast(BF16)


# -- products of bytes: columns of a segment are taken 4 by 4 of each lane, so that one product takes them all

INT8_START = 0x4B400000  # 1.5 * 2**23 as f32: an i32 sum below 2**22 added to its bits is added to the number
INT8_CODES = -0x7F7F7F80  # 128 in each byte of a word


def int8_left(k: GridBuilder, layout: Fragments, words: Sequence[Expr], s: int) -> Expr:
    """The 16 codes of this lane for segment s as i8, without their zero point, or as f8e4m3."""
    return as_bytes(k, layout, int8_words(k, layout, words, s))


def as_bytes(k: GridBuilder, layout: Fragments, words: Sequence[Expr]) -> Expr:
    """The codes of words, 4 in each."""
    return k.join(*words).bitcast(VectorType(4 * len(words), F8E4M3 if layout.fp8 else I8))


def int8_words(k: GridBuilder, layout: Fragments, words: Sequence[Expr], s: int) -> list[Expr]:
    """What `int8_left` has, as 4 words.

    Codes of 4 bits come in the order 0, 2, 1, 3 of each four columns: `int8_right` takes x alike.
    """
    if layout.bits == 8:
        low, high = [], []
        for m in range(2):
            first, second = words[s].extract(2 * m), words[s].extract(2 * m + 1)
            low.append((first & 0xFFFF) | second.shifted_left(16))
            high.append((first.shifted_right(16) & 0xFFFF) | (second & -0x10000))
        parts = [low[0], high[0], low[1], high[1]]
        return parts if layout.fp8 else [k.xor(w, k.constant(w.type, INT8_CODES)) for w in parts]
    nibbles = [words[0].extract(2 * s + m) for m in range(2)]
    codes = [w & 0x0F0F0F0F for word in nibbles for w in (word, word.shifted_right(4))]
    # 128 + code - 8 borrows from no other byte; then 128 is taken out of its highest bit
    return [k.xor((w | INT8_CODES) - 0x08080808, k.constant(w.type, INT8_CODES)) for w in codes]


def int8_right(k: GridBuilder, layout: Fragments, pair: Expr) -> Expr:
    """8 neighbouring codes of x, loaded as 2 i32, in the order in which `int8_left` has its columns."""
    if layout.bits == 8:
        return pair.bitcast(VectorType(8, F8E4M3 if layout.fp8 else I8))
    words = []
    for i in range(2):
        w = pair.extract(i)
        words.append((w & -0xFFFF01) | (w.shifted_right(8) & 0xFF00) | (w & 0xFF00).shifted_left(8))
    return k.join(*words).bitcast(VectorType(8, I8))


def int8_zero(k: GridBuilder, layout: Fragments) -> Expr:
    """What sums of products of bytes begin with; `add_int8` takes it away again."""
    return k.f32(0.0, 4) if layout.fp8 else k.constant(VectorType(4, I32), INT8_START)


def add_int8(
    k: GridBuilder, layout: Fragments, total: Expr, partial: Expr, scale: Expr, group: int, x_scale: Expr
) -> Expr:
    """total + partial under the scales of rows g and g + 8 of w and of rows 2q and 2q + 1 of x (`x_scale`, 4 lanes)."""
    low, high = scale.extract(group), scale.extract(layout.groups_of_unit + group)
    exact = partial if layout.fp8 else partial.bitcast(VectorType(4, F32)) - 1.5 * 2.0**23
    return k.fma(exact, k.join(low, low, high, high) * x_scale, total)
