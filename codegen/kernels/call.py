"""What a kernel emitter gives: the kernel and the arguments of one launch of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from codegen.kernels.micro import TileShape
from ir.core import Op, Value
from ir.ops.builtin import FuncOp
from ir.types import Dim, TensorType, Type


@dataclass(frozen=True)
class SizeArgument:
    """A size parameter: rows of a tensor (`tokens`, `rows`, `tokens*8`), `ctx` or `slots`."""

    dim: Dim


@dataclass(frozen=True)
class Temporary:
    """Arena memory used by one launch only."""

    type: TensorType


Argument = Value | SizeArgument | Temporary


@dataclass
class KernelSpec:
    """A kernel's name stem, its arguments in parameter order, and how to build it when it is new.

    `writes` and `reads` number the buffer arguments. Two specs of equal `key` are one kernel.
    """

    stem: str
    key: Any
    arguments: list[Argument]
    writes: tuple[int, ...]
    build: Callable[[str], FuncOp]
    reads: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.reads:
            buffers = [i for i, a in enumerate(self.arguments) if not isinstance(a, SizeArgument)]
            self.reads = tuple(i for i in buffers if i not in self.writes)


@dataclass(frozen=True)
class EmitContext:
    """What emitters may ask about the target: register tile for matrix kernels, and which program this is for.

    `strides` has the bytes from one matrix of a stack to the next, where others lie between them.
    """

    shape: TileShape
    program: str = "prefill"  # or "decode"
    strides: Mapping[Value, int] = field(default_factory=dict, compare=False)


Emitter = Callable[[Any, EmitContext], KernelSpec]
EMITTERS: dict[type[Op], Emitter] = {}


def emitter(*op_classes: type[Op]) -> Callable[[Emitter], Emitter]:
    """Decorator: the function turns ops of these classes into kernels. A second one for a class is an error."""

    def register(function: Emitter) -> Emitter:
        for op_class in op_classes:
            if op_class in EMITTERS:
                raise ValueError(f"{op_class.name} is emitted by {EMITTERS[op_class].__module__} already")
            EMITTERS[op_class] = function
        return function

    return register


def structure_key(op: Op) -> tuple[Any, ...]:
    """Equal for ops that compute the same: names, attributes, types and wiring; weights and origins do not count."""
    numbers: dict[Value, int] = {}

    def number(value: Value) -> int:
        return numbers.setdefault(value, len(numbers))

    def walk(op: Op) -> tuple[Any, ...]:
        operands = tuple((number(v), str(v.type)) for v in op.operands)
        regions = []
        for region in op.regions:
            for argument in region.block.arguments:
                number(argument)
            regions.append(tuple(walk(inner) for inner in region.block.ops))
        results = tuple((number(r), str(r.type)) for r in op.results)
        return op.name, operands, tuple((k, str(v)) for k, v in op.attributes.items()), tuple(regions), results

    return walk(op)


def rows_of(type: Type) -> Dim:
    """The leading dimension of a tensor."""
    assert isinstance(type, TensorType)
    return type.shape[0]
