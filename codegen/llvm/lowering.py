"""Ops of tile IR as LLVM IR text: one small function per op, found by the op's class, and what those functions use.

Values keep their shape: `index` is i64, `vector<16 x f32>` is <16 x float>, buffers are pointers. Constants are written
in place. Which instruction an op is issued as depends on the target's features, see `codegen.llvm.instructions`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from codegen.llvm.instructions import InstructionSet
from ir.core import Block, Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import F32, NumberFormat, PlainFormat
from ir.ops.tile_types import element_of
from ir.types import BufferType, IndexType, ScalarType, Type, VectorType

# bf16 and f16 are 16 bits to everything but `tile.cast` and `tile.dot2`: LLVM would convert them to f32 and back to
# move them about where the CPU has no instructions for them, by calls to functions that nobody links.
_ELEMENTS = {
    "f32": "float",
    "bf16": "i16",
    "f16": "i16",
    "f64": "double",
    "i1": "i1",
    "i8": "i8",
    "u8": "i8",
    "f8e4m3": "i8",  # stored only; GPUs make and multiply it
    "i32": "i32",
    "i64": "i64",
}

Lowering = Callable[["FunctionEmitter", Any], None]
LOWERINGS: dict[type[Op], Lowering] = {}


def lowering(op_class: type[Op]) -> Callable[[Lowering], Lowering]:
    """Decorator: the function emits ops of this class. A second one for the same class is an error."""

    def register(function: Lowering) -> Lowering:
        if op_class in LOWERINGS:
            raise ValueError(f"{op_class.name} is lowered by {LOWERINGS[op_class].__module__} already")
        LOWERINGS[op_class] = function
        return function

    return register


def llvm_element(element: NumberFormat) -> str:
    """`float` for f32, `i16` for bf16, and so on."""
    return _ELEMENTS[str(element)]


def llvm_type(type: Type) -> str:
    """The LLVM type of a tile-level value."""
    match type:
        case IndexType():
            return "i64"
        case BufferType():
            return "ptr"
        case VectorType(lanes, element):
            return f"<{lanes} x {llvm_element(element)}>"
        case ScalarType(element):
            return llvm_element(element)
    raise TypeError(f"{type} is no tile-level type")


def literal(type: Type, value: float | tuple[float, ...]) -> str:
    """A constant of that type: one number (splat when the type is a vector) or a tuple of one for each lane."""
    element = element_of(type)
    name = llvm_element(element)
    if isinstance(value, tuple):
        return "<" + ", ".join(f"{name} {_number(element, v)}" for v in value) + ">"
    return f"splat ({name} {_number(element, value)})" if isinstance(type, VectorType) else _number(element, value)


def _number(element: PlainFormat, value: float) -> str:
    if element.name in ("f32", "f64"):
        exact = float(np.float32(value)) if element == F32 else float(value)
        return f"0x{struct.unpack('<Q', struct.pack('<d', exact))[0]:016X}"
    if element.is_float:
        raise TypeError(f"constants of {element} are not supported; cast one from f32")
    return ("true" if value else "false") if element.name == "i1" else str(int(value))


@dataclass
class FunctionEmitter:
    """Writes one function. `names` maps IR values to LLVM names or literals; `declare` collects intrinsics."""

    instructions: InstructionSet
    declarations: dict[str, str]
    lines: list[str] = field(default_factory=list)
    names: dict[Value, str] = field(default_factory=dict)
    counter: int = 0
    current_label: str = "%entry"

    def fresh(self, prefix: str = "v") -> str:
        self.counter += 1
        return f"%{prefix}{self.counter}"

    def emit(self, text: str) -> None:
        self.lines.append("  " + text)

    def assign(self, text: str) -> str:
        """Emits `%new = text` and returns the new name."""
        name = self.fresh()
        self.emit(f"{name} = {text}")
        return name

    def define(self, value: Value, text: str) -> None:
        """Emits the instruction whose result is `value`."""
        self.names[value] = self.assign(text)

    def name(self, value: Value) -> str:
        return self.names[value]

    def typed(self, value: Value) -> str:
        return f"{llvm_type(value.type)} {self.names[value]}"

    def label(self, name: str) -> None:
        self.lines.append(f"{name[1:]}:")
        self.current_label = name

    def intrinsic(self, name: str, result: str, *arguments: str) -> str:
        """`call result @name(arguments)`; arguments are `type value`. Declares it once."""
        types = ", ".join(_type_of_argument(a) for a in arguments)
        self.declarations[name] = f"declare {result} @{name}({types})"
        return f"call {result} @{name}({', '.join(arguments)})"

    def address(self, buffer: Value, index: Value, inbounds: bool = True) -> str:
        """A pointer to element `index` of `buffer`. Not `inbounds`: it may point outside, if nothing is read there."""
        assert isinstance(buffer.type, BufferType)
        element = llvm_element(buffer.type.element)
        promise = "inbounds " if inbounds else ""
        return self.assign(f"getelementptr {promise}{element}, ptr {self.name(buffer)}, i64 {self.name(index)}")

    def block(self, block: Block) -> Op:
        """Emits all ops but the terminator, which is returned."""
        for op in block.ops[:-1]:
            self.op(op)
        assert block.terminator is not None
        return block.terminator

    def op(self, op: Op) -> None:
        emit = LOWERINGS.get(type(op))
        if emit is None:
            message = f"no lowering of {op.name} to LLVM; have {', '.join(sorted(c.name for c in LOWERINGS))}"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))
        emit(self, op)


def _type_of_argument(argument: str) -> str:
    """`<16 x float> %v3` -> `<16 x float>`; `i1 true` -> `i1`; immediate markers are kept in front."""
    if argument.startswith("<"):
        depth = 0
        for i, c in enumerate(argument):
            depth += {"<": 1, ">": -1}.get(c, 0)
            if depth == 0:
                return argument[: i + 1]
    return argument.split(" ", 1)[0]
