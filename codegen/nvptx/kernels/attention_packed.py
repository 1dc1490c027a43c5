"""Tiles of a low-bit KV cache for the attention kernels: codes from memory, bf16 in shared memory, scales beside them.

Codes of a tile are copied one ahead of the computation. When they have come, each thread takes apart the 16 bytes that
it has copied itself: a code less its zero is exact in bf16. Scores are multiplied with the scales of keys, weights with
those of values. Of a cache that keeps its newest positions as they came, those are tiles of their own, from the ring.
"""

from __future__ import annotations

from codegen.nvptx.builder import GridBuilder
from codegen.nvptx.kernels.attention_rows import PIECE, KvTiles
from codegen.nvptx.kernels.weight_factors import from_bytes, from_nibbles
from codegen.nvptx.kv_planes import KvPlanes
from codegen.tile_builder import Buffer, Expr
from ir.formats import BF16, F16, F32, I32
from ir.kv_low_bit import LARGEST_SCALE

WORDS = 4  # of a copy of 16 bytes
SCALES = 8  # of a copy of 16 bytes


class PackedTiles(KvTiles):
    """Tiles of `rows` positions of one slot and kv head: line `line` of the planes, whose `ctx` is a multiple of 8.
    Positions end below `end`."""

    stages = 1

    def __init__(
        self, k: GridBuilder, planes: KvPlanes, buffers: list[Buffer], rows: int, line: Expr, ctx: Expr, end: Expr
    ) -> None:
        self.k, self.planes, self.rows, self.width, self.end = k, planes, rows, planes.stored, end
        self.codes, self.scales = buffers[:2], buffers[2:4]
        self.first = line * ctx  # positions that lie before this line's
        self.words = planes.stored * planes.bits // 32  # of a row
        self.memories = [k.shared(rows * self.width, BF16) for _ in range(2)]
        self.raw = [k.shared(rows * self.words, I32) for _ in range(2)]
        self.held_scales = [k.shared(2 * rows, F16) for _ in range(2)]
        self.lane, _ = k.lane_and_warp()
        self.thread = k.thread_id()

    def _pieces(self) -> list[tuple[Expr, Expr, Expr, Expr | None]]:
        """(number, row, number in the row) of the 16 bytes of codes that are this thread's, and whether they exist."""
        each, made = self.words // WORDS, []
        for first in range(0, self.rows * each, self.k.threads):
            number = self.thread + first
            there = number.compare("lt", self.rows * each) if self.rows * each - first < self.k.threads else None
            made.append((number, number // each, number % each, there))
        return made

    def fetch(self, tile: Expr) -> None:
        """Starts the copies of a tile's codes and scales; zeros from `end` on."""
        k = self.k
        for number, row, piece, there in self._pieces():
            position = tile * self.rows + row
            source = (self.first + position.min(self.end - 1).max(0)) * self.words + piece * WORDS
            inside = position.compare("lt", self.end)
            for memory, codes in zip(self.raw, self.codes, strict=True):
                if there is None:
                    k.async_copy(memory, number * WORDS, codes, source, inside)
                else:
                    with k.when(there):
                        k.async_copy(memory, number * WORDS, codes, source, inside)
        with k.when(self.thread.compare("lt", self.rows // SCALES)):
            position = tile * self.rows + self.thread * SCALES
            source = self.first + position.min((self.end - 1).max(0) // SCALES * SCALES)
            for memory, scales in zip(self.held_scales, self.scales, strict=True):
                at = self._scale_place(tile, self.thread * SCALES)
                k.async_copy(memory, at, scales, source, position.compare("lt", self.end))
        k.async_commit()

    def arrive(self, tile: Expr) -> None:
        """As of `KvTiles`; the codes become numbers meanwhile."""
        k = self.k
        k.async_wait(0)
        k.barrier()  # all have read the numbers of the tile before
        for number, row, piece, there in self._pieces():
            for raw, memory in zip(self.raw, self.memories, strict=True):
                if there is None:
                    self._unpack(raw, memory, number, row, piece)
                else:
                    with k.when(there):
                        self._unpack(raw, memory, number, row, piece)
        k.barrier()

    def _unpack(self, raw: Buffer, memory: Buffer, number: Expr, row: Expr, piece: Expr) -> None:
        """16 bytes of codes become pieces of 8 numbers. Threads whose pieces share banks store them in another turn."""
        k, count = self.k, 16 // self.planes.bits
        words = raw.load(number * WORDS, WORDS)
        if self.planes.bits == 8:
            fours = [from_bytes(k, words.extract(i)) for i in range(WORDS)]
            numbers = [k.join(fours[i], fours[i + 1]) for i in (0, 2)]
        else:
            numbers = [k.join(*(from_nibbles(k, words.extract(i), pair) for pair in range(4))) for i in range(WORDS)]
        apart = PIECE // count  # so many of these fill all banks
        turned = (piece // apart % 2).compare("eq", 1) if self.words // WORDS > apart else None
        for i in range(count):
            other = i ^ (count // 2)
            at = k.index(i) if turned is None else k.select(turned, k.index_value(other), k.index_value(i))
            value = numbers[i] if turned is None else k.select(turned, numbers[other], numbers[i])
            memory.store(self._place(k.index(0), row, piece * count + at), value)

    def scaled(self, scores: list[Expr], tile: Expr, first: Expr | int) -> list[Expr]:
        """Scores of positions from `first` on under the scales of their keys."""
        return [s * scale for s, scale in zip(scores, self._scales(0, len(scores), tile, first), strict=True)]

    def weighted(self, weights: list[Expr], tile: Expr, first: Expr | int) -> list[Expr]:
        """Weights times the scales of values, as left factors. Where nothing lies, the weight is 0 and a scale may be
        anything: it is kept within what scales are."""
        scales = [s.max(0.0).min(LARGEST_SCALE) for s in self._scales(1, len(weights), tile, first)]
        return super().weighted([w * s for w, s in zip(weights, scales, strict=True)], tile, first)

    def _scales(self, plane: int, count: int, tile: Expr, first: Expr | int) -> list[Expr]:
        """For every 8 positions the scales at the places of a fragment."""
        k, made = self.k, []
        for number in range(count):
            at = self._scale_place(tile, k.index(first) + (8 * number + self.lane % 4 * 2))
            pair = self.held_scales[plane].load(at, 2).cast(F32)
            made.append(k.join(pair, pair))
        return made

    def _scale_place(self, tile: Expr, row: Expr) -> Expr:
        return tile % 2 * self.rows + row


class RingTiles(KvTiles):
    """Tiles of the newest positions, in bf16, in the memory of `tiles`. They are few and not copied ahead."""

    stages = 1

    def __init__(self, tiles: PackedTiles, buffers: list[Buffer], line: Expr) -> None:
        self.k, self.rows, self.width, self.end = tiles.k, tiles.rows, tiles.width, tiles.end
        self.sources, self.memories = (buffers[0], buffers[1]), tiles.memories
        self.ring = tiles.planes.ring
        self.base = line * (self.ring * self.width)
        self.lane, self.thread = tiles.lane, tiles.thread

    def fetch(self, tile: Expr) -> None:
        """Nothing: see `arrive`."""

    def arrive(self, tile: Expr) -> None:
        self.k.barrier()  # all have read the tile before
        self.copy(tile, lambda position: position % self.ring)
        self.k.async_wait(0)
        self.k.barrier()


def tiles_of(
    k: GridBuilder, cache: KvPlanes, buffers: list[Buffer], rows: int, line: Expr, ctx: Expr, end: Expr
) -> KvTiles:
    """The tiles of one line of a cache, in whatever format."""
    if cache.bits:
        return PackedTiles(k, cache, buffers, rows, line, ctx, end)
    return KvTiles(k, (buffers[0], buffers[1]), rows, cache.stored, line * ctx * cache.stored, end)


def ring_of(tiles: KvTiles, buffers: list[Buffer], line: Expr) -> RingTiles:
    """The tiles of the newest positions of a cache that keeps them as they came."""
    assert isinstance(tiles, PackedTiles)
    return RingTiles(tiles, buffers[4:6], line)
