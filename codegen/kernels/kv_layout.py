"""Where keys and values lie in the KV cache of one layer.

Slots, then kv heads, then blocks of 16 positions; a block holds its keys, then its values. Both are stored as the
matrix kernels want their weights, so that attention is the same inner product:

    keys    [d / pack][16 positions][pack]        scores = q . K^T: positions are the output columns
    values  [d / 16][16 / pack][16 columns][pack] out = p . V: positions are summed over

`pack` is 2 for bf16 (pairs for `tile.dot2`) and 1 for f16 and f32. A low-bit block is bytes; a byte holds `fields`
codes, and four bytes side by side are what `tile.dot4` multiplies:

    key codes    [d / 4 / fields][16 positions][4]       field f of byte j of word g: column 4 * (fields * g + f) + j
    key scales   f16 [16]; with key_group f16 [d], in even blocks scales, in odd ones the lowest values
    value codes  [d / 16 / fields][4][16 columns][4]     field f of strip s: strip fields * s + f; byte j: a position
    value scales f16 [16], and lowest values f16 [16] where codes have no sign

The width of a head is padded to a multiple of 16 * fields. Behind the blocks of a head lies its ring: the newest
positions in bf16, position p in block p // 16 modulo the blocks of the ring. See docs/kv_cache.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, I32, U8, GroupedIntFormat, PlainFormat
from ir.types import KV_BLOCK, KVCacheType, VectorType

BLOCK = KV_BLOCK
MAX_STEP_TOKENS = 512  # the most tokens of one step: they are all stored before the first of them reads


@dataclass(frozen=True)
class FloatBlocks:
    """A block of 16 positions of one head, in elements of a float format."""

    dim: int  # stored width, a multiple of 16
    element: PlainFormat

    @property
    def pack(self) -> int:
        return 2 if self.element == BF16 else 1

    @property
    def computed(self) -> PlainFormat:
        """The format of what the elements are multiplied by."""
        return BF16 if self.element == BF16 else F32

    @property
    def size(self) -> int:
        return 2 * BLOCK * self.dim

    @property
    def values(self) -> int:
        """First element of the values."""
        return BLOCK * self.dim

    def store_key(self, block: Buffer, inside: Expr, column: Expr, value: Expr) -> None:
        """Stores lanes `column`.. of the key at position `inside` of a block."""
        lanes = value.lanes
        if self.pack == 1:
            for lane in range(lanes):
                block.store((column + lane) * BLOCK + inside, value.extract(lane).cast(self.element))
            return
        pairs = value.cast(self.element).bitcast(VectorType(lanes // 2, I32))
        words = block.view(I32)
        for pair in range(lanes // 2):
            words.store((column // 2 + pair) * BLOCK + inside, pairs.extract(pair))

    def store_value(self, block: Buffer, inside: Expr, column: Expr, value: Expr) -> None:
        """Stores lanes `column`.. of the value at position `inside` of a block; they lie in one strip of 16."""
        stored = value.cast(self.element)
        strip = column // 16 * (16 * BLOCK) + self.values
        place = strip + inside // self.pack * (16 * self.pack) + column % 16 * self.pack + inside % self.pack
        for lane in range(value.lanes):
            block.store(place + lane * self.pack, stored.extract(lane))


@dataclass(frozen=True)
class CodeBlocks:
    """A block of 16 positions of one head in codes of `bits` bits, in bytes."""

    dim: int  # stored width, a multiple of 16 * fields
    bits: int
    signed: bool  # a code means code - 2**(bits - 1) scales; else code scales above the lowest value
    key_group: int  # positions whose keys share scales by column, 0 = a scale for each position

    @property
    def fields(self) -> int:
        """Codes in a byte."""
        return 8 // self.bits

    @property
    def offset(self) -> int:
        """The code that means 0."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def largest(self) -> int:
        """Steps from 0, or from the lowest value, to the end of the range."""
        return self.offset - 1 if self.signed else (1 << self.bits) - 1

    @property
    def codes(self) -> int:
        """Bytes of the codes of keys, and of values."""
        return BLOCK * self.dim // self.fields

    @property
    def key_scales(self) -> int:
        """First byte of the scales of keys."""
        return self.codes

    @property
    def values(self) -> int:
        """First byte of the codes of values."""
        return self.key_scales + (2 * self.dim if self.key_group else 2 * BLOCK)

    @property
    def value_scales(self) -> int:
        """First byte of the scales of values; the lowest values follow."""
        return self.values + self.codes

    @property
    def size(self) -> int:
        return self.value_scales + 2 * BLOCK * (1 if self.signed else 2)


@dataclass(frozen=True)
class KVLayout:
    """Addresses inside the cache buffer of one layer, in elements of `element` (bytes for low-bit caches)."""

    heads: int
    element: PlainFormat
    blocks: FloatBlocks | CodeBlocks
    format: str
    rotate: int = 0
    recent: int = 0
    block: int = BLOCK

    @classmethod
    def of(cls, cache: KVCacheType) -> KVLayout:
        """The layout of a cache type. Raises DiagnosticError for formats that kernels do not know."""
        element, heads = cache.element, cache.num_kv_heads
        if element in (BF16, F16, F32):
            assert isinstance(element, PlainFormat)
            return cls(heads, element, FloatBlocks(_padded(cache.head_dim, 16), element), cache.format_text)
        expected = "bf16, f16, f32, q8_sym or q4_sym with group=row and scale=f16, or q2_zp with key_group=32"
        refused = DiagnosticError(f"no layout of a KV cache of {cache.format_text}", expected=expected)
        if not isinstance(element, GroupedIntFormat) or cache.fault or element.scale != F16:
            raise refused
        if (element.zero_point, cache.key_group) != ((True, 32) if element.bits == 2 else (False, 0)):
            raise refused
        dim = _padded(cache.head_dim, 16 * (8 // element.bits))
        blocks = CodeBlocks(dim, element.bits, not element.zero_point, cache.key_group)
        return cls(heads, U8, blocks, cache.format_text, cache.rotate, cache.recent)

    @property
    def dim(self) -> int:
        """Stored width of a head."""
        return self.blocks.dim

    @property
    def ring(self) -> FloatBlocks:
        """A block of the ring."""
        return FloatBlocks(self.dim, BF16)

    @property
    def unit(self) -> int:
        """Positions that leave the ring's part of a read at once."""
        return max(BLOCK, self.blocks.key_group) if isinstance(self.blocks, CodeBlocks) else BLOCK

    @property
    def ring_blocks(self) -> int:
        """What the oldest token of a step reads, and all that the step stores."""
        return (MAX_STEP_TOKENS + self.recent + self.unit) // BLOCK if self.recent else 0

    @property
    def bytes_per_position(self) -> int:
        """Keys and values of one position, all heads of one layer, without the ring."""
        return self.heads * self.blocks.size // BLOCK * (self.element.bits // 8)

    @property
    def bytes_per_slot(self) -> int:
        """The rings of one slot, all heads of one layer."""
        return self.heads * self._ring_size

    @property
    def _ring_size(self) -> int:
        return self.ring_blocks * self.ring.size * 2

    def head(self, cache: Buffer, slot: Expr, head: Expr, ctx: Expr) -> Buffer:
        """The blocks of a slot's head; `ctx` is the capacity in positions."""
        size = ctx // self.block * self.blocks.size + self._ring_size
        return cache.at((slot * self.heads + head) * size)

    def block_of(self, head: Buffer, position: Expr) -> Buffer:
        """The block that holds `position`."""
        return head.at(position // self.block * self.blocks.size)

    def ring_of(self, head: Buffer, position: Expr, ctx: Expr) -> Buffer:
        """The block of the ring that holds `position`, in bf16."""
        start = ctx // self.block * self.blocks.size
        return head.at(position // self.block % self.ring_blocks * (self.ring.size * 2) + start).view(BF16)

    def recent_start(self, position: Expr) -> Expr:
        """The first position that a row at `position` reads in the ring (`KVCacheType.recent_start`)."""
        return (position - (self.recent - 1)).max(0) // self.unit * self.unit


def _padded(size: int, unit: int) -> int:
    return -(-size // unit) * unit
