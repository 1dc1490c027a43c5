"""Types of values, narrowed for passes that know which kind of value they look at."""

from __future__ import annotations

from ir.core import Value
from ir.types import TensorType


def tensor_type(value: Value) -> TensorType:
    """The type of a tensor. An assertion fails for other values: the caller knows that it has a tensor."""
    assert isinstance(value.type, TensorType), f"expected a tensor, got {value.type}"
    return value.type
