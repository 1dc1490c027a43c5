"""Where keys and values of a layer lie on a GPU: some planes, each [slots, kv heads, positions, a row].

    keys, values                a position's numbers: bf16, f16, or codes of 8 or 4 bits in words of i32
    key_scales, value_scales    f16, of codes: one for each position
    recent_keys, recent_values  bf16, where the newest positions are read as they came: a ring, position p at p mod its
                                length, as docs/kv_cache.md says of the CPU's

Rows are padded to 16 columns. A word has the codes of 32 / bits neighbouring columns, in the order in which
`codegen.nvptx.kernels.weight_factors` takes them apart. Codes and scales mean what `ir.kv_low_bit` says; where they lie
is not as on CPUs, whose blocks of 16 positions are for another inner product.
"""

from __future__ import annotations

from dataclasses import dataclass

from codegen.kernels.kv_layout import MAX_STEP_TOKENS
from codegen.tile_builder import Expr
from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, I32, GroupedIntFormat, PlainFormat
from ir.types import KV_BLOCK, KVCacheType

MOST_PACKED = 128  # columns of a head in low bits


@dataclass(frozen=True)
class Plane:
    """One plane: elements of a position, and positions where it is a ring (0: as many as the cache has)."""

    name: str
    element: PlainFormat
    row: int
    positions: int = 0

    @property
    def row_bytes(self) -> int:
        """Bytes of a position of one head."""
        return self.row * self.element.dtype.itemsize


@dataclass(frozen=True)
class KvPlanes:
    """The planes of a cache. `bits` is 0 where numbers lie as `element`."""

    heads: int
    width: int
    element: PlainFormat
    bits: int = 0
    rotate: int = 0
    recent: int = 0

    @classmethod
    def of(cls, cache: KVCacheType) -> KvPlanes:
        """Raises DiagnosticError for formats that have no kernels on GPUs."""
        element = cache.element
        if element in (BF16, F16):
            assert isinstance(element, PlainFormat)
            return cls(cache.num_kv_heads, cache.head_dim, element)
        refused = DiagnosticError(
            f"no KV cache of {cache.format_text} on GPUs",
            expected="bf16, f16, or q8_sym or q4_sym with group=row and scale=f16",
        )
        if not isinstance(element, GroupedIntFormat) or cache.fault or cache.key_group:
            raise refused
        if element.bits not in (4, 8) or element.zero_point or element.scale != F16:
            raise refused
        made = cls(cache.num_kv_heads, cache.head_dim, BF16, element.bits, cache.rotate, cache.recent)
        if made.width > MOST_PACKED:
            message = f"no KV cache of heads of {made.width} in {made.bits} bits on GPUs"
            raise DiagnosticError(message, expected=f"at most {MOST_PACKED} columns, or a cache in bf16 or f16")
        half, each = made.width // 2, 32 // made.bits
        if half % each or made.stored % (128 // made.bits):
            message = f"no KV cache of heads of {made.width} in {made.bits} bits on GPUs"
            raise DiagnosticError(message, expected=f"a multiple of {128 // made.bits} columns")
        if made.rotate and half & (half - 1):
            raise DiagnosticError(f"no rotated KV cache of heads of {made.width} on GPUs", expected="a power of two")
        return made

    @property
    def stored(self) -> int:
        """Columns of a row with what it is padded by."""
        return -(-self.width // 16) * 16

    def recent_start(self, position: Expr) -> Expr:
        """The first position that a row at `position` reads as it came (`KVCacheType.recent_start`)."""
        return (position - (self.recent - 1)).max(0) // KV_BLOCK * KV_BLOCK

    @property
    def ring(self) -> int:
        """Positions of the ring: what the oldest token of a step reads, and all that the step stores."""
        return MAX_STEP_TOKENS + self.recent + KV_BLOCK if self.recent else 0

    @property
    def planes(self) -> tuple[Plane, ...]:
        """In the order of kernel arguments."""
        if not self.bits:
            return tuple(Plane(name, self.element, self.stored) for name in ("keys", "values"))
        words = self.stored * self.bits // 32
        made = [Plane(name, I32, words) for name in ("keys", "values")]
        made += [Plane(name, F16, 1) for name in ("key_scales", "value_scales")]
        if self.recent:
            made += [Plane(name, BF16, self.stored, self.ring) for name in ("recent_keys", "recent_values")]
        return tuple(made)
