"""What an emitter for GPUs gives: the launches of an op, each a kernel, its arguments and how many blocks it has.

    @grid_emitter(MatmulOp)
    def emit(op, context): return [GridLaunch(...), ...]

Launches of an op run in order; kernels of equal `key` are built once. An op that no kernel takes is refused by name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from codegen.kernels.call import SizeArgument
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.kernels.row_tiles import RowTiles
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import PlainFormat
from ir.types import Dim, SymbolicDim, TensorType


@dataclass(eq=False)
class Temporary:
    """Memory of the arena that launches of this program share; told apart by identity. `tiles`: where its rows lie, if
    not one behind the other."""

    type: TensorType
    tiles: RowTiles | None = None


@dataclass(frozen=True)
class WeightPart:
    """Bytes of a stored weight, or of a stack of them from the first on."""

    weight: Value
    offset: int
    element: PlainFormat


@dataclass(frozen=True)
class Plane:
    """One plane of the cache that a value stands for."""

    cache: Value
    plane: int


@dataclass(frozen=True)
class Table:
    """Numbers that the program brings along, f64."""

    numbers: tuple[float, ...]


@dataclass(frozen=True)
class Pieces:
    """The pieces of the prompts of this step."""


@dataclass(frozen=True)
class Count:
    """A number: a size as text."""

    size: str


GridArgument = Value | Temporary | WeightPart | Plane | Table | Pieces | Count | SizeArgument


@dataclass
class GridLaunch:
    """One launch. `writes` numbers the arguments that are written; all other buffers are read.

    `costs`: whether the bytes and FLOPs of the op are those of this launch, in reports. `rows_part`: what a row by row
    kernel does (`codegen.nvptx.emitters.rows`), so that it can be joined with the next one.
    """

    stem: str
    key: Any
    arguments: list[GridArgument]
    writes: tuple[int, ...]
    grid: str
    build: Callable[[str], GridKernel]
    costs: bool = False
    rows_part: Any = None

    @property
    def reads(self) -> tuple[int, ...]:
        """Numbers of the buffers that are only read."""
        buffers = [i for i, a in enumerate(self.arguments) if not isinstance(a, Count | SizeArgument)]
        return tuple(i for i in buffers if i not in self.writes)


@dataclass(frozen=True)
class GridOptions:
    """What a build for GPUs may choose: multiprocessors that attention of few tokens is split for, and the fewest
    positions of a part; the most tokens of a step, of prompts; whether kernels may be for sm_90a alone."""

    multiprocessors: int = 108  # of an A100
    split_positions: int = 128
    prefill_tokens: int = 512
    hopper: bool = False

    def check(self) -> None:
        """Raises DiagnosticError for numbers that no program can be made of."""
        for name in ("multiprocessors", "split_positions", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise DiagnosticError(f"{name} of a program for GPUs is {getattr(self, name)}", expected="1 or more")


@dataclass(frozen=True)
class Group:
    """What a dispatch writes beside order and offsets: the inverse of the order, and tiles of up to `rows` rows of one
    expert each, of which there are `most` (a size) whatever it chose."""

    inverse: Temporary
    tiles: Temporary
    rows: int
    most: str


@dataclass
class GridContext:
    """What emitters may ask about the program, and tell each other.

    `few`: the most rows of a decode program, 0 in one for prompts; `most`: the most rows of any program. `types`:
    values that are stored as another type than their own. `groups`: by the order of a dispatch.
    """

    few: int
    most: int
    options: GridOptions
    types: dict[Value, TensorType] = field(default_factory=dict)
    groups: dict[Value, Group] = field(default_factory=dict)
    strides: dict[Value, int] = field(default_factory=dict)  # bytes from one matrix of a stack to the next

    def element(self, value: Value) -> PlainFormat:
        """How the numbers of a tensor lie in memory."""
        element = self.types.get(value, tensor_type(value)).element
        assert isinstance(element, PlainFormat)
        return element


GridEmitter = Callable[[Any, GridContext], list[GridLaunch]]
GRID_EMITTERS: dict[type[Op], GridEmitter] = {}


def grid_emitter(*op_classes: type[Op]) -> Callable[[GridEmitter], GridEmitter]:
    """Decorator: the function gives the launches of ops of these classes. A second one for a class is an error."""

    def register(function: GridEmitter) -> GridEmitter:
        for op_class in op_classes:
            if op_class in GRID_EMITTERS:
                raise ValueError(f"{op_class.name} is emitted by {GRID_EMITTERS[op_class].__module__} already")
            GRID_EMITTERS[op_class] = function
        return function

    return register


def size_text(dim: Dim) -> str:
    """A dimension as an expression of the sizes of a step."""
    if isinstance(dim, SymbolicDim) and dim.scale != 1:
        return f"{dim.name} * {dim.scale}"
    return dim.name if isinstance(dim, SymbolicDim) else str(dim)


def refused(op: Op, message: str, expected: str = "") -> DiagnosticError:
    """What an emitter raises for an op that no kernel takes."""
    text = f"{message}; expected {expected}" if expected else message
    return DiagnosticError.of(Diagnostic("error", text, op.location))


def refused_by(op: Op, fault: DiagnosticError) -> DiagnosticError:
    """The same fault at the place of an op."""
    return DiagnosticError.of(*(replace(found, location=op.location) for found in fault.diagnostics))


def tensor_type(value: Value) -> TensorType:
    """Of a value that is a tensor."""
    assert isinstance(value.type, TensorType)
    return value.type
