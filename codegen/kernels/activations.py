"""The first phase of a product: rows of activations as the product reads them, [norm] [rotation] [cast or int8].

Rows are shared among the threads and written to arena memory with zeros up to whole blocks. int8 activations are
levels of -127 .. 127, a scale for each group, and for each segment (the columns that share the scales of weights and
activations) the value that its i32 sums begin with.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from codegen.kernels.hadamard import Load, rotate_row
from codegen.kernels.packed import Activations
from codegen.kernels.rowwise import LANES, for_columns, row_scale
from codegen.packed_strips import BLOCK
from codegen.tile_builder import Buffer, Expr, KernelBuilder
from ir.formats import F32, I8, I32
from ir.ops.norm import RmsNormOp

SMALLEST = 1e-30  # a group of smaller activations counts as zeros: 127 / its largest might not be a number
_UNROLLED = 4  # blocks of a segment that are written out


@dataclass(frozen=True)
class RowSource:
    """Rows [rows, width] in memory and what is done to them first."""

    x: Buffer
    width: int
    norm: RmsNormOp | None = None
    gain: Buffer | None = None
    rotation: int = 0  # columns of a Hadamard block, 0 = none

    def reader(self, k: KernelBuilder, row: Expr, scratch: Buffer | None) -> Load:
        """How the columns of a row are read after norm and rotation. `scratch` holds a row, for a rotation."""
        source = self.x.at(row * self.width)

        def load(column: Expr, lanes: int, mask: Expr | None) -> Expr:
            return source.load(column, lanes, mask).cast(F32)

        read = load
        if self.norm is not None and self.gain is not None:
            scale, gain = row_scale(k, load, self.width, self.norm.eps), self.gain

            def normed(column: Expr, lanes: int, mask: Expr | None) -> Expr:
                return load(column, lanes, mask) * scale * gain.load(column, lanes, mask).cast(F32)

            read = normed
        if scratch is None:
            return read
        rotate_row(k, read, scratch, self.width, self.rotation)
        return lambda column, lanes, mask: scratch.load(column, lanes, mask)


def _scratch(k: KernelBuilder, source: RowSource) -> Buffer | None:
    return k.scratch(-(-source.width // LANES) * LANES, F32) if source.rotation else None


def write_rows(k: KernelBuilder, source: RowSource, out: Buffer, stride: int, rows: Expr) -> None:
    """out[r] = the row in the element of `out`, zeros behind it up to `stride` elements."""
    scratch = _scratch(k, source)
    first, last = k.thread_share(rows)
    with k.loop(first, last) as row:
        read, target = source.reader(k, row.i, scratch), out.at(row.i * stride)

        def write(column: Expr, lanes: int, mask: Expr | None, read: Load = read, target: Buffer = target) -> None:
            target.store(column, read(column, lanes, mask).cast(out.element), mask)

        for_columns(k, 0, source.width, write)
        for column in range(source.width, stride):
            target.store(column, k.f32(0.0).cast(out.element))


def quantize_rows(
    k: KernelBuilder,
    source: RowSource,
    out: Activations,
    segment: int,
    start_factor: int,
    stride: int,
    rows: Expr,
    pieces: int = 1,
) -> None:
    """Rows as int8 with their scales, and as start values the sum of each segment times `start_factor`.

    `pieces` of a row, where they divide its groups, are work for different threads; each forms the norm for itself.
    """
    scratch = _scratch(k, source)
    if scratch is not None or (stride // (out.group or stride)) % pieces:
        pieces = 1
    first, last = k.thread_share(rows * pieces)
    with k.loop(first, last) as unit:
        row = unit.i // pieces
        read = source.reader(k, row, scratch)
        quantizer = _RowQuantizer(k, read, source.width, out, segment, start_factor, stride)
        quantizer.part(row, unit.i % pieces, pieces)


class _RowQuantizer:
    """Writes the quantization of one row."""

    def __init__(
        self, k: KernelBuilder, read: Load, width: int, out: Activations, segment: int, factor: int, stride: int
    ) -> None:
        self.k, self.read, self.width, self.out = k, read, width, out
        self.segment, self.factor, self.stride = segment, factor, stride
        self.group = out.group or stride

    def part(self, row: Expr, piece: Expr, pieces: int) -> None:
        """One of `pieces` equal parts of a row."""
        k, out = self.k, self.out
        assert out.scales is not None and out.starts is not None
        groups = self.stride // self.group
        segments = self.group // self.segment
        values = out.values.at(row * (out.pitch or self.stride))
        scales = out.scales.at(row * groups)
        starts = out.starts.at(row * (groups * segments))
        each = groups // pieces
        with k.loop(piece * each, (piece + 1) * each) as group:
            column = group.i * self.group
            largest = self._largest(column)
            small = largest.compare("lt", SMALLEST)
            scales.store(group.i, k.select(small, k.f32(0.0), largest * (1.0 / 127.0)))
            inverse = k.select(small, k.f32(0.0), 127.0 / largest)
            with k.loop(0, segments) as segment:
                total = self._store(values, column + segment.i * self.segment, inverse)
                starts.store(group.i * segments + segment.i, (total * float(self.factor)).cast(I32))

    def _largest(self, column: Expr) -> Expr:
        """The largest magnitude of a group."""

        def step(at: Expr, largest: Expr) -> Expr:
            value = self._load(at)
            return largest.max(value.max(0.0 - value))

        return self._over(column, self.group, step).reduce("max")

    def _store(self, values: Buffer, column: Expr, inverse: Expr) -> Expr:
        """Stores the levels of a segment; their sum, exact in f32."""

        def step(at: Expr, total: Expr) -> Expr:
            level = self.k.round(self._load(at) * inverse)
            values.store(at, level.cast(I8))
            return total + level

        return self._over(column, self.segment, step).reduce("add")

    def _over(self, column: Expr, count: int, step: Callable[[Expr, Expr], Expr]) -> Expr:
        """`step(place, value)` on the registers of `count` columns one after another, from zeros on."""
        value = self.k.f32(0.0, LANES)
        if count <= _UNROLLED * BLOCK:
            for c in range(0, count, LANES):
                value = step(column + c, value)
            return value
        with self.k.loop(0, count, LANES, [value]) as loop:
            loop.carry(step(column + loop.i, loop.carried[0]))
        return loop.results[0]

    def _load(self, column: Expr) -> Expr:
        """16 columns, zeros beyond the row."""
        if self.width == self.stride:
            return self.read(column, LANES, None)
        return self.read(column, LANES, self.k.lanes_below(self.k.index(self.width) - column, LANES))


assert BLOCK % LANES == 0
