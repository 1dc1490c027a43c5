"""Interpreter: runs a function op by op on numpy values. What it computes is what the IR means.

An op means what its `reference(*operands, **attributes)` returns: one value, or a tuple of several. An op that needs
more (its regions, a weight, a KV cache, memory) has `interpret(self, values, context) -> tuple` instead, where
`context` is the Environment: `context.run_region(region, args)`, `context.weight(name)`, `context.state(name)`.

Values: a tensor is an array of its element's dtype (a PackedArray in a low-bit format), a KV cache is an
`ir.kv_state.KVState`; what tile-level types hold is up to the ops of that level.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from ir.core import Block, Op, Region, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.formats import PackedArray, PlainFormat
from ir.kv_low_bit import empty_state
from ir.kv_state import KVState
from ir.op_def import Op as DeclaredOp
from ir.ops.builtin import FuncOp
from ir.spelling import did_you_mean
from ir.traits import Terminator, WritesKVCache
from ir.types import KVCacheType, SymbolicDim, TensorType

Weights = Callable[[str], np.ndarray] | Mapping[str, np.ndarray]


def interpret(
    func: FuncOp,
    inputs: Sequence[Any],
    *,
    weights: Weights | None = None,
    states: MutableMapping[str, KVState] | None = None,
) -> list[Any]:
    """The results of `func` on `inputs`, one value per argument of the function.

    `weights` gives the array of a constant's symbol. `states` holds the KV caches by symbol; when the function is done
    it holds their newest versions. Raises DiagnosticError for inputs, weights and states that do not fit.
    """
    environment = Environment(weights or {}, states if states is not None else {})
    environment.check_inputs(func, inputs)
    results = environment.run_block(func.block, inputs)
    environment.write_back()
    return results


@dataclass(frozen=True)
class _Meaning:
    """What the interpreter asks of a class of ops: its meaning (one of the two, or none), and two of its traits."""

    interpret: Callable[..., Any] | None
    reference: Callable[..., Any] | None
    ends: bool
    writes: bool


@cache
def _meaning_of(kind: type) -> _Meaning:
    """Kernels run some hundred thousand ops, of a few dozen classes."""
    traits = getattr(kind, "traits", ())
    interpret, reference = getattr(kind, "interpret", None), getattr(kind, "reference", None)
    return _Meaning(interpret, reference, Terminator in traits, WritesKVCache in traits)


_OF_A_TEAM = ("team", "thread", "wait", "place", "sizes", "launch")


class Environment:
    """The values known so far. `values` maps every SSA value that has been computed to what it holds."""

    def __init__(self, weights: Weights, states: MutableMapping[str, KVState]) -> None:
        self.values: dict[Value, Any] = {}
        self.weights = weights
        self.states = states
        self.newest: dict[str, KVState] = {}
        self._symbol_of: dict[int, tuple[str, KVState]] = {}  # keyed by id; the state beside it keeps the id alive
        self._running: Op | None = None

    def __getattr__(self, name: str) -> Any:
        """What ops of the plan and tile level ask for exists only where a team of threads runs them."""
        if name in _OF_A_TEAM and self._running is not None:
            message = f"'{self._running.name}' runs on a team of threads: use ir.tile_interpreter"
            raise _error_at(self._running, message)
        if name == "grid" and self._running is not None:
            raise _error_at(self._running, f"'{self._running.name}' runs on a GPU: use ir.grid_interpreter")
        if name == "stream" and self._running is not None:
            message = f"'{self._running.name}' moves data between memories: use ir.stream_interpreter"
            raise _error_at(self._running, message)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def run_block(self, block: Block, args: Sequence[Any]) -> list[Any]:
        """Runs the ops of a block whose arguments are `args`; the operands of its terminator."""
        values = self.values
        values.update(zip(block.arguments, args, strict=True))
        for op in block.ops:
            read = [values[v] for v in op._operands]
            if _meaning_of(type(op)).ends:
                return read
            made, results = self.run_op(op, read), op.results
            if len(results) == len(made) == 1:  # as nearly all have
                values[results[0]] = made[0]
            else:
                values.update(zip(results, made, strict=True))
        return []

    def run_region(self, region: Region, args: Sequence[Any]) -> tuple[Any, ...]:
        """`run_block` on the only block of a region, as a tuple."""
        return tuple(self.run_block(region.block, args))

    def run_op(self, op: Op, read: Sequence[Any]) -> tuple[Any, ...]:
        """The results of `op` when its operands hold `read`."""
        outer, self._running = self._running, op
        meaning = _meaning_of(type(op))
        try:
            if meaning.interpret is not None:
                made = meaning.interpret(op, read, self)
            elif meaning.reference is not None:
                made = meaning.reference(*read, **op.attributes)
            else:
                raise _error_at(op, f"'{op.name}' has no meaning that the interpreter knows")
        except IndexError as error:
            raise _error_at(op, f"'{op.name}' {error}") from error
        self._running = outer
        results = made if isinstance(made, tuple) else (made,)
        if meaning.writes:
            self._track(read, results)
        return results

    def _track(self, read: Sequence[Any], made: Sequence[Any]) -> None:
        """Remembers which cache the new version belongs to."""
        for old, new in zip(_states(read), _states(made), strict=True):
            known = self._symbol_of.get(id(old))
            if known is not None:
                self._symbol_of[id(new)] = (known[0], new)
                self.newest[known[0]] = new

    def weight(self, name: str) -> np.ndarray:
        """The array of a constant. Raises DiagnosticError when there is none of that name."""
        if callable(self.weights):
            return self.weights(name)
        if name not in self.weights:
            raise self._missing("weight", name, self.weights)
        return self.weights[name]

    def state(self, name: str) -> KVState:
        """The KV cache that the run began with. Raises DiagnosticError when there is none of that name."""
        if name not in self.states:
            raise self._missing("kv state", name, self.states)
        state = replace(self.states[name])  # an object of its own: caches are told apart by identity
        self._symbol_of[id(state)] = (name, state)
        return state

    def _missing(self, what: str, name: str, known: Mapping[str, Any]) -> DiagnosticError:
        message = f"no {what} is named {name!r}{did_you_mean(name, known)}"
        return _error_at(self._running, message) if self._running else DiagnosticError(message)

    def write_back(self) -> None:
        """Puts the newest version of every KV cache into `states`."""
        self.states.update(self.newest)

    def check_inputs(self, func: FuncOp, inputs: Sequence[Any]) -> None:
        """Raises DiagnosticError unless the inputs have the number, elements and shapes that the arguments declare."""
        where = func.location.prefix() or f"@{func.sym_name}"
        if len(inputs) != len(func.arguments):
            raise DiagnosticError(f"expected {len(func.arguments)} inputs, got {len(inputs)}", where=where)
        sizes: dict[str, int] = {}
        for index, (argument, value) in enumerate(zip(func.arguments, inputs, strict=True)):
            name = f"input {index}" + (f" (%{argument.name_hint})" if argument.name_hint else "")
            if isinstance(argument.type, TensorType) and not _fits(argument.type, value, sizes):
                found = _described(value)
                bound = ", ".join(f"{k} = {v}" for k, v in sizes.items())
                raise DiagnosticError(
                    f"expected {name} to be {argument.type}{f' with {bound}' if bound else ''}, got {found}",
                    where=where,
                )


def _states(values: Sequence[Any]) -> list[KVState]:
    return [v for v in values if isinstance(v, KVState)]


def _described(value: Any) -> str:
    """What an array holds, and of which shape."""
    if isinstance(value, PackedArray):
        return f"{value.format}{list(value.shape)}"
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else repr(type(value))


def _fits(type: TensorType, value: Any, sizes: dict[str, int]) -> bool:
    """Whether an array has the type; binds the symbolic dimensions met for the first time."""
    if isinstance(value, PackedArray):
        stored = value.format
    elif isinstance(value, np.ndarray) and isinstance(type.element, PlainFormat):
        stored = type.element if value.dtype == type.element.dtype else None
    else:
        return False
    if stored != type.element or len(value.shape) != type.rank:
        return False
    for dim, size in zip(type.shape, value.shape, strict=True):
        if isinstance(dim, SymbolicDim):
            if size % dim.scale or sizes.setdefault(dim.name, size // dim.scale) * dim.scale != size:
                return False
        elif dim != size:
            return False
    return True


def zero_states(func: FuncOp, slots: int, ctx: int) -> dict[str, KVState]:
    """An empty KV cache for every `kv.state` of a function, ready to be `states` of `interpret`."""
    states: dict[str, KVState] = {}
    for op in func.walk():
        for result in op.results:
            symbol = op.attributes.get("symbol")
            if isinstance(op, DeclaredOp) and isinstance(result.type, KVCacheType) and symbol is not None:
                states[symbol.name] = empty_state(result.type, slots, ctx)
    return states


def _error_at(op: Op, message: str) -> DiagnosticError:
    return DiagnosticError.of(Diagnostic("error", message, op.location))
