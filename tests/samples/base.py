"""Sample and Fault, and short ways to write types and arrays in them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.builder import Builder
from ir.core import Block, Region
from ir.formats import BF16, F16, F32, I1, I32, PLAIN_FORMATS, PlainFormat
from ir.interpreter import Environment
from ir.kv_state import KVState
from ir.op_def import OPS, Op
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.types import KVCacheType, SymbolicDim, TensorType, Type

TOKENS, ROWS, CTX = SymbolicDim("tokens"), SymbolicDim("rows"), SymbolicDim("ctx")
Regions = Callable[[], Sequence[Region]]


def no_regions() -> Sequence[Region]:
    return ()


@dataclass(frozen=True)
class Sample:
    """A valid instance of an op. `inputs` are arrays and KV states, one per operand, `types` their types."""

    op: str
    label: str
    inputs: tuple[Any, ...]
    types: tuple[Type, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    regions: Regions = no_regions
    result_types: tuple[Type, ...] | None = None
    weights: dict[str, np.ndarray] = field(default_factory=dict)
    states: dict[str, KVState] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.op}-{self.label}"

    def build(self) -> tuple[Block, Op]:
        """A fresh block whose arguments are the operands, and the op inside."""
        return _build(self.op, self.types, self.attributes, self.regions(), self.result_types)

    def module(self) -> ModuleOp:
        """A module with one function `@sample` that takes the operands and returns the results."""
        func = FuncOp.create("sample", self.types)
        op = OPS[self.op](*func.arguments, regions=self.regions(), result_types=self.result_types, **self.attributes)
        builder = Builder.at_end(func.block)
        builder.insert(op)
        builder.insert(ReturnOp(*op.results))
        return ModuleOp.create(func)


@dataclass(frozen=True)
class Fault:
    """An instance that inference or verification refuses with a message that contains `message`."""

    op: str
    types: tuple[Type, ...]
    message: str
    attributes: dict[str, Any] = field(default_factory=dict)
    regions: Regions = no_regions
    result_types: tuple[Type, ...] | None = None

    def __str__(self) -> str:
        return f"{self.op}-{self.message}"

    def build(self) -> tuple[Block, Op]:
        return _build(self.op, self.types, self.attributes, self.regions(), self.result_types)


def _build(
    name: str,
    types: Sequence[Type],
    attributes: dict[str, Any],
    regions: Sequence[Region],
    result_types: Sequence[Type] | None,
) -> tuple[Block, Op]:
    block = Block(types)
    op = OPS[name](*block.arguments, regions=regions, result_types=result_types, **attributes)
    block._insert(0, op)
    return block, op


def run_sample(sample: Sample) -> tuple[Any, ...]:
    """The results of a sample by its op's meaning."""
    _, op = sample.build()
    return Environment(sample.weights, dict(sample.states)).run_op(op, sample.inputs)


def sample(op: str, label: str, /, *inputs: Any, types: Sequence[Type] = (), **named: Any) -> Sample:
    """A sample whose operand types are those of its inputs unless `types` says them with symbols.

    The arrays are made read-only: a reference that writes its inputs fails at once.
    """
    for value in inputs:
        for array in (value.keys, value.values) if isinstance(value, KVState) else (value,):
            array.flags.writeable = False
    regions = named.pop("regions", no_regions)
    return Sample(op, label, inputs, tuple(types) or tuple(type_of(x) for x in inputs), named, regions)


def fault(op: str, message: str, /, *types: Type, regions: Regions = no_regions, **attributes: Any) -> Fault:
    return Fault(op, types, message, attributes, regions)


def type_of(value: np.ndarray | KVState) -> Type:
    """The type of an array (all sizes known) or of a KV state."""
    if isinstance(value, KVState):
        return KVCacheType(value.keys.shape[2], value.keys.shape[3], format_of(value.dtype))
    return TensorType(value.shape, format_of(value.dtype))


def format_of(dtype: np.dtype) -> PlainFormat:
    return next(f for f in PLAIN_FORMATS.values() if f.dtype == dtype)


def t(*shape: Any, element: PlainFormat = F32) -> TensorType:
    """tensor<... x f32>"""
    return TensorType(shape, element)


def normal(*shape: int, seed: str = "", element: PlainFormat = F32, scale: float = 1.0) -> np.ndarray:
    """Normal numbers, the same ones for the same arguments."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return np.asarray(rng.standard_normal(shape) * scale).astype(element.dtype)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def cache(slots: int, ctx: int, heads: int, dim: int, element: PlainFormat = F32) -> KVState:
    """A KV state full of numbers, so that reading a position one must not see shows."""
    shape = (slots, ctx, heads, dim)
    return KVState(normal(*shape, seed="keys", element=element), normal(*shape, seed="values", element=element))


__all__ = [
    "BF16", "CTX", "F16", "F32", "I1", "I32", "ROWS", "TOKENS", "Fault", "Sample",
    "cache", "fault", "ints", "normal", "run_sample", "sample", "t", "type_of",
]  # fmt: skip
