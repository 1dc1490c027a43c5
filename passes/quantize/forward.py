"""A model's step run in float32 over a batch of sequences, with products that may be answered differently.

    forward = Forward(func, checkpoint.read, sequences)     # int32 [sequences, length]
    logits = forward.run()                                   # f32 [rows, vocabulary]
    forward.run(answer=lambda op, x, w: my_product(x, w))    # None: the ordinary answer

    for visit in forward.products():                         # stops in front of every product, once
        visit.op, visit.x, visit.w                           # what it multiplies
        visit.logits_with(y)                                 # the logits if its result were y

Takes a function whose ops are those that frontends make (and those of the fusions that join products); what each op
means is its `reference`, the few that are slow there are computed here by whole arrays in float32. Values are dropped
after their last reader, weights are read when an op needs them: memory holds one layer and what later ops still read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.core import Op, Value
from ir.interpreter import Environment, zero_states
from ir.kv_state import KVState
from ir.ops.attention import CombineOp, ScoresOp, SoftmaxOp
from ir.ops.builtin import FuncOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.low_bit import unpacked
from ir.ops.moe import CombineOp as ExpertSumOp
from ir.ops.moe import GroupedGemmOp
from ir.traits import Terminator, has_trait

ProductOp = MatmulOp | GroupedGemmOp
Answer = Callable[[ProductOp, "Factors"], np.ndarray | None]


@dataclass(frozen=True)
class Factors:
    """What a product multiplies: row i of `x` [m, k] by `w` [n, k], or by w[e] of [E, n, k] for the rows of expert e.

    Rows of experts are in grouped order: `offsets` [E + 1] says which belong to which; None for a plain product.
    """

    x: np.ndarray
    w: np.ndarray
    offsets: np.ndarray | None = None

    def product(self) -> np.ndarray:
        """f32 [m, n]."""
        x = np.ascontiguousarray(self.x, np.float32)
        w = np.asarray(self.w, np.float32)
        if self.offsets is None:
            return x @ w.T
        y = np.zeros((x.shape[0], w.shape[1]), np.float32)
        for expert in range(w.shape[0]):
            rows = slice(int(self.offsets[expert]), int(self.offsets[expert + 1]))
            y[rows] = x[rows] @ w[expert].T
        return y


@dataclass(frozen=True)
class Visit:
    """A product that is about to be computed."""

    op: ProductOp
    factors: Factors
    _forward: Forward
    _at: int
    _values: dict[Value, Any]

    def logits_with(self, y: np.ndarray) -> np.ndarray:
        """The logits of the model if this product gave `y`."""
        values = {**self._values, self.op.results[0]: y}
        return self._forward.finish(self._at + 1, values)


class Forward:
    """One step of `sequences` int32 [count, length], all positions of all of them at once.

    `read` gives the array of a constant. Logits are those of every `row_step`-th position. Raises DiagnosticError for
    ops without a meaning.
    """

    def __init__(
        self, func: FuncOp, read: Callable[[str], np.ndarray], sequences: np.ndarray, *, row_step: int = 1
    ) -> None:
        count, length = sequences.shape
        self.func = func
        self.ops = list(func.block.ops)
        self.read = read
        self.states = zero_states(func, count, length)
        self._inputs = (
            sequences.reshape(-1).astype(np.int32),
            np.tile(np.arange(length, dtype=np.int32), count),
            np.repeat(np.arange(count, dtype=np.int32), length),
            np.arange(row_step - 1, count * length, row_step, dtype=np.int32),
        )
        last: dict[Value, int] = {}
        for at, op in enumerate(self.ops):
            last.update(dict.fromkeys(op.operands, at))
        self._dead_after: list[list[Value]] = [[] for _ in self.ops]
        for value, at in last.items():
            self._dead_after[at].append(value)

    def run(self, answer: Answer | None = None) -> np.ndarray:
        """The logits; `answer` is asked for the result of every product first."""
        return self.finish(0, self._start(), answer)

    def products(self) -> Iterator[Visit]:
        """Every product in order of the step, computed as usual when the next one is asked for."""
        values = self._start()
        for at, op in enumerate(self.ops):
            if isinstance(op, (MatmulOp, GroupedGemmOp)):
                factors = _factors(op, [values[v] for v in op.operands])
                yield Visit(op, factors, self, at, values)
            if has_trait(op, Terminator):
                return
            self._step(at, values, None)

    def finish(self, at: int, values: dict[Value, Any], answer: Answer | None = None) -> np.ndarray:
        """Runs the ops from number `at` on; `values` holds what they read and is changed."""
        for index in range(at, len(self.ops)):
            op = self.ops[index]
            if has_trait(op, Terminator):
                return values[op.operands[0]]
            self._step(index, values, answer)
        raise ValueError(f"@{self.func.sym_name} does not return")

    def _start(self) -> dict[Value, Any]:
        return dict(zip(self.func.arguments, self._inputs, strict=True))

    def _step(self, at: int, values: dict[Value, Any], answer: Answer | None) -> None:
        op = self.ops[at]
        read = [values[v] for v in op.operands]
        made: Any = None
        if isinstance(op, (MatmulOp, GroupedGemmOp)):
            factors = _factors(op, read)
            made = answer(op, factors) if answer is not None else None
            made = factors.product() if made is None else made
        elif type(op) in _FAST:
            made = _FAST[type(op)](op, read)
        results = (made,) if made is not None else Environment(self.read, self.states).run_op(op, read)
        values.update(zip(op.results, results, strict=True))
        for value in self._dead_after[at]:
            values.pop(value, None)


def constant_value(value: Value, read: Callable[[str], np.ndarray]) -> np.ndarray:
    """The array of a constant expression."""
    op = value.defining_op()
    assert op is not None  # arguments are no constants
    operands = [constant_value(v, read) for v in op.operands]
    return Environment(read, {}).run_op(op, operands)[op.results.index(value)]


def _factors(op: ProductOp, read: list[Any]) -> Factors:
    if isinstance(op, MatmulOp):
        return Factors(_floats(read[0]), _floats(read[1]))
    x, w, order, offsets = read
    x = _floats(x)
    return Factors(x[order // op.gather] if op.gather else x, _floats(w), offsets)


def _floats(value: Any) -> np.ndarray:
    return unpacked(value)


# -- ops whose `reference` goes row by row, in float32 ---------------------------------------------------------------


def _append(op: Op, read: list[Any]) -> KVState:
    cache, k, v, positions, slots = read
    keys, values = cache.keys.copy(), cache.values.copy()
    keys[slots, positions] = k.astype(cache.dtype)
    values[slots, positions] = v.astype(cache.dtype)
    return KVState(keys, values)


def _scores(op: Any, read: list[Any]) -> np.ndarray:
    q, cache, positions, slots = read
    tokens, heads, width = q.shape
    kv_heads = cache.keys.shape[2]
    scores = np.empty((tokens, heads, cache.ctx), np.float32)
    for slot in np.unique(slots).tolist():
        rows = np.flatnonzero(slots == slot)
        queries = q[rows].reshape(len(rows), kv_heads, heads // kv_heads, width).astype(np.float32)
        keys = cache.keys[slot].astype(np.float32)  # [ctx, kv heads, d]
        found = np.einsum("thgd,chd->thgc", queries, keys, optimize=True) * np.float32(op.scale)
        at, seen_from = np.arange(cache.ctx)[None, :], positions[rows][:, None]
        hidden = at > seen_from
        if op.window:
            hidden |= at <= seen_from - op.window
        found = found.reshape(len(rows), heads, cache.ctx)
        found[np.broadcast_to(hidden[:, None, :], found.shape)] = -np.inf
        scores[rows] = found
    return scores


def _softmax(op: Op, read: list[Any]) -> np.ndarray:
    (s,) = read
    exponent = np.exp(s - s.max(axis=-1, keepdims=True))
    return exponent / exponent.sum(axis=-1, keepdims=True)


def _combine(op: Op, read: list[Any]) -> np.ndarray:
    p, cache, slots = read
    tokens, heads, ctx = p.shape
    kv_heads, width = cache.values.shape[2:]
    out = np.empty((tokens, heads, width), np.float32)
    for slot in np.unique(slots).tolist():
        rows = np.flatnonzero(slots == slot)
        shares = p[rows].reshape(len(rows), kv_heads, heads // kv_heads, ctx)
        values = cache.values[slot].astype(np.float32)
        out[rows] = np.einsum("thgc,chd->thgd", shares, values, optimize=True).reshape(len(rows), heads, width)
    return out


def _expert_sum(op: Op, read: list[Any]) -> np.ndarray:
    y, weights, order = read
    tokens, top_k = weights.shape
    by_pair = np.empty((tokens * top_k, y.shape[1]), np.float32)
    by_pair[order] = y
    return np.einsum("tsn,ts->tn", by_pair.reshape(tokens, top_k, -1), weights.astype(np.float32))


_FAST: dict[type[Op], Callable[[Any, list[Any]], Any]] = {
    KVAppendOp: _append,
    ScoresOp: _scores,
    SoftmaxOp: _softmax,
    CombineOp: _combine,
    ExpertSumOp: _expert_sum,
}
