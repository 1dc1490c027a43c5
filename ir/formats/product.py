"""Product quantization: one code for `dim` neighbouring elements of a row, which stands for a vector of a table.

    pq<dim=4, bits=8, scale=f16>       x[4 i + j] = scale[row] * table[code[i], j]: 2 bits an element

The table, int8 [2**bits, dim], belongs to a matrix and is learned from it: Lloyd's algorithm over the vectors of its
rows, each row over its scale (arXiv:1907.05686). It begins with vectors at even steps of a fixed order and takes no
random number.
Bytes: the codes of each row, `bits` each, from the lowest bit of its first byte; the scales; the table of each matrix.
Refused: rows whose length is no multiple of `dim`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from ir.diagnostics import DiagnosticError
from ir.formats.least_squares import SearchPlan
from ir.formats.packed import PackedArray
from ir.formats.plain import F16, PlainFormat
from ir.formats.registry import SCALE_FORMATS, check_fields, read_scale, register_family
from ir.formats.scaled import ScaledFormat

REACH = 127
_SAMPLE, _STEPS = 1 << 15, 12  # vectors learned from; steps
_CHUNK = 1 << 16  # distances computed at a time


@dataclass(frozen=True)
class ProductFormat(ScaledFormat):
    """`dim` elements, 2 to 8, share a code of `bits`, 1 to 8. One scale a row."""

    dim: int
    bits: int = 8
    scale: PlainFormat = F16
    group: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.dim <= 8:
            raise ValueError(f"expected a dim of 2 to 8, got {self.dim}")
        if not 1 <= self.bits <= 8:
            raise ValueError(f"expected 1 to 8 bits, got {self.bits}")
        if self.scale not in SCALE_FORMATS.values():
            raise ValueError(f"expected a scale of f16, bf16 or f32, got {self.scale}")

    def __str__(self) -> str:
        return f"pq<dim={self.dim}, bits={self.bits}, scale={self.scale}>"

    @property
    def integer_levels(self) -> None:
        return None

    @property
    def table_shape(self) -> tuple[int, ...]:
        return (1 << self.bits, self.dim)

    def groups(self, k: int) -> int:
        """One. Raises DiagnosticError when vectors do not fill a row of `k` elements."""
        if k < 1 or k % self.dim:
            raise DiagnosticError(
                f"{self} cannot hold rows of {k} elements",
                expected=f"a number of columns that is a multiple of {self.dim}" if k else "one column or more",
            )
        return 1

    def codes_per_row(self, k: int) -> int:
        return k // self.dim

    def search_plan(self, size: int, levels: np.ndarray | None) -> SearchPlan | None:
        return None  # the table is fitted to the scales, not the scales to the table

    def _span(self, wide: np.ndarray, levels: np.ndarray | None) -> np.ndarray:
        return np.abs(wide).max(axis=-1) / REACH

    def _nearest_codes(
        self, wide: np.ndarray, scales: np.ndarray, levels: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        assert levels is not None
        quotient = wide / np.where(scales == 0, 1.0, scales)[..., None]
        vectors = quotient.reshape(-1, self.dim)
        return self._nearest_vectors(vectors, levels.astype(np.float64)).astype(np.uint8), None

    def _worth(self, packed: PackedArray, rows: slice, table: np.ndarray | None) -> np.ndarray:
        assert table is not None
        vectors = table.astype(np.float64)[packed.code_array(rows)]
        return vectors.reshape(vectors.shape[0], -1)

    def _nearest_vectors(self, vectors: np.ndarray, entries: np.ndarray) -> np.ndarray:
        """int64 [count]: the entry nearest to each vector; the first of equals."""
        nearest = np.zeros(len(vectors), np.int64)
        doubled = (entries * -2.0).astype(np.float32)
        norms = doubled * doubled * np.float32(0.25)
        constant = norms[:, 0].copy()
        for j in range(1, self.dim):
            constant += norms[:, j]
        self.nearest_entries(vectors.astype(np.float32), doubled, constant, nearest)
        return nearest

    def nearest_entries(
        self, vectors: np.ndarray, doubled: np.ndarray, constant: np.ndarray, nearest: np.ndarray
    ) -> None:
        """nearest[i] = the entry of least constant + vectors[i] . doubled, all in f32, sums in the order of the axis.

        This is the squared distance less |vector|**2, which is the same for all entries.
        """
        step = max(1, _CHUNK // len(doubled))
        for start in range(0, len(vectors), step):
            part = vectors[start : start + step]
            distance = constant[None, :] + part[:, 0, None] * doubled[None, :, 0]
            for j in range(1, self.dim):
                distance += part[:, j, None] * doubled[None, :, j]
            nearest[start : start + step] = distance.argmin(axis=1)

    def error_bound(self, packed: PackedArray, rounding: str = "mse") -> np.ndarray:
        """float64 of the packed shape: |x - unpack(pack(x))| of an element is never larger.

        A vector of values within the reach of the table lies nearest to its entry; so no element is farther from it
        than the corner of the cube that is farthest from all entries could be: its distance to the nearest entry,
        bounded by that to the entry nearest to the origin.
        """
        *_, k = packed.shape
        bound = np.zeros((packed.codes.shape[0], k))
        for rows, table in self._row_chunks(packed.shape, packed.table):
            assert table is not None
            norm = float(np.sqrt((table.astype(np.float64) ** 2).sum(axis=1)).min())
            farthest = np.sqrt(self.dim) * REACH * (1 + 2.0**-10) + norm
            bound[rows] = np.abs(packed.scales[rows].astype(np.float64)) * farthest
        values = np.abs(self.unpack(packed).astype(np.float64))
        return bound.reshape(packed.shape) + np.maximum(values * 2.0**-23, 2.0**-149) * (bound > 0).reshape(
            packed.shape
        )

    def learn(self, matrix: np.ndarray) -> np.ndarray:
        """int8 [2**bits, dim], fitted to the vectors of all rows, or of every so many."""
        step = max(1, -(-matrix.size // self.dim // _SAMPLE))
        rows = matrix.astype(np.float64) if matrix.size <= 1 << 24 else matrix[::step].astype(np.float64)
        largest = np.abs(rows).max(axis=1, keepdims=True, initial=0.0)
        rows = rows[largest[:, 0] > 0]
        vectors = (rows / largest[largest[:, 0] > 0] * REACH).reshape(-1, self.dim)
        vectors = vectors[:: max(1, -(-len(vectors) // _SAMPLE))]
        count = 1 << self.bits
        if not len(vectors):
            return np.zeros(self.table_shape, np.int8)
        order = np.argsort(vectors.sum(axis=1), kind="stable")
        entries = vectors[order[np.linspace(0, len(order) - 1, count).astype(np.int64)]]
        for _ in range(_STEPS):
            nearest = self._nearest_vectors(vectors, entries)
            members = np.bincount(nearest, minlength=count)
            sums = np.stack([np.bincount(nearest, vectors[:, j], count) for j in range(self.dim)], axis=1)
            entries = np.where(members[:, None] > 0, sums / np.maximum(members, 1)[:, None], entries)
        return np.clip(np.rint(entries), -REACH, REACH).astype(np.int8)


def _read(name: str, fields: dict[str, str]) -> ProductFormat:
    check_fields(name, fields, ("dim", "bits", "scale"), "pq<dim=4, bits=8, scale=f16>")
    for name in ("dim", "bits"):
        if not (fields[name].isdecimal() and len(fields[name]) < 5):
            raise ValueError(f"expected {name} to be a number, got {fields[name]}")
    return ProductFormat(int(fields["dim"]), int(fields["bits"]), read_scale(fields["scale"]))


register_family("pq", ("pq",), _read)
