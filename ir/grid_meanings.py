"""The meaning of tile ops for all threads of a grid at once.

Each entry computes on arrays with the threads along the first axis what the op's `reference` computes for one thread;
an op without an entry is run thread by thread. tests/ir/test_grid_meanings.py compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ir.core import Op
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.grid_async_model import PendingSums
from ir.grid_memory_model import GridBuffer
from ir.ops import grid, grid_warpgroup, tile, tile_control, tile_convert, tile_lanes, tile_memory, tile_products
from ir.ops.tile_types import element_of, lanes_of
from ir.tile_memory_model import KernelFault
from ir.types import VectorType

Meaning = Callable[[Any, Sequence[Any], Any], tuple[Any, ...]]  # (op, values, environment) -> results
MEANINGS: dict[type[Op], Meaning] = {}
_SHARED_WITH_CPUS = ("tile", "func", "grid")
_KNOWS_PENDING = (grid_warpgroup.GroupMmaOp, grid_warpgroup.WaitMmaOp, tile_control.ForOp)


def meaning(op_class: type[Op]) -> Callable[[Meaning], Meaning]:
    """Decorator: the function runs ops of this class for all threads."""

    def register(function: Meaning) -> Meaning:
        MEANINGS[op_class] = function
        return function

    return register


def run_for_all(op: Op, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    """The results of an op, each with the threads along its first axis."""
    if not isinstance(op, _KNOWS_PENDING) and any(isinstance(v, PendingSums) for v in values):
        raise KernelFault(f"'{op.name}' reads sums of a product that has not been waited for")
    found = MEANINGS.get(type(op))
    if found is not None:
        return found(op, values, environment)
    if op.name.startswith("grid.") and hasattr(op, "interpret"):
        return op.interpret(values, environment)  # pyright: ignore[reportAttributeAccessIssue]
    if not hasattr(op, "reference") or op.name.split(".")[0] not in _SHARED_WITH_CPUS:
        message = f"'{op.name}' is not run by the threads of a grid"
        raise DiagnosticError.of(Diagnostic("error", message, op.location))
    return _thread_by_thread(op, values)


def _thread_by_thread(op: Any, values: Sequence[Any]) -> tuple[Any, ...]:
    rows = max((len(v) for v in values), default=1)
    each = [op.reference(*(v[i % len(v)] for v in values), **op.attributes) for i in range(rows)]
    return (np.stack(each),)


def _lane_by_lane(op: Any, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    """The reference takes arrays of any shape."""
    return (np.asarray(op.reference(*values, **op.attributes)),)


for _class in (
    *(tile.AddOp, tile.SubOp, tile.MulOp, tile.DivOp, tile.RemOp, tile.MinOp, tile.MaxOp, tile.AndOp, tile.OrOp),
    *(tile.ShlOp, tile.ShrOp, tile.SqrtOp, tile.RoundOp, tile_products.FmaOp, tile_lanes.CompareOp),
    *(tile_convert.CastOp, grid.Exp2Op, grid.FmaPairsOp),
):
    MEANINGS[_class] = _lane_by_lane


@meaning(tile.ConstantOp)
def _constant(op: tile.ConstantOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    (value,) = op.interpret(values, environment)
    return (np.asarray(value)[None],)


@meaning(tile_convert.ToIndexOp)
def _to_index(op: tile_convert.ToIndexOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].astype(np.int64),)


@meaning(tile_convert.FromIndexOp)
def _from_index(op: tile_convert.FromIndexOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].astype(np.int32),)


@meaning(tile_convert.BitcastOp)
def _bitcast(op: tile_convert.BitcastOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    x = values[0]
    bits = np.ascontiguousarray(x.reshape(len(x), -1)).view(element_of(op.to).dtype)
    return (bits if isinstance(op.to, VectorType) else bits[:, 0],)


@meaning(tile_lanes.SelectOp)
def _select(op: tile_lanes.SelectOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (_where(*values),)


def _where(condition: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if condition.ndim < a.ndim:
        condition = condition[:, None]
    return np.where(condition, a, b).astype(a.dtype)


@meaning(tile_lanes.SplatOp)
def _splat(op: tile_lanes.SplatOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (np.repeat(values[0][:, None], op.lanes, axis=1),)


@meaning(tile_lanes.IotaOp)
def _iota(op: tile_lanes.IotaOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (np.arange(op.lanes, dtype=np.int32)[None],)


@meaning(tile_lanes.ExtractOp)
def _extract(op: tile_lanes.ExtractOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0][:, op.lane],)


@meaning(tile_lanes.ReduceOp)
def _reduce(op: tile_lanes.ReduceOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (np.asarray(op.reference(values[0].T, op.kind)),)  # lanes along the first axis


@meaning(grid.PartOp)
def _part(op: grid.PartOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0][:, op.first : op.first + op.lanes],)


@meaning(grid.JoinOp)
def _join(op: grid.JoinOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    rows = max(map(len, values))
    wide = [v.reshape(len(v), -1) for v in values]
    return (np.concatenate([np.broadcast_to(v, (rows, v.shape[1])) for v in wide], axis=1),)


# -- memory


@meaning(tile_memory.LoadOp)
def _load(op: tile_memory.LoadOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].load(values[1], op.lanes),)


@meaning(tile_memory.StoreOp)
def _store(op: tile_memory.StoreOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    values[0].store(values[1], values[2])
    return ()


@meaning(tile_memory.LoadMaskedOp)
def _load_masked(op: tile_memory.LoadMaskedOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].load_masked(values[1], values[2]),)


@meaning(tile_memory.StoreMaskedOp)
def _store_masked(op: tile_memory.StoreMaskedOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    buffer, index, value, mask = values
    lanes = lanes_of(op.value.type)
    spread = environment.grid.spread
    buffer.store_masked(index, spread(value).reshape(-1, lanes), spread(mask).reshape(-1, lanes))
    return ()


@meaning(tile_memory.GatherOp)
def _gather(op: tile_memory.GatherOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    buffer, index = values
    return (np.stack([buffer.load(index[:, lane], 1) for lane in range(index.shape[1])], axis=1),)


@meaning(tile_memory.PrefetchOp)
def _prefetch(op: tile_memory.PrefetchOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return ()


@meaning(tile_memory.OffsetOp)
def _offset(op: tile_memory.OffsetOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].offset(values[1]),)


@meaning(tile_memory.ViewOp)
def _view(op: tile_memory.ViewOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (values[0].view(op.element),)


@meaning(tile_memory.ScratchOp)
def _scratch(op: tile_memory.ScratchOp, values: Sequence[Any], environment: Any) -> tuple[GridBuffer]:
    return (environment.grid.private(op.size, op.element),)


# -- threads and control flow


@meaning(tile_control.ThreadIdOp)
def _thread_id(op: tile_control.ThreadIdOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (np.arange(environment.grid.total, dtype=np.int64) % environment.grid.threads,)


@meaning(tile_control.NumThreadsOp)
def _num_threads(op: tile_control.NumThreadsOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    return (np.array([environment.grid.threads], np.int64),)


@meaning(tile_control.BarrierOp)
def _barrier(op: tile_control.BarrierOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    environment.grid.barrier(op)
    return ()


@meaning(tile_control.ForOp)
def _for(op: tile_control.ForOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    """Threads leave the loop one by one where their bounds differ."""
    lower, upper, step, *carried = values
    who = environment.grid
    if (np.broadcast_to(step, who.total)[who.active] < 1).any():
        raise KernelFault(f"'tile.for' expected a step above 0, got {int(np.min(step))}")
    if len(lower) == len(upper) == len(step) == 1:
        for i in range(int(lower[0]), int(upper[0]), int(step[0])):
            carried = environment.run_region(op.body, [np.array([i], np.int64), *carried])
        return tuple(carried)
    outer, i = who.active, who.spread(lower)
    while True:
        who.active = outer & (i < upper)
        if not who.active.any():
            break
        following = environment.run_region(op.body, [i, *carried])
        carried = [_where(who.active, new, old) for new, old in zip(following, carried, strict=True)]
        i = i + step
    who.active = outer
    return tuple(carried)


@meaning(tile_control.IfOp)
def _if(op: tile_control.IfOp, values: Sequence[Any], environment: Any) -> tuple[Any, ...]:
    """Both bodies, each with the threads that take it."""
    (condition,) = values
    if len(condition) == 1:
        return environment.run_region(op.then if condition[0] else op.otherwise, ())
    who = environment.grid
    outer, made = who.active, []
    for region, taken in ((op.then, condition), (op.otherwise, ~condition)):
        who.active = outer & taken
        made.append(environment.run_region(region, ()) if who.active.any() else None)
    who.active = outer
    first, second = made
    if first is None or second is None:
        return second or first or ()
    return tuple(_where(condition, a, b) for a, b in zip(first, second, strict=True))
