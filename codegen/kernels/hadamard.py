"""The orthonormal Hadamard rotation of a row: the butterflies of `ir.kv_low_bit.rotate`, in order.

Sums and differences of neighbours at distance 1, 2, 4, ... (Fino and Algazi, "Unified matrix treatment of the fast
Walsh-Hadamard transform", 1976): inside of registers, then among the registers of a tile, then in memory.
"""

from __future__ import annotations

from collections.abc import Callable

from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import F32, I32
from ir.types import VectorType

Load = Callable[[Expr, int, Expr | None], Expr]  # (column, lanes, mask) -> f32

MOST_LANES = 8  # an 8-lane permutation is one instruction with 256-bit registers already
IN_REGISTERS = 128  # columns of a tile
_MEMORY_LANES = 16


def rotate_row(k: KernelBuilder, read: Load, out: Buffer, width: int, block: int) -> None:
    """out[0 .. width] (f32) = the row that `read` gives times the Hadamard matrix, `block` columns at a time.

    `block` is a power of two that divides the width. `read` may read from `out`.
    """
    tile = min(block, IN_REGISTERS)
    final = block**-0.5

    def rotate_tile(first: Expr) -> None:
        lanes = min(block, MOST_LANES)
        places = [first + i for i in range(0, tile, lanes)]
        vectors = [read(place, lanes, None) for place in places]
        distance = 1
        while distance < lanes:
            vectors = [_within(k, v, distance) for v in vectors]
            distance *= 2
        step = 1
        while step < len(vectors):
            made = list(vectors)
            for i in range(len(vectors)):
                if not i & step:
                    made[i], made[i | step] = vectors[i] + vectors[i | step], vectors[i] - vectors[i | step]
            vectors, step = made, 2 * step
        for place, vector in zip(places, vectors, strict=True):
            out.store(place, vector * final if tile == block else vector)

    if tile == width:
        rotate_tile(k.index(0))
    else:
        with k.loop(0, width, tile) as at:
            rotate_tile(at.i)
    stride = tile
    while stride < block:
        last = 2 * stride == block
        with k.loop(0, width, 2 * stride) as pair, k.loop(0, stride, _MEMORY_LANES) as at:
            place = pair.i + at.i
            a, b = out.load(place, _MEMORY_LANES), out.load(place + stride, _MEMORY_LANES)
            total, difference = a + b, a - b
            out.store(place, total * final if last else total)
            out.store(place + stride, difference * final if last else difference)
        stride *= 2


def rotate_stored(k: KernelBuilder, row: Buffer, width: int, block: int) -> None:
    """The same in place: row[0 .. width] in scratch memory."""
    rotate_row(k, lambda column, lanes, mask: row.load(column, lanes, mask), row, width, block)


def _within(k: KernelBuilder, x: Expr, distance: int) -> Expr:
    """Sums and differences of the lanes that are `distance` apart."""
    lanes = x.lanes
    partner = k.constant(VectorType(lanes, I32), tuple(i ^ distance for i in range(lanes)))
    sign = k.constant(VectorType(lanes, F32), tuple(-1.0 if i & distance else 1.0 for i in range(lanes)))
    return k.fma(x, sign, k.lookup(x, partner))


assert IN_REGISTERS % _MEMORY_LANES == 0
