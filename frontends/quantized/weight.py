"""One quantized matrix of a checkpoint: its format, and its parts as the format has them, read some rows at a time.

`QuantizedWeight` is what every scheme makes of its tensors. `read_part("codes", first, last)` gives rows of a part in
the shapes of `quant.assemble`: codes u8 [n, k], scales [n, groups], zeros u8 [n, groups]; `floats` gives what they
stand for. Where no format can say it (groups of columns that are no neighbours), `format` is f32 and there are only
the floats. Refused: scales that are no finite numbers, by the name of the tensor.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.quantized.source import Source
from frontends.safetensors_header import TensorInfo
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import U8, NumberFormat, PackedArray, PlainFormat
from ir.ops.low_bit import scale_parts
from ir.types import TensorType

W = TypeVar("W", bound="QuantizedWeight")


@dataclass(frozen=True, eq=False)
class ColumnOrder:
    """Column j of the codes of a weight is column `columns[j]` of the matrix (i32 [k]), under the name `name`."""

    name: str
    columns: np.ndarray


@dataclass(frozen=True, eq=False)
class QuantizedWeight(ABC):
    """The matrix `name` of shape [n, k]. `tensors` are those of the file it is made of, the codes first."""

    name: str
    shape: tuple[int, int]
    format: NumberFormat
    source: Source
    tensors: tuple[TensorInfo, ...]

    @abstractmethod
    def codes(self, first: int, last: int) -> np.ndarray:
        """u8 [rows, k] of rows [first, last)."""

    @abstractmethod
    def scales(self, first: int, last: int) -> np.ndarray:
        """[rows, groups] of rows [first, last); of rows of blocks where blocks of rows share a scale."""

    def zeros(self, first: int, last: int) -> np.ndarray:
        """u8 [rows, groups], of formats with zero points."""
        raise TypeError(f"{self.name} in {self.format} has no zero points")

    @property
    def order_of_codes(self) -> ColumnOrder | None:
        """The columns of the codes, where they are not those of the matrix from the first to the last."""
        return None

    @property
    def low_bit(self) -> bool:
        """Whether there are parts; else there are only floats."""
        return not isinstance(self.format, PlainFormat)

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return sum(info.nbytes for info in self.tensors)

    @property
    def where(self) -> str:
        return f"{self.tensors[0].file}: {self.tensors[0].name}"

    def parts(self) -> dict[str, TensorType]:
        """The operands of `quant.assemble` by name, in order; none without a low-bit format."""
        return part_types(self.format, self.shape) if self.low_bit else {}

    def part_type(self, part: str) -> tuple[PlainFormat, tuple[int, ...]]:
        """(format of the elements, shape) of a part."""
        type = self.parts()[part]
        assert isinstance(type.element, PlainFormat)
        return type.element, tuple(d for d in type.shape if isinstance(d, int))

    def read_part(self, part: str, first: int, last: int) -> np.ndarray:
        """Rows [first, last) of a part."""
        element, shape = self.part_type(part)
        values = getattr(self, part)(first, last)
        if part == "codes" and self.order_of_codes is not None:
            values = np.ascontiguousarray(values[:, self.order_of_codes.columns])
        expected = (last - first, *shape[1:])
        assert values.shape == expected and values.dtype == element.dtype, f"{self.name}.{part}: {values.shape}"
        if part == "scales":
            self.refuse_infinite(values, first)
        return values

    def floats(self, first: int, last: int) -> np.ndarray:
        """f32 [rows, k]: what rows [first, last) stand for."""
        unit = getattr(self.format, "block_rows", 1) or self.shape[0]
        low, high = first // unit * unit, min(-(-last // unit) * unit, self.shape[0])
        shape = (high - low, self.shape[1])
        if not high - low:
            return np.empty(shape, np.float32)
        parts = {
            name: self.read_part(name, *((low, high) if name != "scales" else (low // unit, -(-high // unit))))
            for name in self.parts()
        }
        packed = PackedArray.assemble(self.format, shape, **parts)
        values = packed.format.unpack(packed)[first - low : last - low]
        if self.order_of_codes is None:
            return values
        floats = np.empty_like(values)
        floats[:, self.order_of_codes.columns] = values
        return floats

    def refuse_infinite(self, scales: np.ndarray, first: int) -> None:
        """Raises DiagnosticError when a scale is no finite number."""
        finite = np.isfinite(scales.astype(np.float32, copy=False))
        if not finite.all():
            row, column = (int(i) for i in np.argwhere(~finite)[0])
            raise DiagnosticError(
                f"the scale of row {first + row}, group {column} is {scales[row, column]}",
                where=self.where,
                expected="finite numbers",
            )


@dataclass(frozen=True, eq=False)
class GroupedWeight(QuantizedWeight):
    """Integers of `bits` bits in groups. `order` is the tensor that says which group a column belongs to, where the
    groups are not runs of columns; `group` is how many columns share a scale (0 = all) where they are. With `sorted`
    the codes come by their groups, as the format has them.
    """

    bits: int = 4
    group: int = 0
    order: str = ""
    has_zeros: bool = False
    sorted: ColumnOrder | None = None

    @property
    def order_of_codes(self) -> ColumnOrder | None:
        return self.sorted

    def floats(self, first: int, last: int) -> np.ndarray:
        if self.low_bit:
            return super().floats(first, last)
        k = self.shape[1]
        groups = self.source.rows(self.order) if self.order else np.arange(k) // (self.group or k)
        scales = self.scales(first, last)
        self.refuse_infinite(scales, first)
        levels = self.codes(first, last).astype(np.float32)
        levels -= self.zeros(first, last)[:, groups] if self.has_zeros else np.float32(1 << (self.bits - 1))
        return levels * scales.astype(np.float32)[:, groups]


def part_types(format: NumberFormat, shape: tuple[int, int]) -> dict[str, TensorType]:
    """The operands that `quant.assemble` takes for a matrix, by name, in order."""
    return {"codes": TensorType(shape, U8), **scale_parts(format, shape)}


# -- checks that the schemes share -------------------------------------------------------------------------------------


def modules(tensors: Mapping[str, TensorInfo], leaves: Iterable[str]) -> dict[str, dict[str, TensorInfo]]:
    """The tensors whose last name part is one of `leaves`: what comes before it -> leaf -> tensor."""
    wanted = frozenset(leaves)
    found: dict[str, dict[str, TensorInfo]] = {}
    for name, info in tensors.items():
        prefix, dot, leaf = name.rpartition(".")
        if leaf in wanted:
            found.setdefault(prefix + dot, {})[leaf] = info
    return found


def read_modules(
    tensors: Mapping[str, TensorInfo],
    leaves: Iterable[str],
    read: Callable[[str, Mapping[str, TensorInfo]], W],
    left_out: Callable[[Mapping[str, TensorInfo]], bool] = lambda module: False,
) -> dict[str, W]:
    """`read(prefix, module)` of every module that is not left out, by the name of its weight.

    Raises one DiagnosticError for all that do not fit.
    """
    found: dict[str, W] = {}
    faults = Faults()
    for prefix, module in modules(tensors, leaves).items():
        if left_out(module):
            continue
        try:
            found[prefix + "weight"] = read(prefix, module)
        except DiagnosticError as error:
            faults.add(prefix + "weight", error)
    faults.raise_if_any()
    return found


def only_weight(module: Mapping[str, TensorInfo]) -> str | None:
    """The dtype of the only tensor of a module, when that is its weight: without scales it holds plain numbers."""
    return module["weight"].dtype if len(module) == 1 and "weight" in module else None


def part_of(module: Mapping[str, TensorInfo], prefix: str, leaf: str) -> TensorInfo:
    """The tensor of a module, which must be there."""
    if leaf not in module:
        other = next(iter(module.values()))
        raise DiagnosticError(
            f"has {other.name!r}, but no {prefix + leaf!r}", where=str(other.file), expected="all parts of a weight"
        )
    return module[leaf]


def expect_tensor(info: TensorInfo, dtypes: Iterable[str], rank: int | tuple[int, ...] = 2) -> TensorInfo:
    """`info`, which must have one of the dtypes, one of the ranks, and an element."""
    kinds = tuple(dtypes)
    ranks = (rank,) if isinstance(rank, int) else rank
    if info.dtype not in kinds:
        raise bad(info, f"has dtype {info.dtype}", " or ".join(kinds))
    if len(info.shape) not in ranks or 0 in info.shape:
        raise bad(info, f"has shape {list(info.shape)}", f"{' or '.join(map(str, ranks))} dimensions of one or more")
    return info


def expect_shape(info: TensorInfo, shape: tuple[int, ...], because: str) -> None:
    """Raises DiagnosticError unless the tensor has that shape."""
    if info.shape != shape:
        raise bad(info, f"has shape {list(info.shape)}", f"{list(shape)}, {because}")


def bad(info: TensorInfo, message: str, expected: str = "", hint: str = "") -> DiagnosticError:
    """A diagnostic about one tensor."""
    return DiagnosticError(f"tensor {info.name!r} {message}", where=str(info.file), expected=expected, hint=hint)


def scale_format(info: TensorInfo) -> PlainFormat:
    """The format of scales that a tensor of floats holds."""
    expect_tensor(info, WEIGHT_FORMATS, rank=(0, 1, 2))
    return WEIGHT_FORMATS[info.dtype]


def column_groups(order: TensorInfo, group: int, groups: int, source: Source) -> bool:
    """Whether the tensor puts column j into group j // group, or -1 everywhere, which stands for that.

    Raises DiagnosticError for groups that do not exist.
    """
    found = source.rows(order.name)
    if (found == -1).all():
        return True
    if found.min() < 0 or found.max() >= groups:
        at = int(np.argmax((found < 0) | (found >= groups)))
        raise bad(order, f"puts column {at} into group {found[at]}", f"0 .. {groups - 1}")
    return bool(np.array_equal(found, np.arange(found.shape[0]) // group))


def sorted_columns(name: str, order: TensorInfo, group: int, source: Source) -> ColumnOrder | None:
    """The columns of the weight `name` by their groups, each group in the order of the matrix.

    None where a group has more or fewer than `group` columns, and for an expert: the experts of a layer share their
    activations, which have one order only.
    """
    found = source.rows(order.name)
    if ".experts." in name or found.shape[0] % group or (np.bincount(found) != group).any():
        return None
    return ColumnOrder(f"{name}.columns", np.argsort(found, kind="stable").astype(np.int32))


class Faults:
    """What is wrong with the weights of a checkpoint: the first in full, the others by name, as one diagnostic."""

    def __init__(self) -> None:
        self._found: list[tuple[str, DiagnosticError]] = []

    def add(self, name: str, error: DiagnosticError) -> None:
        self._found.append((name, error))

    def raise_if_any(self) -> None:
        if not self._found:
            return
        first = self._found[0][1].diagnostics[0]
        alike = dict.fromkeys(name_pattern(name) for name, _ in self._found[1:])
        notes = [Diagnostic("also wrong", text[:200]) for text in list(alike)[:8]]
        if len(self._found) > 1:
            notes.append(Diagnostic("note", f"{len(self._found)} weights are wrong in all"))
        raise DiagnosticError.of(Diagnostic("error", first.message, first.location, (*first.notes, *notes)))


def name_pattern(name: str) -> str:
    """The name with every number between dots replaced by `*`."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)
