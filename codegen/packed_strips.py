"""Low-bit weight matrices in strips: where codes, scales and zero points lie in an artifact.

A strip is `rows` rows of the matrix. It stores its groups one after another, and behind them the channel scales of a
two-level format. A group is its blocks, then a scale for each row, then a zero point (one byte) for each row:

    strip   group 0 | group 1 | ... | channel scales f32[rows]
    group   scales[rows] | zero points u8[rows] | block 0 | block 1 | ...
    block   32 columns: 16 rows | 16 rows | ...      64 bytes for each bit of a code and 16 rows

A block of 16 rows is the registers of a kernel. Its codes are cut into planes of 8, 4, 2 and 1 bits, low bits first
(3 bits = a plane of 2 and one of 1), because those widths divide a register evenly. Lane r of a register's 16 lanes of
32 bits belongs to row r and has 4 / 2 / 1 slots (`pack` of the layout), one for each neighbouring column that the
inner product takes at once: bytes for `tile.dot4`, pairs for `tile.dot2`, words for `tile.fma`. Step t of a block
covers columns t * pack .. + pack; a plane of b bits has the steps of a register side by side in every slot:

    step t: register t // s, bits from b * (t % s) of every slot, s = slot width / b

so that one shift and one mask give the codes of a step. A matrix in a format with a learned table begins with that
table, padded to 64 bytes. Columns beyond k hold the code of zero.

Product quantization has one byte for each 4 columns: a block is a byte of each of the 16 rows for each step, and the
table holds the 4 levels of a code, 128 more than they are, as the word that a gather brings.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats import F32, PlainFormat, ScaledFormat
from ir.formats.fp8 import FP8Format
from ir.types import Layout, TensorType

BLOCK = 32  # columns
LANES = 16  # rows of a register
_REGISTER_BYTES = 64
_LINE = 64


def planes_of(bits: int) -> tuple[int, ...]:
    """Widths of the planes of a code, low bits first: 7 -> (4, 2, 1)."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


@dataclass(frozen=True)
class PackedStrips:
    """Addresses, in bytes, of a matrix [n, k] in `format`. Raises DiagnosticError for groups no kernel takes."""

    n: int
    k: int
    layout: Layout
    format: ScaledFormat | FP8Format

    def __post_init__(self) -> None:
        if self.layout.rows % LANES:
            raise DiagnosticError(
                f"kernels take strips of a multiple of {LANES} rows, got {self.layout}",
                expected=f"{LANES}, {2 * LANES}, {4 * LANES}, ... rows",
            )
        if self.layout.pack not in (1, 2, 4):
            raise DiagnosticError(f"kernels take 1, 2 or 4 columns at once, got {self.layout}")
        if self.dim > 1 and (self.dim, self.bits, self.layout.pack) != (4, 8, 4):
            raise DiagnosticError(
                f"no kernel for {self.format} in {self.layout}",
                expected="dim=4 and bits=8 with int8 activations",
            )
        group = self._format_group
        if group and group % BLOCK:
            raise DiagnosticError(
                f"no kernel for {self.format}: groups of {group} columns do not end with a block",
                expected=f"groups of a multiple of {BLOCK} columns, or of the whole row",
            )
        if group and self.k % group:
            raise DiagnosticError(
                f"{self.format} cannot hold rows of {self.k} elements",
                expected=f"a multiple of the group of {group}",
            )

    @classmethod
    def of(cls, type: TensorType) -> PackedStrips:
        """Those of a matrix, or of each matrix of a stack [E, n, k], with a layout and a low-bit element."""
        n, k = type.shape[-2:]
        assert isinstance(n, int) and isinstance(k, int) and type.layout is not None
        assert isinstance(type.element, ScaledFormat | FP8Format)
        return cls(n, k, type.layout, type.element)

    @property
    def _format_group(self) -> int:
        return self.format.block_cols if isinstance(self.format, FP8Format) else self.format.group

    # -- the format, as a kernel sees it

    @property
    def bits(self) -> int:
        return 8 if isinstance(self.format, FP8Format) else self.format.bits

    @property
    def scale(self) -> PlainFormat:
        """The stored scale of one row and group; that of a block of FP8 is stored for each of its rows."""
        return F32 if isinstance(self.format, FP8Format) else self.format.scale

    @property
    def has_zeros(self) -> bool:
        return isinstance(self.format, ScaledFormat) and self.format.zero_point

    @property
    def has_channel(self) -> bool:
        return isinstance(self.format, ScaledFormat) and self.format.channel is not None

    @property
    def learned(self) -> bool:
        """Whether each matrix has a table of its own."""
        return isinstance(self.format, ScaledFormat) and self.format.integer_levels is None

    # -- sizes

    @property
    def stored_k(self) -> int:
        """k with its padding to whole blocks."""
        return -(-self.k // BLOCK) * BLOCK

    @property
    def group(self) -> int:
        """Columns that share a scale, padding included."""
        return self._format_group or self.stored_k

    @property
    def groups(self) -> int:
        return self.stored_k // self.group

    @property
    def vectors(self) -> int:
        """Registers across one strip."""
        return self.layout.rows // LANES

    @property
    def strips(self) -> int:
        return self.layout.padded(self.n, 1)[0] // self.layout.rows

    @property
    def dim(self) -> int:
        """Columns of one code: more than one in product quantization."""
        return getattr(self.format, "dim", 1)

    @property
    def vector_bytes(self) -> int:
        """One block of 16 rows."""
        return LANES * self.steps if self.dim > 1 else _REGISTER_BYTES * self.bits

    @property
    def block_bytes(self) -> int:
        return self.vector_bytes * self.vectors

    @property
    def zeros_at(self) -> int:
        """Where the zero points lie in a group; the scales lie at its beginning."""
        return self.layout.rows * (self.scale.bits // 8)

    @property
    def blocks_at(self) -> int:
        """Where the blocks lie in a group."""
        return self.zeros_at + self.layout.rows * self.has_zeros

    @property
    def group_bytes(self) -> int:
        return self.blocks_at + self.group // BLOCK * self.block_bytes

    @property
    def channel_at(self) -> int:
        """Where the channel scales lie in a strip."""
        return self.groups * self.group_bytes

    @property
    def strip_bytes(self) -> int:
        return self.channel_at + self.layout.rows * 4 * self.has_channel

    @property
    def table_bytes(self) -> int:
        """What a matrix begins with."""
        return -(-(self.dim << self.bits) // _LINE) * _LINE if self.learned else 0

    @property
    def matrix_bytes(self) -> int:
        return self.table_bytes + self.strips * self.strip_bytes

    # -- registers

    @property
    def slot_bits(self) -> int:
        """Bits of a lane that belong to one column."""
        return 32 // self.layout.pack

    @property
    def steps(self) -> int:
        """Inner products of one block."""
        return BLOCK // self.layout.pack

    @cached_property
    def pieces(self) -> tuple[tuple[Piece, ...], ...]:
        """For each step of a block, where the planes of its codes are."""
        found = []
        for step in range(self.steps):
            of_step, bit = [], 0  # a plane of so many bits takes as many registers
            for width in planes_of(self.bits):
                per_register = self.slot_bits // width
                of_step.append(Piece(bit + step // per_register, width * (step % per_register), width, bit))
                bit += width
            found.append(tuple(of_step))
        return tuple(found)


@dataclass(frozen=True)
class Piece:
    """`width` bits of a code, from bit `low` on: in this register of the block, from bit `shift` of each slot."""

    register: int
    shift: int
    width: int
    low: int


def zero_code(format: ScaledFormat | FP8Format) -> int:
    """A code of value 0, or as small as there is; activations are zero where it stands for padding."""
    if isinstance(format, FP8Format) or format.zero_point or format.integer_levels is None:
        return 0
    return int(np.argmin(np.abs(format.integer_levels)))


def unpack_blocks(blocks: np.ndarray, strips: PackedStrips) -> np.ndarray:
    """The inverse of the packing of blocks: uint8 codes [rows, stored_k] of one strip's `blocks` [groups, bytes]."""
    s, pack = strips, strips.layout.pack
    shaped = np.ascontiguousarray(blocks).view(np.uint32)
    words = shaped.reshape(s.stored_k // BLOCK, s.vectors, s.bits, LANES)
    codes = np.zeros((s.stored_k // BLOCK, s.vectors, LANES, s.steps, pack), np.uint8)
    for step, pieces in enumerate(s.pieces):
        for piece in pieces:
            for slot in range(pack):
                shift = np.uint32(piece.shift + slot * s.slot_bits)
                found = (words[:, :, piece.register] >> shift) & np.uint32((1 << piece.width) - 1)
                codes[:, :, :, step, slot] |= (found << np.uint32(piece.low)).astype(np.uint8)
    return codes.transpose(1, 2, 0, 3, 4).reshape(s.layout.rows, s.stored_k)
