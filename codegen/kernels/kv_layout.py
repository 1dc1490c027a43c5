"""Where keys and values lie in the KV cache of one layer.

Slots, then kv heads, then blocks of 16 positions; a block holds its keys, then its values. Both are stored as the
matrix kernels want their weights, so that attention is the same inner product:

    keys    [d / pack][16 positions][pack]        scores = q . K^T: positions are the output columns
    values  [d / 16][16 / pack][16 columns][pack] out = p . V: positions are summed over

`pack` is 2 for bf16 (pairs for `tile.dot2`) and 1 for f32. The width of a head is padded to a multiple of 16.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.tile_builder import Buffer, Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F32, I32, PlainFormat
from ir.types import KVCacheType, Layout, VectorType

BLOCK = 16


@dataclass(frozen=True)
class KVLayout:
    """Addresses inside the cache buffer of one layer, in elements."""

    heads: int
    dim: int  # stored width, a multiple of 16
    element: PlainFormat
    block: int = BLOCK

    @classmethod
    def of(cls, cache: KVCacheType) -> KVLayout:
        """The layout of a cache type. Raises DiagnosticError for elements other than bf16 and f32."""
        if cache.element not in (BF16, F32):
            raise DiagnosticError(f"no layout of a KV cache of {cache.element}", expected="bf16 or f32")
        assert isinstance(cache.element, PlainFormat)
        return cls(cache.num_kv_heads, -(-cache.head_dim // 16) * 16, cache.element)

    @property
    def pack(self) -> int:
        return 2 if self.element == BF16 else 1

    @property
    def strips(self) -> Layout:
        """Keys and values of a block as strips of 16 rows."""
        return Layout(16, self.pack)

    @property
    def bytes_per_position(self) -> int:
        """Keys and values of one position, all heads of one layer."""
        return 2 * self.heads * self.dim * (self.element.bits // 8)

    def head_start(self, slot: Expr, head: Expr, ctx: Expr) -> Expr:
        """First element of a slot's head; `ctx` is the capacity in positions."""
        return (slot * self.heads + head) * ctx * (2 * self.dim)

    def block_start(self, slot: Expr, head: Expr, position: Expr, ctx: Expr) -> Expr:
        """First element of the block that holds `position`."""
        return self.head_start(slot, head, ctx) + position // self.block * (self.block * 2 * self.dim)

    def store_key(self, cache: Buffer, block: Expr, inside: Expr, column: Expr, value: Expr) -> None:
        """Stores lanes `column`.. of the key at position `inside` of a block."""
        lanes = value.lanes
        if self.pack == 1:
            for lane in range(lanes):
                cache.store(block + (column + lane) * self.block + inside, value.extract(lane))
            return
        pairs = value.cast(self.element).bitcast(VectorType(lanes // 2, I32))
        words = cache.view(I32)
        for pair in range(lanes // 2):
            words.store(block // 2 + (column // 2 + pair) * self.block + inside, pairs.extract(pair))

    def store_value(self, cache: Buffer, block: Expr, inside: Expr, column: Expr, value: Expr) -> None:
        """Stores lanes `column`.. of the value at position `inside` of a block; they lie in one strip of 16."""
        stored = value.cast(self.element)
        strip = block + self.block * self.dim + column // 16 * (16 * self.block)
        place = strip + inside // self.pack * (16 * self.pack) + column % 16 * self.pack + inside % self.pack
        for lane in range(value.lanes):
            cache.store(place + lane * self.pack, stored.extract(lane))
