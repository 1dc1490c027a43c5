"""Types of values. Frozen, compared by structure, printed as text that parses back.

Graph level: `TensorType`, `KVCacheType`. Tile level: `IndexType`, `ScalarType`, `VectorType`, `BufferType`.
The element of a tensor is a number format (`ir.formats`); where its elements lie in memory is a `Layout`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ir.formats import NumberFormat


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
    and the second half of the rows (gate | up), so that a kernel meets both halves of a pair in one tile.
    Text: `strips<rows=64, pack=2>`.
    """

    rows: int
    pack: int = 1
    interleave: int = 1

    def __str__(self) -> str:
        extra = f", interleave={self.interleave}" if self.interleave != 1 else ""
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
    """

    num_kv_heads: int
    head_dim: int
    element: NumberFormat

    def __str__(self) -> str:
        return f"kv<{self.num_kv_heads} x {self.head_dim} x {self.element}>"


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

    `space` is "global" (weights, arena, KV cache, step inputs) or "private" (one thread's scratch).
    """

    element: NumberFormat
    space: str = "global"

    def __str__(self) -> str:
        return f"buffer<{self.element}>" if self.space == "global" else f"buffer<{self.element}, {self.space}>"


INDEX = IndexType()
