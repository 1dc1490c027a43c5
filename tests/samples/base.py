"""Sample and Fault, and short ways to write types and values in them.

Values of the tile and plan level: a numpy scalar, a one-dimensional array for a vector, a Python int for an index,
`Stored(array)` for a buffer.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.builder import Builder
from ir.core import Block, Region
from ir.formats import BF16, F16, F32, I1, I32, I64, PLAIN_FORMATS, NumberFormat, PackedArray, PlainFormat
from ir.grid_async_model import PendingSums
from ir.grid_interpreter import Grid, GridEnvironment
from ir.grid_memory_model import GridBuffer, GridMemory
from ir.interpreter import Environment
from ir.kv_low_bit import LowBitKVState
from ir.kv_state import KVState
from ir.op_def import OPS, Op
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.grid_warpgroup import WARPGROUP
from ir.stream_interpreter import StreamEnvironment
from ir.stream_memory import StreamMemory
from ir.tile_interpreter import ProgramEnvironment, Team
from ir.tile_memory_model import BufferView, Memory
from ir.traits import WritesMemory, has_trait
from ir.types import (
    INDEX,
    BufferType,
    HandleType,
    IndexType,
    KVCacheType,
    ScalarType,
    SymbolicDim,
    TensorType,
    Type,
    VectorType,
)

TOKENS, ROWS, CTX = SymbolicDim("tokens"), SymbolicDim("rows"), SymbolicDim("ctx")
Regions = Callable[[], Sequence[Region]]


def no_regions() -> Sequence[Region]:
    return ()


@dataclass(frozen=True)
class Stored:
    """What a buffer holds at first, and whose it is. Every run gets a copy."""

    array: np.ndarray
    space: str = "global"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.array, dtype)


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
    if sample.op.startswith("grid."):
        return run_on_a_warp(op, sample.inputs)
    if sample.op.split(".")[0] not in ("tile", "plan"):
        return Environment(sample.weights, dict(sample.states)).run_op(op, sample.inputs)
    if any(isinstance(v.type, HandleType) for v in (*op.operands, *op.results)):
        return stream_environment().run_op(op, sample.inputs)
    return low_level_environment().run_op(op, [low_level_value(x) for x in sample.inputs])


A_SEGMENT, FULL_SLOT, EMPTY_SLOT, A_TOKEN = (np.int64(i) for i in range(4))


def stream_environment() -> StreamEnvironment:
    """What the samples of streaming ops name: a segment on disk, a slot that holds it, an empty one, a token."""
    memory = StreamMemory({"hbm": 4096})
    memory.segment("w", "disk", 64)
    memory.slots[int(memory.slot("gpu", "hbm", 64))].value = "w"
    memory.slot("gpu", "hbm", 64)
    memory.done()
    return StreamEnvironment(memory)


def low_level_environment() -> ProgramEnvironment:
    """One thread of a team of one, and what plan-level ops name: 4 tokens, 2 rows, 16 positions, 2 slots."""
    ids, logits, work = np.arange(4, dtype=np.int32), np.zeros(8, np.float32), np.zeros(4096, np.uint8)
    memories = {name: Memory(ids.copy(), name) for name in ("ids", "positions", "slots", "rows")}
    memories["logits"] = Memory(logits, "logits")
    memories |= {name: Memory(work.copy(), name) for name in ("weights", "arena", "kv cache", "kv plane 1", "pieces")}
    kernel = FuncOp.create("nothing", [BufferType(F32), BufferType(F32), INDEX])
    Builder.at_end(kernel.block).insert(ReturnOp())
    alone = FuncOp.create("alone", [BufferType(F32), INDEX])
    Builder.at_end(alone.block).insert(ReturnOp())
    team = Team(1, list(memories.values()))
    sizes = {"tokens": 4, "rows": 2, "ctx": 16, "slots": 2}
    return ProgramEnvironment(team, 0, {"nothing": kernel, "alone": alone}, memories, sizes)


def run_on_a_warp(op: Op, inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What the first thread of a warp, or four, has when all threads run the op on these inputs; alone where it writes.

    Barriers are made before, sums waited for after.
    """
    grid = Grid(1, WARPGROUP if type(op).__module__ == "ir.ops.grid_warpgroup" else 32)
    values = [grid_value(x, grid) for x in inputs]
    for value in values:
        if isinstance(value, GridBuffer) and value.element == I64:
            grid.bulk.init(value, np.arange(grid.total) % (value.memory.size // 8))
    grid.active[1:] = not has_trait(op, WritesMemory)  # they would race
    results = GridEnvironment(grid).run_op(op, values)
    known = (r.values if isinstance(r, PendingSums) else r for r in results)
    return tuple(r if isinstance(r, GridBuffer) else r[0] for r in known)


def grid_value(value: Any, grid: Grid) -> Any:
    """A sample's input as the interpreter of grids holds it: one for all threads."""
    if isinstance(value, Stored):
        nbytes, element = value.array.nbytes, format_of(value.array.dtype)
        memory = GridMemory(grid, value.space, "sample", size=nbytes)
        memory.bytes[:nbytes] = np.ascontiguousarray(value.array).view(np.uint8)
        return GridBuffer(memory, element)
    return np.asarray(np.int64(value) if type(value) is int else value)[None]


def low_level_value(value: Any) -> Any:
    """A sample's input as the interpreter of the tile and plan level holds it."""
    if isinstance(value, Stored):
        array = value.array.copy()
        return BufferView(Memory(array, "sample"), format_of(array.dtype))
    return np.int64(value) if type(value) is int else value


def sample(op: str, label: str, /, *inputs: Any, types: Sequence[Type] = (), **named: Any) -> Sample:
    """A sample whose operand types are those of its inputs unless `types` says them with symbols.

    The arrays are made read-only: a reference that writes its inputs fails at once.
    """
    for value in inputs:
        for array in parts_of(value):
            array.flags.writeable = False
    regions = named.pop("regions", no_regions)
    return Sample(op, label, inputs, tuple(types) or tuple(type_of(x) for x in inputs), named, regions)


def parts_of(value: Any) -> tuple[np.ndarray, ...]:
    """The arrays that a value is made of."""
    if isinstance(value, KVState):
        return tuple(v for v in vars(value).values() if isinstance(v, np.ndarray))
    if isinstance(value, PackedArray):
        return tuple(v for v in vars(value).values() if isinstance(v, np.ndarray))
    return (np.asarray(value),)


def low_sample(op: str, label: str, /, *inputs: Any, **named: Any) -> Sample:
    """A sample of the tile or plan level; operand types are those of the inputs, `result_types` may be given."""
    for value in inputs:
        if isinstance(value, np.ndarray):
            value.flags.writeable = False
    regions, result_types = named.pop("regions", no_regions), named.pop("result_types", None)
    return Sample(op, label, inputs, tuple(low_level_type(x) for x in inputs), named, regions, result_types)


def fault(
    op: str,
    message: str,
    /,
    *types: Type,
    regions: Regions = no_regions,
    result_types: tuple[Type, ...] | None = None,
    **attributes: Any,
) -> Fault:
    return Fault(op, types, message, attributes, regions, result_types)


def type_of(value: np.ndarray | PackedArray | KVState) -> Type:
    """The type of an array (all sizes known) or of a KV state."""
    if isinstance(value, PackedArray):
        return TensorType(value.shape, value.format)
    if isinstance(value, LowBitKVState):
        return value.type
    if isinstance(value, KVState):
        return KVCacheType(value.keys.shape[2], value.keys.shape[3], format_of(value.dtype))
    return TensorType(value.shape, format_of(value.dtype))


def low_level_type(value: Any) -> Type:
    """The tile-level type of a sample's input or of what the interpreter holds."""
    if type(value) is int:
        return INDEX
    if isinstance(value, Stored):
        return BufferType(format_of(value.array.dtype), value.space)
    if isinstance(value, GridBuffer):
        return BufferType(value.element, value.memory.space)
    if isinstance(value, BufferView):
        return BufferType(value.element, "global" if value.memory.shared else "private")
    element = format_of(value.dtype)
    return VectorType(len(value), element) if isinstance(value, np.ndarray) else ScalarType(element)


def type_like(value: Any, type: Type) -> Type:
    """The type of a value, in the family of `type`: an array is a tensor or a vector, an int64 an i64 or an index."""
    if isinstance(type, TensorType | KVCacheType):
        return type_of(value)
    if isinstance(type, IndexType | HandleType) and isinstance(value, np.int64):
        return type
    return low_level_type(value)


def format_of(dtype: np.dtype) -> PlainFormat:
    return next(f for f in PLAIN_FORMATS.values() if f.dtype == dtype)


def t(*shape: Any, element: NumberFormat = F32) -> TensorType:
    """tensor<... x f32>"""
    return TensorType(shape, element)


def normal(*shape: int, seed: str = "", element: PlainFormat = F32, scale: float = 1.0) -> np.ndarray:
    """Normal numbers, the same ones for the same arguments."""
    rng = np.random.default_rng(zlib.crc32(repr((shape, seed)).encode()))
    return np.asarray(rng.standard_normal(shape) * scale).astype(element.dtype)


def packed(values: np.ndarray, format: Any) -> PackedArray:
    """The values in a low-bit format."""
    return format.pack(values)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def cache(slots: int, ctx: int, heads: int, dim: int, element: PlainFormat = F32) -> KVState:
    """A KV state full of numbers, so that reading a position one must not see shows."""
    shape = (slots, ctx, heads, dim)
    return KVState(normal(*shape, seed="keys", element=element), normal(*shape, seed="values", element=element))


def low_bit_cache(slots: int, ctx: int, type: KVCacheType) -> KVState:
    """The same in a low-bit format."""
    shape = (slots, ctx, type.num_kv_heads, type.head_dim)
    return LowBitKVState.of(type, normal(*shape, seed="keys"), normal(*shape, seed="values"))


__all__ = [
    "BF16", "CTX", "F16", "F32", "I1", "I32", "ROWS", "TOKENS", "Fault", "Sample", "Stored",
    "cache", "fault", "ints", "low_bit_cache", "low_sample", "normal", "packed", "parts_of", "run_sample", "sample",
    "t", "type_like", "type_of",
]  # fmt: skip
