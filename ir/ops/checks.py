"""Checks that the ops' `infer_types` share. Each raises InferenceError saying what was expected and what was found."""

from __future__ import annotations

from ir.diagnostics import DiagnosticError
from ir.formats import BF16, F16, F32, NumberFormat, PlainFormat
from ir.op_def import InferenceError, expect
from ir.types import Dim, KVCacheType, SymbolicDim, TensorType, Type

FLOATS = (F32, BF16, F16)  # the elements of activations and weights


def tensor(type: Type, name: str, rank: int | None = None, min_rank: int = 0) -> TensorType:
    """`type` as a tensor of the wanted rank."""
    if not isinstance(type, TensorType):
        raise InferenceError(f"expected {name} to be a tensor, got {type}")
    if rank is not None:
        expect(type.rank == rank, f"expected {name} of rank {rank}, got {type}")
    expect(type.rank >= min_rank, f"expected {name} of rank {min_rank} or more, got {type}")
    return type


def float_tensor(type: Type, name: str, rank: int | None = None, min_rank: int = 0) -> TensorType:
    """`type` as a tensor of f32, bf16 or f16."""
    found = tensor(type, name, rank, min_rank)
    expect(found.element in FLOATS, f"expected {name} of f32, bf16 or f16, got {found}")
    return found


def low_bit_format(format: NumberFormat) -> NumberFormat:
    """`format`, which must store its elements in groups with scales."""
    expect(
        not isinstance(format, PlainFormat), f"expected a low-bit format like q4_sym<group=32, scale=f16>, got {format}"
    )
    return format


def low_bit(type: TensorType) -> TensorType:
    """`type`, whose last dimension must be one that its low-bit format can hold."""
    k = known(type.shape[-1], "last dimension of a low-bit tensor")
    try:
        type.element.nbytes((1, k))
    except DiagnosticError as error:
        fault = error.diagnostics[0]
        wanted = [f"; expected {note.message}" for note in fault.notes if note.severity == "expected"]
        raise InferenceError(fault.message + "".join(wanted)) from error
    return type


def low_bit_tensor(type: Type, name: str, rank: int | None = None) -> TensorType:
    """`type` as a tensor in a low-bit format."""
    found = tensor(type, name, rank)
    expect(not isinstance(found.element, PlainFormat), f"expected {name} in a low-bit format, got {found}")
    return low_bit(found)


def factor(type: Type, name: str, rank: int) -> TensorType:
    """`type` as something that a product can multiply: a tensor of floats or of low-bit numbers."""
    found = tensor(type, name, rank)
    return float_tensor(found, name) if isinstance(found.element, PlainFormat) else low_bit(found)


def i32_tensor(type: Type, name: str, rank: int = 1) -> TensorType:
    """`type` as a tensor of i32 (ids, positions, slots, offsets)."""
    found = tensor(type, name, rank)
    expect(str(found.element) == "i32", f"expected {name} of i32, got {found}")
    return found


def kv_cache(type: Type, name: str = "cache") -> KVCacheType:
    """`type` as the type of a KV cache."""
    if not isinstance(type, KVCacheType):
        raise InferenceError(f"expected {name} to be a kv cache, got {type}")
    expect(not type.fault, type.fault)
    return type


def same(what: str, first: object, second: object) -> None:
    """`what` reads like "k of x and w"."""
    expect(first == second, f"expected {what} to match, got {first} and {second}")


def axis_of(type: TensorType, axis: int) -> int:
    """`axis`, which must be a dimension of `type` counted from the front."""
    expect(0 <= axis < type.rank, f"expected 0 <= axis < {type.rank}, got axis = {axis}")
    return axis


def known(dim: Dim, what: str) -> int:
    """`dim`, which must be a number."""
    if isinstance(dim, SymbolicDim):
        raise InferenceError(f"expected a known {what}, got {dim}")
    return dim


def times(dim: Dim, factor: int) -> Dim:
    """`dim * factor` for numbers and symbols alike."""
    return dim * factor


def divided(dim: Dim, divisor: int, what: str) -> Dim:
    """`dim / divisor`, which must leave no rest."""
    value = dim.scale if isinstance(dim, SymbolicDim) else dim
    expect(divisor > 0 and value % divisor == 0, f"expected {what} to be a multiple of {divisor}, got {dim}")
    return SymbolicDim(dim.name, value // divisor) if isinstance(dim, SymbolicDim) else value // divisor


def sum_of(total: Dim, dim: Dim, index: int) -> Dim:
    """The size of two joined dimensions: numbers add, multiples of one symbol add, others have no name."""
    if total == 0:
        return dim
    if isinstance(total, int) and isinstance(dim, int):
        return total + dim
    if isinstance(total, SymbolicDim) and isinstance(dim, SymbolicDim) and total.name == dim.name:
        return SymbolicDim(dim.name, total.scale + dim.scale)
    raise InferenceError(f"expected sizes along the axis that add up, got {total} and {dim} at operand {index}")


def count_of(shape: tuple[Dim, ...]) -> tuple[int, tuple[str, ...]]:
    """(product of the numbers, sorted names of the symbols): equal for shapes of as many elements."""
    count = 1
    for dim in shape:
        count *= dim.scale if isinstance(dim, SymbolicDim) else dim
    return count, tuple(sorted(d.name for d in shape if isinstance(d, SymbolicDim)))


def broadcast(a: Type, b: Type) -> TensorType:
    """The larger of two tensors, the smaller of which has the trailing dimensions of the larger."""
    first, second = float_tensor(a, "a"), float_tensor(b, "b")
    same("elements of a and b", first.element, second.element)
    large, small = (first, second) if first.rank >= second.rank else (second, first)
    fits = large.shape[large.rank - small.rank :] == small.shape
    expect(fits, f"expected equal shapes or one being the trailing dimensions of the other, got {first} and {second}")
    return large
