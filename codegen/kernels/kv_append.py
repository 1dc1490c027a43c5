"""Storing keys and values in the KV cache of one layer, whatever its format.

`FloatWriter` stores columns as they come. `CodeWriter` collects a row, rotates it, stores it in bf16 in the ring where
there is one, and as codes with a scale (`ir.kv_low_bit`, step by step). Keys that share scales over a group of
positions are packed from the ring, when all of the step are in it.
"""

from __future__ import annotations

from codegen.kernels.hadamard import rotate_stored
from codegen.kernels.kv_layout import BLOCK, CodeBlocks, FloatBlocks, KVLayout
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import F16, F32, I32, U8
from ir.kv_low_bit import LARGEST_SCALE, SMALLEST_SCALE
from ir.types import ScalarType, VectorType

LANES = 16


class FloatWriter:
    """Writes the key and the value of one position and head, some columns at a time."""

    def __init__(self, k: KernelBuilder, kv: KVLayout, dim: int, cache: Buffer, ctx: Expr) -> None:
        assert isinstance(kv.blocks, FloatBlocks)
        self.kv, self.blocks, self.cache, self.ctx = kv, kv.blocks, cache, ctx

    def begin(self, slot: Expr, head: Expr, position: Expr) -> None:
        """The position and head that the next columns belong to."""
        self.block = self.kv.block_of(self.kv.head(self.cache, slot, head, self.ctx), position)
        self.inside = position % BLOCK

    def key(self, column: Expr, value: Expr) -> None:
        """Lanes `column`.. of the key."""
        self.blocks.store_key(self.block, self.inside, column, value)

    def value(self, column: Expr, value: Expr) -> None:
        """Lanes `column`.. of the value."""
        self.blocks.store_value(self.block, self.inside, column, value)

    def end(self) -> None:
        """Key and value are complete."""


class CodeWriter:
    """The same for a low-bit cache."""

    def __init__(self, k: KernelBuilder, kv: KVLayout, dim: int, cache: Buffer, ctx: Expr) -> None:
        assert isinstance(kv.blocks, CodeBlocks)
        self.k, self.kv, self.blocks, self.dim, self.cache, self.ctx = k, kv, kv.blocks, dim, cache, ctx
        self.rows = [k.scratch(kv.dim, F32) for _ in range(2)]  # key, value
        self.bytes = k.scratch(kv.dim, U8)

    def begin(self, slot: Expr, head: Expr, position: Expr) -> None:
        """The position and head that the next columns belong to."""
        self.head, self.position = self.kv.head(self.cache, slot, head, self.ctx), position
        self.inside = position % BLOCK

    def key(self, column: Expr, value: Expr) -> None:
        """Lanes `column`.. of the key."""
        self.rows[0].store(column, value)

    def value(self, column: Expr, value: Expr) -> None:
        """Lanes `column`.. of the value."""
        self.rows[1].store(column, value)

    def end(self) -> None:
        """Packs and stores the row."""
        k, kv, blocks = self.k, self.kv, self.blocks
        for row in self.rows:
            if kv.rotate:
                rotate_stored(k, row, self.dim, kv.rotate)
            for column in range(self.dim, kv.dim):  # padding must move neither the largest nor the lowest number
                row.store(column, row.load(0))
        if kv.recent:
            ring = kv.ring_of(self.head, self.position, self.ctx)
            with k.loop(0, kv.dim, LANES) as loop:
                kv.ring.store_key(ring, self.inside, loop.i, self.rows[0].load(loop.i, LANES))
                kv.ring.store_value(ring, self.inside, loop.i, self.rows[1].load(loop.i, LANES))
        block = kv.block_of(self.head, self.position)
        if not blocks.key_group:
            self._store_key(block)
        self._store_value(block)

    def _store_key(self, block: Buffer) -> None:
        k, blocks = self.k, self.blocks
        levels, scale, _ = self._levels(self.rows[0])
        block.view(F16).store(self.inside + blocks.key_scales // 2, scale.cast(F16))
        for i, level in enumerate(levels):
            self.bytes.store(i * LANES, (level + blocks.offset).cast(U8))
        quads, words = self.bytes.view(I32), block.view(I32)
        with k.loop(0, blocks.dim // 4 // blocks.fields) as loop:
            word = quads.load(loop.i * blocks.fields)
            for field in range(1, blocks.fields):
                word = word | quads.load(loop.i * blocks.fields + field).shifted_left(field * blocks.bits)
            words.store(loop.i * BLOCK + self.inside, word)

    def _store_value(self, block: Buffer) -> None:
        blocks, fields = self.blocks, self.blocks.fields
        levels, scale, low = self._levels(self.rows[1])
        halves = block.view(F16)
        halves.store(self.inside + blocks.value_scales // 2, scale.cast(F16))
        if low is not None:
            halves.store(self.inside + (blocks.value_scales // 2 + BLOCK), low.cast(F16))
        place = self.inside // 4 * (4 * LANES) + self.inside % 4 + blocks.values
        for group in range(blocks.dim // LANES // fields):
            codes = levels[group * fields]
            if fields > 1:
                codes = codes + blocks.offset
                for field in range(1, fields):
                    other = levels[group * fields + field] + blocks.offset
                    codes = codes | other.shifted_left(field * blocks.bits)
            stored = codes.cast(U8)
            for lane in range(LANES):
                block.store(place + (group * BLOCK * LANES + lane * 4), stored.extract(lane))

    def _levels(self, row: Buffer) -> tuple[list[Expr], Expr, Expr | None]:
        """(i32 levels of every 16 columns, scale, lowest value or None) of a row."""
        k, blocks = self.k, self.blocks
        parts = [row.load(column, LANES) for column in range(0, blocks.dim, LANES)]
        if blocks.signed:
            extent = _largest([x.max(0.0 - x) for x in parts]).reduce("max")
            scale, low = scale_for(k, extent, blocks.largest), None
        else:
            lowest = 0.0 - _largest([0.0 - x for x in parts]).reduce("max")
            low = lowest.max(-LARGEST_SCALE).min(LARGEST_SCALE).cast(F16).cast(F32)
            scale = scale_for(k, (_largest(parts).reduce("max") - low).max(0.0), blocks.largest)
        inverse = 1.0 / scale
        if low is not None:
            parts = [x - low for x in parts]
        smallest = float(-blocks.largest if blocks.signed else 0)
        rounded = [k.round(x * inverse).max(smallest).min(float(blocks.largest)) for x in parts]
        return [x.cast(I32) for x in rounded], scale, low


class GroupPacker:
    """Packs the keys of groups of positions from the ring."""

    def __init__(self, k: KernelBuilder, kv: KVLayout, cache: Buffer, ctx: Expr) -> None:
        assert isinstance(kv.blocks, CodeBlocks)
        self.k, self.kv, self.blocks, self.cache, self.ctx = k, kv, kv.blocks, cache, ctx

    def pack(self, slot: Expr, head: Expr, position: Expr) -> None:
        """Packs the group that `position` ends, if it ends one."""
        k, group = self.k, self.blocks.key_group
        with k.when((position % group).compare("eq", group - 1)):
            blocks = self.kv.head(self.cache, slot, head, self.ctx)
            first = position - (group - 1)
            rings = [self.kv.ring_of(blocks, first + i, self.ctx).view(I32) for i in range(0, group, BLOCK)]
            packed = [self.kv.block_of(blocks, first + i) for i in range(0, group, BLOCK)]
            with k.loop(0, self.blocks.dim // 16) as loop:
                self._sixteen_columns(rings, packed, loop.i)

    def _sixteen_columns(self, rings: list[Buffer], packed: list[Buffer], number: Expr) -> None:
        """Columns 16 * number .. + 16 of the whole group: a word of 16 codes for each position."""
        k, blocks = self.k, self.blocks
        words = [k.constant(VectorType(BLOCK, I32), 0) for _ in packed]
        for pair in range(8):
            both = [ring.load((number * 8 + pair) * BLOCK, BLOCK) for ring in rings]  # bf16 of two columns
            for odd in range(2):
                column = 2 * pair + odd
                halves = [x & -65536 if odd else x.shifted_left(16) for x in both]
                numbers = [x.bitcast(VectorType(BLOCK, F32)) for x in halves]
                lowest = 0.0 - _largest([0.0 - x for x in numbers]).reduce("max")
                low = lowest.max(-LARGEST_SCALE).min(LARGEST_SCALE).cast(F16).cast(F32)
                extent = _largest(numbers).reduce("max") - low
                scale = scale_for(k, extent.max(0.0), blocks.largest)
                inverse = 1.0 / scale
                for i, x in enumerate(numbers):
                    level = k.round((x - low) * inverse).max(0.0).min(float(blocks.largest)).cast(I32)
                    shift = 8 * (column % 4) + blocks.bits * (column // 4)
                    words[i] = words[i] | (level.shifted_left(shift) if shift else level)
                at = number * 16 + (blocks.key_scales // 2 + column)
                for block, parameter in zip(packed, (scale, low), strict=True):
                    block.view(F16).store(at, parameter.cast(F16))
        for block, word in zip(packed, words, strict=True):
            block.view(I32).store(number * BLOCK, word)


def scale_for(k: KernelBuilder, extent: Expr, levels: int) -> Expr:
    """`ir.kv_low_bit.scale_for` of a scalar: an f32 that f16 holds."""
    wanted = (extent * (1 / levels)).max(SMALLEST_SCALE).min(LARGEST_SCALE)
    return ((wanted.bitcast(ScalarType(I32)) + 0x1FFF) & ~0x1FFF).bitcast(ScalarType(F32))


def _largest(parts: list[Expr]) -> Expr:
    largest = parts[0]
    for other in parts[1:]:
        largest = largest.max(other)
    return largest


def kv_writer(k: KernelBuilder, kv: KVLayout, dim: int, cache: Buffer, ctx: Expr) -> FloatWriter | CodeWriter:
    """The writer for a layout; heads are `dim` wide."""
    return (FloatWriter if isinstance(kv.blocks, FloatBlocks) else CodeWriter)(k, kv, dim, cache, ctx)
