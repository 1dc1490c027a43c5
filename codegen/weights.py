"""Weights as an artifact stores them: where each lies in the file, and its bytes in bounded pieces.

Takes named roots of constant expressions (graph IR values whose type says format and layout) and a source of
checkpoint rows; `plan_weights` assigns page-aligned offsets in the order given (the order the program reads them),
`stored_pieces` yields the bytes of one tensor a few MiB at a time, `write_weights` writes the file. A laid-out matrix
is stored as `ir.types.Layout` says, each matrix of a stack [E, n, k] by itself; everything else row-major. Stacks that
are bundled (the matrices of a layer's experts) lie expert by expert, so that one expert is one range of pages. Nothing
larger than a piece plus what the source returns for it is ever in memory. `load_stored` is the inverse, for tests and
inspection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from codegen.constant_reader import Box, ConstantReader, TensorSource, fixed_shape
from codegen.nvptx.fragments import Fragments
from codegen.nvptx.stored_fragments import fragment_pieces, load_fragments
from codegen.packed_reader import PackedReader
from codegen.packed_strips import PackedStrips
from codegen.packed_weights import load_packed, packed_pieces
from codegen.strips import StripPacker, strip_count, strip_rows, unpack_strips
from ir.core import Value
from ir.diagnostics import DiagnosticError
from ir.formats import PLAIN_FORMATS, FP8Format, NumberFormat, PlainFormat, ScaledFormat
from ir.parse_value import parse_format
from ir.types import Layout, TensorType

PAGE_BYTES = 4096
PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of the weights file: bytes [offset, offset + nbytes), a page-aligned place.

    `shape` is the logical one, before padding; `layout` is None for row-major. A bundled stack has its matrices
    `stride` bytes apart, with others' between them; otherwise `stride` is 0.
    """

    name: str
    offset: int
    nbytes: int
    format: str
    shape: tuple[int, ...]
    layout: Layout | None
    stride: int = 0

    @property
    def extent(self) -> int:
        """Bytes from the first to the last, what lies between included."""
        count = self.shape[0] if self.stride else 1
        return self.nbytes // count + self.stride * (count - 1)

    def manifest_entry(self) -> dict[str, object]:
        """The form in `manifest.json`."""
        entry: dict[str, object] = {
            "name": self.name,
            "offset": self.offset,
            "bytes": self.nbytes,
            "format": self.format,
            "shape": list(self.shape),
            "layout": str(self.layout) if self.layout else "",
        }
        return entry | ({"stride": self.stride} if self.stride else {})


class ByteSink(Protocol):
    """What `write_weights` writes to: a binary file, or an artifact's file that hashes as it goes."""

    def write(self, data: memoryview, /) -> object: ...


def layout_of(value: Value) -> Layout | None:
    """The layout that the value's type names."""
    return value.type.layout if isinstance(value.type, TensorType) else None


def stored_bytes(shape: tuple[int, ...], element: NumberFormat, layout: Layout | None) -> int:
    """Exact bytes of a stored tensor, padding of its strips included. DiagnosticError for what no kernel reads."""
    if layout is None:
        if not isinstance(element, PlainFormat):
            raise DiagnosticError(f"a weight in {element} needs a layout", hint="run choose-layouts")
        return math.prod(shape) * element.dtype.itemsize
    if layout.lanes > 1:
        return math.prod(shape[:-2]) * Fragments.of(shape[-2], shape[-1], element).nbytes
    if not isinstance(element, PlainFormat):
        return math.prod(shape[:-2]) * PackedStrips.of(TensorType(shape, element, layout)).matrix_bytes
    rows, columns = layout.padded(shape[-2], shape[-1])
    return math.prod(shape[:-2]) * rows * columns * element.dtype.itemsize


def matrix_extent(value: Value) -> int:
    """Whole pages of one matrix of a stack [E, n, k]."""
    assert isinstance(value.type, TensorType)
    size = stored_bytes(fixed_shape(value)[1:], value.type.element, layout_of(value))
    return -(-size // PAGE_BYTES) * PAGE_BYTES


def plan_weights(
    roots: Sequence[tuple[str, Value]], bundles: Sequence[Sequence[Value]] = ()
) -> tuple[list[StoredTensor], int]:
    """(places of the roots, size of the file). Raises DiagnosticError for what cannot be stored.

    The file is in the order of `roots`, but that all stacks of a bundle lie at the place of its first.
    """
    bundle_of = {value: bundle for bundle in bundles for value in bundle}
    tensors: list[StoredTensor] = []
    places: dict[Value, tuple[int, int]] = {}  # of bundled stacks: offset, stride
    offset = 0
    seen: dict[str, None] = {}
    for name, value in roots:
        if name in seen:
            raise ValueError(f"two weights are named {name!r}")
        seen[name] = None
        shape, layout = fixed_shape(value), layout_of(value)
        if layout is not None and (len(shape) not in (2, 3) or shape[-2] % layout.interleave):
            raise DiagnosticError(
                f"a weight of shape {list(shape)} cannot be laid out as {layout}",
                where=name,
                expected=f"[n, k] or [E, n, k] with n a multiple of {layout.interleave}",
            )
        assert isinstance(value.type, TensorType)
        size = stored_bytes(shape, value.type.element, layout)
        if value in bundle_of:
            if value not in places:
                stride = sum(matrix_extent(member) for member in bundle_of[value])
                start = offset
                for member in bundle_of[value]:
                    places[member] = start, stride
                    start += matrix_extent(member)
                offset += stride * shape[0]
            at, stride = places[value]
        else:
            at, stride = offset, 0
            offset += -(-size // PAGE_BYTES) * PAGE_BYTES
        tensors.append(StoredTensor(name, at, size, str(value.type.element), shape, layout, stride))
    return tensors, offset


def stored_pieces(
    value: Value, source: TensorSource, *, piece_bytes: int = PIECE_BYTES, matrix: int | None = None
) -> Iterator[memoryview]:
    """The stored bytes of one weight, in order, or of one matrix of a laid-out stack.

    A piece is valid until the next but one is asked for.
    """
    layout = layout_of(value)
    assert isinstance(value.type, TensorType)
    if layout is not None and layout.lanes > 1:
        yield from fragment_pieces(value, layout, source, piece_bytes, matrix)
        return
    if layout is not None and not isinstance(value.type.element, PlainFormat):
        chosen = None if matrix is None else [(matrix,)]
        yield from packed_pieces(PackedReader(value, source), layout, piece_bytes, chosen)
        return
    reader = ConstantReader(value, source)
    if layout is None:
        yield from _plain_pieces(reader, (), piece_bytes)
    elif len(reader.shape) == 2:
        yield from _strip_pieces(reader, (), layout, piece_bytes)
    else:
        for index in range(reader.shape[0]) if matrix is None else [matrix]:
            yield from _strip_pieces(reader, ((index, index + 1),), layout, piece_bytes)


def write_weights(
    roots: Sequence[tuple[str, Value]],
    source: TensorSource,
    out: ByteSink,
    *,
    bundles: Sequence[Sequence[Value]] = (),
    progress: Callable[[int, int], None] | None = None,
) -> tuple[list[StoredTensor], int]:
    """Writes the whole weights file to `out`; returns what `plan_weights` says.

    `progress(done, total)` is called after every piece, in bytes.
    """
    tensors, total = plan_weights(roots, bundles)
    done = 0
    for piece in _file_pieces(tensors, roots, source):
        out.write(piece)
        done += len(piece)
        if progress is not None:
            progress(done, total)
    if progress is not None:
        progress(done, total)
    return tensors, total


def _file_pieces(
    tensors: Sequence[StoredTensor], roots: Sequence[tuple[str, Value]], source: TensorSource
) -> Iterator[memoryview]:
    """The bytes of the file from its first to its last, padding included.

    While a piece is used, threads make the next one of the same part and the first one of the part that follows.
    """
    parts: list[tuple[int, StoredTensor, Value, int | None]] = []
    for tensor, (_, value) in zip(tensors, roots, strict=True):
        matrices = range(tensor.shape[0]) if tensor.stride else [None]
        parts += [(tensor.offset + tensor.stride * (m or 0), tensor, value, m) for m in matrices]
    parts.sort(key=lambda part: part[0])
    written = 0
    with ThreadPoolExecutor(2, "weights") as pool:
        streams = (_Ahead(pool, _finite(t, stored_pieces(value, source, matrix=m))) for _, t, value, m in parts)
        following = next(streams, None)
        for offset, tensor, _, _ in parts:
            assert written == offset and following is not None
            stream, following = following, next(streams, None)
            for piece in stream:
                written += len(piece)
                yield piece
            size = tensor.nbytes // tensor.shape[0] if tensor.stride else tensor.nbytes
            if written - offset != size:
                raise AssertionError(f"{tensor.name} has {written - offset} stored bytes, its place {size}")
            if written % PAGE_BYTES:
                yield memoryview(bytes(-written % PAGE_BYTES))
                written += -written % PAGE_BYTES


# The sign, and the smallest bits of what is not finite, of floats that are stored as they are.
_INFINITE = {"f16": (np.uint16, 0x7C00), "bf16": (np.uint16, 0x7F80), "f32": (np.uint32, 0x7F800000)}


def _finite(tensor: StoredTensor, pieces: Iterator[memoryview]) -> Iterator[memoryview]:
    """The pieces. Raises DiagnosticError where one holds NaN or an infinity: low-bit formats refuse them as well."""
    unsigned, least = _INFINITE.get(tensor.format, (np.uint8, 0))
    sign = 1 << (8 * np.dtype(unsigned).itemsize - 1)
    for piece in pieces:
        if least and len(piece):
            bits = np.frombuffer(piece, unsigned)  # negative numbers are the largest of these, and below 0 as signed
            if bits.max() >= sign + least or bits.view(np.dtype(unsigned).str.replace("u", "i")).max() >= least:
                raise DiagnosticError(
                    "the tensor holds NaN or infinite numbers", where=tensor.name, expected="finite numbers"
                )
        yield piece


class _Ahead:
    """Pieces, the next of which is always being made by a thread."""

    def __init__(self, pool: ThreadPoolExecutor, pieces: Iterator[memoryview]) -> None:
        self.pool, self.pieces = pool, pieces
        self.pending = pool.submit(next, pieces, None)

    def __iter__(self) -> Iterator[memoryview]:
        while (piece := self.pending.result()) is not None:
            self.pending = self.pool.submit(next, self.pieces, None)
            yield piece


def load_stored(data: memoryview | bytes, tensor: StoredTensor) -> np.ndarray:
    """The logical array of one stored tensor; `data` is the whole weights file. f32 numbers of a low-bit one."""
    raw = _stored_matrices(np.frombuffer(data, np.uint8), tensor)
    if tensor.layout is not None and tensor.layout.lanes > 1:
        return load_fragments(raw, parse_format(tensor.format), tensor.shape, tensor.layout)
    if tensor.format not in PLAIN_FORMATS:
        format = parse_format(tensor.format)
        assert tensor.layout is not None and isinstance(format, ScaledFormat | FP8Format)
        return load_packed(raw, format, tensor.shape, tensor.layout)
    flat = raw.view(PLAIN_FORMATS[tensor.format].dtype)
    if tensor.layout is None:
        return flat.reshape(tensor.shape)
    n, k = tensor.shape[-2:]
    if len(tensor.shape) == 2:
        return unpack_strips(flat, tensor.layout, n, k)
    matrices = flat.reshape(tensor.shape[0], -1)
    return np.stack([unpack_strips(m, tensor.layout, n, k) for m in matrices])


def _stored_matrices(data: np.ndarray, tensor: StoredTensor) -> np.ndarray:
    """The bytes of the tensor without what lies between its matrices."""
    if not tensor.stride:
        return data[tensor.offset : tensor.offset + tensor.nbytes]
    size = tensor.nbytes // tensor.shape[0]
    starts = [tensor.offset + tensor.stride * m for m in range(tensor.shape[0])]
    return np.concatenate([data[start : start + size] for start in starts])


def _plain_pieces(reader: ConstantReader, prefix: Box, piece_bytes: int) -> Iterator[memoryview]:
    """Row-major bytes: ranges of the first axis after `prefix`, or, where one step of it is too large, of the next."""
    rest = reader.shape[len(prefix) :]
    if not rest:
        yield _bytes_of(reader.read(prefix))
        return
    length, step_bytes = rest[0], math.prod(rest[1:]) * reader.dtype.itemsize
    if step_bytes > piece_bytes and len(rest) > 1:
        for index in range(length):
            yield from _plain_pieces(reader, (*prefix, (index, index + 1)), piece_bytes)
        return
    count = max(1, piece_bytes // max(1, step_bytes))
    for first in range(0, length, count):
        box = (*prefix, (first, min(first + count, length)), *((0, d) for d in rest[1:]))
        yield _bytes_of(reader.read(box))


def _strip_pieces(reader: ConstantReader, prefix: Box, layout: Layout, piece_bytes: int) -> Iterator[memoryview]:
    """The strips of one matrix, several to a piece. `prefix` picks the matrix of a stack."""
    n, k = reader.shape[-2:]
    packer = StripPacker(layout, k, reader.dtype)
    strips = strip_count(layout, n)
    strip_bytes = math.prod(packer.strip_shape) * reader.dtype.itemsize
    # A piece starts at the first part of an interleaved group, so that each part is read as one range of rows.
    per_piece = max(1, piece_bytes // (strip_bytes * layout.interleave)) * layout.interleave
    buffers = [np.empty((min(per_piece, strips), *packer.strip_shape), reader.dtype) for _ in range(2)]
    for first in range(0, strips, per_piece):
        last = min(first + per_piece, strips)
        buffers.reverse()
        buffer = buffers[0]
        for part in range(layout.interleave):
            members = range(first + part, last, layout.interleave)
            low, high = strip_rows(layout, n, members[0])[0], strip_rows(layout, n, members[-1])[1]
            rows = reader.read((*prefix, (low, high), (0, k))).reshape(high - low, k)
            for strip in members:
                begin, end = strip_rows(layout, n, strip)
                packer.pack_into(buffer[strip - first], rows[begin - low : end - low])
        yield _bytes_of(buffer[: last - first])


def _bytes_of(array: np.ndarray) -> memoryview:
    """The array's bytes in row-major order, without a copy where it is contiguous already."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
