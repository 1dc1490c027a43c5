"""Types of values. Frozen, compared by structure, printed as text that parses back.

Graph level: `TensorType`, `KVCacheType`. Plan level: `HandleType`. Tile level: `IndexType`, `ScalarType`,
`VectorType`, `BufferType`.
The element of a tensor is a number format (`ir.formats`); where its elements lie in memory is a `Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ir.formats import GroupedIntFormat, NumberFormat, PlainFormat


@dataclass(frozen=True)
class SymbolicDim:
    """A size known only when the program runs: `scale * name`, e.g. `tokens`, `tokens*8`. Never "unknown"."""

    name: str
    scale: int = 1

    def __str__(self) -> str:
        return self.name if self.scale == 1 else f"{self.name}*{self.scale}"

    def __mul__(self, factor: int) -> SymbolicDim:
        return SymbolicDim(self.name, self.scale * factor)


Dim = int | SymbolicDim


@dataclass(frozen=True)
class Type:
    """Base of all types; `str()` is the text form."""


@dataclass(frozen=True)
class Layout:
    """How a weight matrix [n, k] lies in memory: strips of `rows` rows; inside it `pack` consecutive k of each row.

    Element (r, c) of strip s is at `((s * K/pack + c // pack) * rows + r % rows) * pack + c % pack` with
    s = r // rows. Both n and k are padded by zeros to whole strips. `interleave` = 2 alternates strips of the first
    and the second half of the rows (gate | up), so that a kernel meets both halves of a pair in one tile. `lanes` = 32
    puts the elements of 16 rows and `pack` columns into the order in which the lanes of a GPU's warp want them
    (`codegen.nvptx.fragments`). Text: `strips<rows=64, pack=2>`.
    """

    rows: int
    pack: int = 1
    interleave: int = 1
    lanes: int = 1

    def __str__(self) -> str:
        extra = f", interleave={self.interleave}" if self.interleave != 1 else ""
        extra += f", lanes={self.lanes}" if self.lanes != 1 else ""
        return f"strips<rows={self.rows}, pack={self.pack}{extra}>"

    def padded(self, n: int, k: int) -> tuple[int, int]:
        """(rows, columns) stored for an [n, k] matrix, zero padding included."""
        unit = self.rows * self.interleave
        return -(-n // unit) * unit, -(-k // self.pack) * self.pack


@dataclass(frozen=True)
class TensorType(Type):
    """`tensor<tokens x 2048 x f32>`; a weight with a layout: `tensor<2048 x 512 x bf16, strips<rows=64, pack=2>>`."""

    shape: tuple[Dim, ...]
    element: NumberFormat
    layout: Layout | None = None

    def __str__(self) -> str:
        body = " x ".join([*(str(d) for d in self.shape), str(self.element)])
        return f"tensor<{body}, {self.layout}>" if self.layout else f"tensor<{body}>"

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def static(self) -> bool:
        """True when every dimension is a number."""
        return all(isinstance(d, int) for d in self.shape)

    def with_shape(self, *shape: Dim) -> TensorType:
        return TensorType(tuple(shape), self.element)

    def with_element(self, element: NumberFormat) -> TensorType:
        return TensorType(self.shape, element, self.layout)


@dataclass(frozen=True)
class KVCacheType(Type):
    """The keys and values of one layer for every sequence slot: `kv<4 x 64 x bf16>` (kv heads, head width, format).

    Logically two arrays [slots, ctx, num_kv_heads, head_dim]; `slots` and `ctx` belong to the run, not to the type.
    The rest is how a low-bit cache is kept (docs/kv_cache.md):
    - `rotate`: keys and values are stored times an orthonormal Hadamard matrix in blocks of this many columns, 0 = as
      they are. What is read is rotated back;
    - `recent`: a row reads at least this many positions up to its own in bf16, 0 = everything in the element;
    - `key_group`: keys share scale and zero point by column over this many positions, 0 = by position and head.

    Text: `kv<4 x 64 x q4_sym<group=row, scale=f16>, rotate=64, recent=16>`.
    """

    num_kv_heads: int
    head_dim: int
    element: NumberFormat
    rotate: int = 0
    recent: int = 0
    key_group: int = 0

    def __str__(self) -> str:
        return f"kv<{self.num_kv_heads} x {self.head_dim} x {self.format_text}>"

    @property
    def format_text(self) -> str:
        """How a number is kept: the part of the text form behind the sizes."""
        options = [f"{name}={getattr(self, name)}" for name in KV_OPTIONS if getattr(self, name)]
        return ", ".join([str(self.element), *options])

    @property
    def low_bit(self) -> bool:
        """Whether positions are kept as codes and scales."""
        return not isinstance(self.element, PlainFormat)

    @property
    def fault(self) -> str:
        """What is wrong with the fields, for a diagnostic; "" when nothing is."""
        element = self.element
        if isinstance(element, PlainFormat):
            return "" if not (self.rotate or self.recent or self.key_group) else f"{element} takes no options"
        if not isinstance(element, GroupedIntFormat) or element.group or element.bits not in (2, 4, 8):
            return f"expected f32, bf16, f16 or integers of 2, 4 or 8 bits with group=row, got {element}"
        if self.rotate and (self.rotate & (self.rotate - 1) or self.head_dim % self.rotate):
            return f"expected rotate to be a power of two that divides {self.head_dim}, got {self.rotate}"
        if self.recent % KV_BLOCK or self.key_group % KV_BLOCK:
            return f"expected recent and key_group to be multiples of {KV_BLOCK}, got {self.recent}, {self.key_group}"
        if self.key_group and not self.recent:
            return "expected recent > 0 with key_group: the positions of an unfinished group are read in bf16"
        return ""

    def recent_start(self, position: int) -> int:
        """The first position that a row at `position` reads in bf16; what lies before is read as codes.

        It depends on nothing but the row's position, so a token means the same in a prompt chunk and alone.
        """
        unit = self.key_group or KV_BLOCK
        return max(0, position + 1 - self.recent) // unit * unit if self.recent else position + 1


KV_BLOCK = 16  # positions that are kept together
KV_OPTIONS = ("rotate", "recent", "key_group")


@dataclass(frozen=True)
class IndexType(Type):
    """A 64-bit signed integer used for addresses, sizes and loop counters."""

    def __str__(self) -> str:
        return "index"


@dataclass(frozen=True)
class ScalarType(Type):
    """One number in a register: `f32`, `i32`, `i1`."""

    element: NumberFormat

    def __str__(self) -> str:
        return str(self.element)


@dataclass(frozen=True)
class VectorType(Type):
    """`vector<16 x f32>`: a register of `lanes` numbers."""

    lanes: int
    element: NumberFormat

    def __str__(self) -> str:
        return f"vector<{self.lanes} x {self.element}>"


@dataclass(frozen=True)
class BufferType(Type):
    """`buffer<f32>`: a one-dimensional run of numbers in memory, indexed by element.

    `space` is "global" (weights, arena, KV cache, step inputs), "shared" (a block's, on GPUs) or "private" (scratch of
    one thread).
    """

    element: NumberFormat
    space: str = "global"

    def __str__(self) -> str:
        return f"buffer<{self.element}>" if self.space == "global" else f"buffer<{self.element}, {self.space}>"


INDEX = IndexType()


@dataclass(frozen=True)
class HandleType(Type):
    """What plan-level ops of streaming hand to each other: `segment`, `slot` or `token` (`ir.ops.plan_stream`)."""

    kind: str

    def __str__(self) -> str:
        return self.kind


SEGMENT, SLOT, TOKEN = HandleType("segment"), HandleType("slot"), HandleType("token")
HANDLES = {type.kind: type for type in (SEGMENT, SLOT, TOKEN)}
