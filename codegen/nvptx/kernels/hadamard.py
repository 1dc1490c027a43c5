"""Rotation of a head by Hadamard's matrix across the lanes of a warp (`ir.kv_low_bit.rotate`).

A lane holds neighbouring columns of both halves of the head. Columns at a distance below that are in one lane, further
ones in another, those half a head apart in one lane again. Steps come in the order of the reference: the bits agree.
"""

from __future__ import annotations

from codegen.nvptx.builder import GridBuilder
from codegen.tile_builder import Expr


def rotate_head(k: GridBuilder, halves: tuple[Expr, Expr], lane: Expr, half: int, block: int) -> tuple[Expr, Expr]:
    """The columns times the orthonormal matrix in blocks of `block` columns; `half` columns are a power of two."""
    assert half & (half - 1) == 0 and 2 * half % block == 0
    first, second = halves
    lanes, distance = first.lanes, 1
    while distance < block:
        if distance == half:
            first, second = first + second, first - second
        elif distance < lanes:
            first, second = (_within(k, x, distance) for x in (first, second))
        else:
            first, second = (_across(k, x, lane, distance // lanes) for x in (first, second))
        distance *= 2
    return first * block**-0.5, second * block**-0.5


def _within(k: GridBuilder, x: Expr, distance: int) -> Expr:
    """Sums and differences of the columns of one lane."""
    numbers = [x.extract(i) for i in range(x.lanes)]
    made = []
    for i, number in enumerate(numbers):
        other = numbers[i ^ distance]
        made.append(other - number if i & distance else number + other)
    return k.join(*made)


def _across(k: GridBuilder, x: Expr, lane: Expr, mask: int) -> Expr:
    """Sums and differences with the lane that is `mask` away."""
    upper = (lane // mask % 2).compare("eq", 1)
    numbers = [x.extract(i) for i in range(x.lanes)] if x.lanes > 1 else [x]
    made = []
    for number in numbers:
        other = k.shuffle(number, mask)
        made.append(k.select(upper, other - number, number + other))
    return k.join(*made) if len(made) > 1 else made[0]
