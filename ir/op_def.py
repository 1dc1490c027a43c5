"""How an op is declared: one class, its fields as class attributes, everything generic derived from them.

    @register_op
    class MatmulOp(Op):
        '''y[m, n] = sum over k of x[m, k] * w[n, k].'''
        name = "gemm.matmul"
        traits = (Pure,)
        x = operand("activations [m, k]")
        w = operand("weights [n, k]")
        y = result("f32 [m, n]")

        @staticmethod
        def infer_types(x, w): ...
        @staticmethod
        def reference(x, w): ...

`MatmulOp(x, w, origin="layers.0.mlp.up_proj")` builds one: operands by position or name, attributes by name, result
types by `infer_types(*operand_types, **attributes)` unless `result_types` is given. A variadic operand takes the
rest of the positional operands and reaches `infer_types` and `reference` as their last positional arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from ir.core import Op as CoreOp
from ir.core import Region, Value
from ir.diagnostics import DiagnosticSink
from ir.location import NOWHERE, Location
from ir.sizes import num_bytes
from ir.traits import Trait
from ir.types import TensorType, Type

_REQUIRED = object()


@dataclass(frozen=True)
class Field:
    """A declared field. `kind` is "operand", "attr", "result" or "region"; `index` its place among its kind."""

    kind: str
    doc: str
    variadic: bool = False
    type: Any = None
    default: Any = _REQUIRED
    index: int = 0
    name: str = ""

    @property
    def required(self) -> bool:
        return self.default is _REQUIRED

    def __get__(self, op: Any, owner: type | None = None) -> Any:
        if op is None:
            return self
        if self.kind == "operand":
            return op.operands[self.index :] if self.variadic else op._operands[self.index]
        if self.kind == "attr":
            return op.attributes[self.name]
        if self.kind == "result":
            return op.results[self.index :] if self.variadic else op.results[self.index]
        return op.regions[self.index]


def operand(doc: str, *, variadic: bool = False) -> Any:
    """A value read by the op. Only the last operand may be variadic."""
    return Field("operand", doc, variadic)


def attr(type: Any, doc: str, *, default: Any = _REQUIRED) -> Any:
    """An attribute of Python type (or Attribute/Type class) `type`; printed unless it equals its default."""
    return Field("attr", doc, type=type, default=default)


def result(doc: str, *, variadic: bool = False) -> Any:
    """A value made by the op."""
    return Field("result", doc, variadic)


def region(doc: str) -> Any:
    """A nested region of one block."""
    return Field("region", doc)


class Op(CoreOp):
    """Base of the declared ops; see the module docstring. Subclasses may override everything below the fields."""

    traits: ClassVar[tuple[type[Trait], ...]] = ()
    operand_fields: ClassVar[tuple[Field, ...]] = ()
    attr_fields: ClassVar[tuple[Field, ...]] = ()
    result_fields: ClassVar[tuple[Field, ...]] = ()
    region_fields: ClassVar[tuple[Field, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        found: dict[str, list[Field]] = {"operand": [], "attr": [], "result": [], "region": []}
        for key, value in list(vars(cls).items()):
            if isinstance(value, Field):
                group = found[value.kind]
                field = Field(value.kind, value.doc, value.variadic, value.type, value.default, len(group), key)
                setattr(cls, key, field)
                group.append(field)
        for kind, fields in found.items():
            if fields:
                setattr(cls, f"{kind}_fields", tuple(fields))

    def __init__(
        self,
        *operands: Value,
        regions: Sequence[Region] = (),
        result_types: Sequence[Type] | None = None,
        location: Location | None = None,
        origin: str = "",
        **named: Any,
    ) -> None:
        values = list(operands)
        for field in self.operand_fields[len(values) :]:
            if field.name in named:
                given = named.pop(field.name)
                values.extend(given if field.variadic else [given])
        attributes = {}
        for field in self.attr_fields:
            if field.name in named:
                attributes[field.name] = named.pop(field.name)
            elif not field.required:
                attributes[field.name] = field.default
            else:
                raise TypeError(f"{self.name} needs attribute {field.name!r}")
        if named:
            raise TypeError(f"{self.name} has no field {sorted(named)[0]!r}")
        if result_types is None:
            result_types = self.inferred_types([v.type for v in values], attributes, regions)
        if location is None:
            location = Location(origin=origin) if origin else NOWHERE
        super().__init__(values, result_types, attributes, regions, location)

    @classmethod
    def inferred_types(
        cls, operand_types: Sequence[Type], attributes: dict[str, Any], regions: Sequence[Region] = ()
    ) -> tuple[Type, ...]:
        """The result types that follow from operand types and attributes, always as a tuple.

        Raises ir.op_def.InferenceError when the operands do not fit the op.
        """
        inferred = cls.infer_types(*operand_types, **attributes)
        return inferred if isinstance(inferred, tuple) else (inferred,)

    @classmethod
    def infers(cls) -> bool:
        """Whether result types follow from operands, attributes and regions; False for ops that are given theirs."""
        return hasattr(cls, "infer_types") or cls.inferred_types.__func__ is not Op.inferred_types.__func__

    infer_types: ClassVar[Callable[..., Type | tuple[Type, ...]]]
    reference: ClassVar[Callable[..., Any]]

    def verify(self, diag: DiagnosticSink) -> None:
        """Reports what `infer_types` cannot know. The default has nothing to add."""

    def flops(self, sizes: dict[str, int]) -> int:
        """Floating-point operations (a multiply-add counts two) with the symbolic dims bound by `sizes`."""
        return 0

    def bytes_moved(self, sizes: dict[str, int]) -> int:
        """Bytes read and written when every operand is read once and every tensor result is written once."""
        read = sum(self.operand_bytes(i, sizes) for i in range(len(self.operands)))
        return read + sum(num_bytes(r.type, sizes) for r in self.results if isinstance(r.type, TensorType))

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        """Bytes of operand `index` that are read, or written in place.

        The whole of a tensor unless an op knows better; ops that touch a KV cache say how much of it.
        """
        type = self.operands[index].type
        return num_bytes(type, sizes) if isinstance(type, TensorType) else 0


class InferenceError(Exception):
    """Operand types that an op cannot take. The verifier and the parser turn it into a diagnostic at the op."""


OPS: dict[str, type[Op]] = {}
T = TypeVar("T", bound=type[Op])


def register_op(cls: T) -> T:
    """Class decorator: makes the op known to parser, interpreter and docs. A second op of the name is an error."""
    if cls.name in OPS:
        raise ValueError(f"op {cls.name} is registered by {OPS[cls.name].__module__} already")
    OPS[cls.name] = cls
    return cls


def expect(condition: bool, message: str) -> None:
    """For `infer_types`: raises InferenceError with `message` unless `condition` holds."""
    if not condition:
        raise InferenceError(message)
