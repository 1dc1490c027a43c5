"""What the tile ops ask of the types of scalars and vectors."""

from __future__ import annotations

from ir.formats import F32, F64, I32, I64, PlainFormat
from ir.op_def import expect
from ir.types import IndexType, ScalarType, Type, VectorType


def element_of(type: Type) -> PlainFormat:
    """The number format of a scalar or vector; raises InferenceError for other types. `index` counts as i64."""
    if isinstance(type, IndexType):
        return I64
    expect(isinstance(type, ScalarType | VectorType), f"expected a scalar or vector, got {type}")
    element = type.element  # pyright: ignore[reportAttributeAccessIssue]
    expect(isinstance(element, PlainFormat), f"expected a plain element, got {element}")
    return element


def with_element(type: Type, element: PlainFormat) -> Type:
    """The type of the same shape (scalar or vector of as many lanes) with another element."""
    return VectorType(type.lanes, element) if isinstance(type, VectorType) else ScalarType(element)


def lanes_of(type: Type) -> int:
    """Lanes of a vector; 1 for scalars."""
    return type.lanes if isinstance(type, VectorType) else 1


def is_float(type: Type) -> bool:
    return element_of(type).is_float


ARITHMETIC = (F32, F64, I32, I64)  # what registers compute with; index counts as i64


def check_arithmetic(type: Type, elements: tuple[PlainFormat, ...] = ARITHMETIC) -> None:
    """Raises InferenceError for a type whose element is none of `elements`."""
    words = ", ".join(map(str, elements))
    expect(element_of(type) in elements, f"works on {words}, got {type}")


def check_lanes(lanes: int) -> None:
    """Raises InferenceError for a vector without lanes."""
    expect(lanes >= 1, f"expected 1 lane or more, got {lanes}")
