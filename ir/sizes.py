"""Sizes of types once the symbolic dimensions are bound: element counts and bytes, for cost estimates and checks.

`sizes` maps the name of a dimension (`tokens`, `rows`, `ctx`) to its number.
"""

from __future__ import annotations

from ir.types import Dim, SymbolicDim, TensorType, Type


def dim_size(dim: Dim, sizes: dict[str, int]) -> int:
    """The number a dimension stands for. Raises KeyError when `sizes` does not bind its name."""
    return sizes[dim.name] * dim.scale if isinstance(dim, SymbolicDim) else dim


def num_elements(type: Type, sizes: dict[str, int]) -> int:
    """How many elements a tensor has (padding of a layout not counted)."""
    if not isinstance(type, TensorType):
        raise TypeError(f"{type} is no tensor")
    count = 1
    for dim in type.shape:
        count *= dim_size(dim, sizes)
    return count


def num_bytes(type: Type, sizes: dict[str, int]) -> int:
    """Exact bytes of a tensor; a weight with a layout counts its zero padding."""
    if not isinstance(type, TensorType):
        raise TypeError(f"{type} is no tensor")
    shape = tuple(dim_size(d, sizes) for d in type.shape)
    if type.layout is not None:
        shape = (*shape[:-2], *type.layout.padded(*shape[-2:]))
    return type.element.nbytes(shape)
