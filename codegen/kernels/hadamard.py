"""The orthonormal Hadamard rotation of a row in scratch memory: the butterflies of `ir.kv_low_bit.rotate`, in order."""

from __future__ import annotations

from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import F32, I32
from ir.types import VectorType

MOST_LANES = 8  # an 8-lane permutation is one instruction with 256-bit registers already


def rotate_row(k: KernelBuilder, row: Buffer, start: Expr | int, dim: int, block: int) -> None:
    """row[start .. start + dim] (f32) times the Hadamard matrix in blocks of `block` columns, in place."""
    lanes = min(block, MOST_LANES)
    at = k.index(start)
    for first in range(0, dim, block):
        places = [at + (first + i) for i in range(0, block, lanes)]
        vectors = [row.load(place, lanes) for place in places]
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
            row.store(place, vector * block**-0.5)


def _within(k: KernelBuilder, x: Expr, distance: int) -> Expr:
    """Sums and differences of the lanes that are `distance` apart."""
    lanes = x.lanes
    partner = k.constant(VectorType(lanes, I32), tuple(i ^ distance for i in range(lanes)))
    sign = k.constant(VectorType(lanes, F32), tuple(-1.0 if i & distance else 1.0 for i in range(lanes)))
    return k.fma(x, sign, k.lookup(x, partner))
