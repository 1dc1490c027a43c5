"""The two kinds of inner product that matrix kernels are made of, behind one interface.

A `Product` says how a matrix is addressed, how rows of activations are prepared and how a tile of rows and registers
is summed: `PlainProduct` for weights of bf16 and f32, `PackedProduct` for low-bit weights.
"""

from __future__ import annotations

from typing import Protocol

from codegen.kernels.activations import RowSource, quantize_rows, write_rows
from codegen.kernels.call import Temporary
from codegen.kernels.decode import WeightDecoder
from codegen.kernels.micro import LANES, StripMatrix, TileShape, multiply_rows
from codegen.kernels.packed import Activations, Ahead, multiply_packed, segment_of
from codegen.packed_strips import PackedStrips
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import BF16, F32, I8, I32, U8, GroupedIntFormat, NumberFormat, PlainFormat
from ir.types import Dim, Layout, TensorType
from passes.analysis.value_types import tensor_type

PACKS: dict[NumberFormat, int] = {BF16: 2, F32: 1}  # pairs for `tile.dot2`, single numbers for `tile.fma`
PIECES = 4  # of a row, for threads that have none of their own
INT8_PACK = 4  # bytes for `tile.dot4`
APART = 64  # bytes behind a row of int8: rows at multiples of 2 KiB cannot be loaded from two at a time


class Product(Protocol):
    """y[row, 16 * vectors of a strip] for rows of activations and strips of one matrix."""

    layout: Layout
    strips: int
    vectors: int  # registers across a strip
    strip_bytes: int
    matrix_size: int  # of one matrix, in elements of the buffer of weights
    weight_element: PlainFormat  # of that buffer
    one_stream: bool  # whether the strips of a gate | up pair are read one after the other

    def temporaries(self, rows: Dim) -> list[Temporary]:
        """Arena memory that prepared rows take."""
        ...

    def prepare(self, k: KernelBuilder, source: RowSource, memory: list[Buffer], rows: Expr, few: bool) -> None:
        """Writes `rows` rows of the source into `memory`; `few` of them, maybe fewer than threads."""
        ...

    def use_rows(self, memory: list[Buffer]) -> None:
        """Rows are read from `memory` from here on."""
        ...

    def use_matrix(self, k: KernelBuilder, weights: Buffer) -> None:
        """Strips are read from the matrix at the beginning of `weights` from here on."""
        ...

    def strip(self, number: Expr) -> Buffer:
        """The strip of that number."""
        ...

    def widest(self, count: int) -> int:
        """Registers of outputs that a tile of `count` rows may have."""
        ...

    def sums(
        self, k: KernelBuilder, rows: list[Expr], vectors: list[tuple[Buffer, int]], ahead: Ahead | None = None
    ) -> list[list[Expr]]:
        """f32 sums [len(rows)][len(vectors)] of 16 lanes; a vector is a strip and the number of its register.

        `ahead`: what to ask memory for meanwhile.
        """
        ...

    @property
    def tile_rows(self) -> int:
        """Rows of a full tile."""
        ...


class PlainProduct:
    """Weights of machine numbers, in the element of the activations."""

    one_stream = False

    def __init__(self, matrix: StripMatrix, shape: TileShape) -> None:
        self.matrix, self.shape = matrix, shape
        self.layout, self.strips, self.vectors = matrix.layout, matrix.strips, matrix.vectors
        self.strip_bytes = matrix.strip_elements * (matrix.element.bits // 8)
        self.matrix_size, self.weight_element = matrix.elements, matrix.element

    def temporaries(self, rows: Dim) -> list[Temporary]:
        return [Temporary(TensorType((rows, self.matrix.stored_k), self.matrix.element))]

    def prepare(self, k: KernelBuilder, source: RowSource, memory: list[Buffer], rows: Expr, few: bool) -> None:
        write_rows(k, source, memory[0], self.matrix.stored_k, rows)

    def use_rows(self, memory: list[Buffer]) -> None:
        self.x = memory[0]

    def use_matrix(self, k: KernelBuilder, weights: Buffer) -> None:
        self.weights = weights

    def strip(self, number: Expr) -> Buffer:
        return self.weights.at(number * self.matrix.strip_elements)

    def widest(self, count: int) -> int:
        return self.shape.vectors

    def sums(
        self, k: KernelBuilder, rows: list[Expr], vectors: list[tuple[Buffer, int]], ahead: Ahead | None = None
    ) -> list[list[Expr]]:
        places = [(self.x, row * self.matrix.stored_k) for row in rows]
        return multiply_rows(k, places, vectors, self.matrix, self.shape)

    @property
    def tile_rows(self) -> int:
        return self.shape.rows


class PackedProduct:
    """Low-bit weights with int8, bf16 or f32 activations. A tile has half the sums of a plain one: each takes two
    registers, one for the segment and one for the row."""

    one_stream = True

    def __init__(self, matrix: PackedStrips, x: NumberFormat, shape: TileShape) -> None:
        self.matrix, self.shape = matrix, shape
        self.layout, self.strips, self.vectors = matrix.layout, matrix.strips, matrix.vectors
        self.strip_bytes = matrix.strip_bytes
        self.matrix_size, self.weight_element = matrix.matrix_bytes, U8
        self.group = x.group if isinstance(x, GroupedIntFormat) else 0
        self.integer = isinstance(x, GroupedIntFormat)
        self.element = I8 if self.integer else x
        self.segment = segment_of(matrix, self.group, self.integer)
        self.pitch = matrix.stored_k + APART * self.integer
        self.most = max(1, shape.rows * shape.vectors // 2)

    def temporaries(self, rows: Dim) -> list[Temporary]:
        k = self.matrix.stored_k
        assert isinstance(self.element, PlainFormat)
        values = Temporary(TensorType((rows, self.pitch), self.element))
        if not self.integer:
            return [values]
        scales = Temporary(TensorType((rows, k // (self.group or k)), F32))
        return [values, scales, Temporary(TensorType((rows, k // self.segment), I32))]

    def prepare(self, k: KernelBuilder, source: RowSource, memory: list[Buffer], rows: Expr, few: bool) -> None:
        stored = self.matrix.stored_k
        if not self.integer:
            write_rows(k, source, memory[0], stored, rows)
            return
        factor = 1 if self.matrix.has_zeros else -WeightDecoder.bias_of(self.matrix)
        pieces = PIECES if few else 1
        quantize_rows(k, source, self._activations(memory), self.segment, factor, stored, rows, pieces)

    def use_rows(self, memory: list[Buffer]) -> None:
        self.x = self._activations(memory)

    def _activations(self, memory: list[Buffer]) -> Activations:
        if not self.integer:
            return Activations(memory[0])
        return Activations(*memory, group=self.group, pitch=self.pitch)

    def use_matrix(self, k: KernelBuilder, weights: Buffer) -> None:
        self.decoder = WeightDecoder(k, self.matrix, weights if self.matrix.learned else None)
        self.weights = weights.at(self.matrix.table_bytes)

    def strip(self, number: Expr) -> Buffer:
        return self.weights.at(number * self.matrix.strip_bytes)

    def widest(self, count: int) -> int:
        return max(1, self.most // count)

    def sums(
        self, k: KernelBuilder, rows: list[Expr], vectors: list[tuple[Buffer, int]], ahead: Ahead | None = None
    ) -> list[list[Expr]]:
        return multiply_packed(k, self.x, rows, vectors, self.matrix, self.decoder, ahead)

    @property
    def tile_rows(self) -> int:
        return min(self.shape.rows, self.most)


def product_of(w: Value, x: Value, op: Op, shape: TileShape) -> Product:
    """The product for weights `w` and activations `x`; a diagnostic where there is no kernel."""
    type, element = tensor_type(w), tensor_type(x).element
    n, k = type.shape[-2:]
    assert isinstance(n, int) and isinstance(k, int)
    pack = INT8_PACK if isinstance(element, GroupedIntFormat) else PACKS.get(element)
    message = _refusal(type, element, pack, op)
    if message:
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    assert type.layout is not None
    if isinstance(type.element, PlainFormat):
        return PlainProduct(StripMatrix(n, k, type.layout, type.element), shape)
    return PackedProduct(PackedStrips.of(type), element, shape)


def _refusal(w: TensorType, x: NumberFormat, pack: int | None, op: Op) -> str:
    """Why there is no kernel; "" when there is."""
    if w.layout is None:
        return f"weight of type {w} has no layout; run choose-layouts before lower-to-tile"
    if w.layout.rows % LANES:
        return f"kernels take strips of a multiple of {LANES} rows, got {w.layout}"
    if isinstance(x, GroupedIntFormat):
        if x.bits != 8 or x.zero_point or x.scale != F32 or x.group % 32:
            return f"no matrix kernel for activations of {x}; have q8_sym<group=row or multiples of 32, scale=f32>"
        if isinstance(w.element, PlainFormat):
            return f"'{op.name}' has int8 activations and {w.element} weights; quantize the weights too"
    elif pack is None:
        return f"no matrix kernel on CPUs for activations of {x}; have bf16, f32 and q8_sym"
    if isinstance(w.element, PlainFormat) and w.element != x:
        return f"'{op.name}' has {x} activations and {w.element} weights; set-precision makes them agree"
    if w.layout.pack != pack:
        return (
            f"no matrix kernel for weights of {w.element} in {w.layout} with activations of {x}; it takes pack={pack}"
        )
    return ""
