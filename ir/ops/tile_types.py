"""What the tile ops ask of the types of scalars and vectors.

Kernels have many thousand ops, so messages are written only where something is refused.
"""

from __future__ import annotations

from ir.formats import F32, F64, I32, I64, PlainFormat
from ir.op_def import InferenceError, expect
from ir.types import IndexType, ScalarType, Type, VectorType


def element_of(type: Type) -> PlainFormat:
    """The number format of a scalar or vector; raises InferenceError for other types. `index` counts as i64."""
    if isinstance(type, IndexType):
        return I64
    if not isinstance(type, (ScalarType, VectorType)):
        raise InferenceError(f"expected a scalar or vector, got {type}")
    element = type.element
    if not isinstance(element, PlainFormat):
        raise InferenceError(f"expected a plain element, got {element}")
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
    if element_of(type) not in elements:
        raise InferenceError(f"works on {', '.join(map(str, elements))}, got {type}")


def check_lanes(lanes: int) -> None:
    """Raises InferenceError for a vector without lanes."""
    expect(lanes >= 1, f"expected 1 lane or more, got {lanes}")
