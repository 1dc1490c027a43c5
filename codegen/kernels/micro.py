"""The inner product every matrix kernel is built from: a few rows of activations times one strip of weights.

The weights of a strip stream through once per row tile while the sums stay in registers. Each output element is summed
along k in one order, whatever the tile: the same token gets the same bits alone and in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.tile_builder import Buffer, Expr, KernelBuilder, bf16_pair
from ir.formats import BF16, I32, PlainFormat
from ir.types import Layout

LANES = 16  # f32 lanes of one accumulator; a 256-bit CPU splits each in two


@dataclass(frozen=True)
class TileShape:
    """Registers of the target spent on sums: up to `rows` activation rows times `vectors` accumulators of 16 lanes."""

    rows: int = 6
    vectors: int = 4
    unroll: int = 4  # copies of the k loop's body
    prefetch: int = 0  # bytes ahead of the weights to prefetch, 0 = leave it to the hardware


@dataclass(frozen=True)
class StripMatrix:
    """A weight matrix [n, k] in strips, as a kernel sees it."""

    n: int
    k: int
    layout: Layout
    element: PlainFormat

    @property
    def vectors(self) -> int:
        """Accumulator vectors across one strip."""
        return self.layout.rows // LANES

    @property
    def strips(self) -> int:
        return self.layout.padded(self.n, self.k)[0] // self.layout.rows

    @property
    def stored_k(self) -> int:
        """k with its padding to whole packs: what a row of activations must have, zeros included."""
        return self.layout.padded(self.n, self.k)[1]

    @property
    def strip_elements(self) -> int:
        return self.stored_k * self.layout.rows

    @property
    def elements(self) -> int:
        return self.strips * self.strip_elements


def multiply_rows(
    k: KernelBuilder,
    rows: list[tuple[Buffer, Expr]],
    vectors: list[tuple[Buffer, int]],
    w: StripMatrix,
    shape: TileShape,
    initial: list[list[Expr]] | None = None,
) -> list[list[Expr]]:
    """Sums [len(rows)][len(vectors)] of 16 lanes each, added to `initial` (zeros by default).

    A row is a buffer of the weights' element and the offset of its element 0, a multiple of the pack; it has `stored_k`
    elements. A vector of outputs is a strip (the buffer begins at the strip's first element) and the number of the 16
    weight rows inside it.
    """
    pack, count = w.layout.pack, len(vectors)
    steps = -(-w.k // pack)
    unroll = max(1, min(shape.unroll, steps))
    start = [s for row in initial for s in row] if initial else [k.f32(0.0, LANES)] * (len(rows) * count)

    def step(at: Expr, sums: list[Expr]) -> list[Expr]:
        """One pack of k: `at` counts packs."""
        places = [(strip, (at * w.layout.rows + j * LANES) * pack) for strip, j in vectors]
        weights = [strip.load(place, LANES * pack) for strip, place in places]
        if shape.prefetch:
            for strip, place in places:
                strip.prefetch(place + shape.prefetch // (w.element.bits // 8))
        new = []
        for i, (buffer, offset) in enumerate(rows):
            if w.element == BF16:
                pair = bf16_pair(buffer.view(I32).load(offset // 2 + at), LANES)
                new += [k.dot2(sums[i * count + j], weights[j], pair) for j in range(count)]
            else:
                number = k.splat(buffer.load(offset + at), LANES)
                new += [k.fma(weights[j], number, sums[i * count + j]) for j in range(count)]
        return new

    main = steps // unroll * unroll
    sums = start
    if main > unroll:
        with k.loop(0, main, unroll, start) as loop:
            sums = loop.carried
            for u in range(unroll):
                sums = step(loop.i + u, sums)
            loop.carry(*sums)
        sums = loop.results
    else:
        main = 0
    for at in range(main, steps):
        sums = step(k.index(at), sums)
    return [sums[i * count : (i + 1) * count] for i in range(len(rows))]
