"""A model's step run over calibration tokens, weight by weight: what is calibrated goes on with what it made.

    forward = LayerwiseForward(func, checkpoint.read, sequences, roles)
    forward.run_products(lambda product: my_weight(product.read(), product.x))   # None: the weight as it is

At every product by a weight of the checkpoint the hook is told its name, its role and the rows that it multiplies; for
grouped products once for every expert. The array that it returns takes the place of the weight, so that the products
behind it see what the error did to their input. Takes @step as frontends make it, of checkpoints of floats. Memory
holds one weight (of a stack one expert), the attention of one sequence, and what later ops still read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np

from ir.core import Op, Value
from ir.ops.attention import CombineOp, ScoresOp, SoftmaxOp
from ir.ops.builtin import FuncOp, ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.tensor import CastOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.traits import Terminator, has_trait
from passes.analysis.constants import constant_leaves
from passes.quantize.forward import Forward, ProductOp
from passes.quantize.roles import weight_parts


@dataclass(frozen=True, eq=False)
class Product:
    """The weight `name` [n, k] of the checkpoint and the rows `x` f32 [rows, k] that it multiplies.

    `read()` gives it as f32. Products that share their input have equal `source`. Of an expert: its number, and
    `shared`, the rows of all tokens, where all experts choose from the same (None where each has rows of its own).
    """

    op: ProductOp
    name: str
    role: str
    x: np.ndarray
    read: Callable[[], np.ndarray]
    source: Value
    expert: int | None = None
    shared: np.ndarray | None = None


Hook = Callable[[Product], "np.ndarray | None"]


class LayerwiseForward(Forward):
    """`Forward` for calibration; see the module docstring. `roles` are those of the tensors, by name.

    `run()` gives the logits, as it does there.
    """

    def __init__(
        self,
        func: FuncOp,
        read: Callable[[str], np.ndarray],
        sequences: np.ndarray,
        roles: Mapping[str, str],
        *,
        hook: Hook | None = None,
        row_step: int = 1,
    ) -> None:
        super().__init__(func, read, sequences, row_step=row_step)
        self.hook = hook
        self._parts = {op: weight_parts(op, roles) for op in self.ops if is_streamed(op)}
        self._attention: dict[Op, ScoresOp] = {}
        self._put_off: set[Op] = set()  # run by the op that reads their result
        for op in self.ops:
            scores = _whole_attention(op)
            if scores is not None:
                self._attention[op] = scores
                self._put_off.update((scores, *scores.s.users))
        for op in reversed(self.ops):
            if isinstance(op, (ConstantOp, ConstantStackOp, CastOp)) and self._is_only_weight(op):
                self._put_off.add(op)
        self._dead_after = self._last_reads()

    def run_products(self, hook: Hook, tell: Callable[[int, int], None] | None = None) -> None:
        """Runs the step with `hook` asked at each product; the logits are not computed. `tell` gets ops done, in all.

        The last product may still be asked about: its input is what the head reads.
        """
        self.hook = hook
        values = self._start()
        for at, op in enumerate(self.ops):
            if has_trait(op, Terminator):
                break
            if op in self._parts and all(isinstance(user, ReturnOp) for user in op.results[0].users):
                self._offer_head(op, values)
                break
            self._step(at, values, None)
            if tell is not None:
                tell(at + 1, len(self.ops))

    # -- order of the run --------------------------------------------------------------------------------------------

    def _is_only_weight(self, op: Op) -> bool:
        """Whether all readers are products that read it as their weight themselves, or casts for such."""
        users = op.results[0].users
        return bool(users) and all(
            u in self._put_off or (u in self._parts and u.operands[1] is op.results[0]) for u in users
        )

    def _last_reads(self) -> list[list[Value]]:
        """The values that nobody reads after an op, by its number."""
        last: dict[Value, int] = {}
        for at, op in enumerate(self.ops):
            read = list(op.operands)
            if op in self._put_off:
                read = []
            elif op in self._parts:
                read.pop(1)
            elif op in self._attention:
                read += self._attention[op].operands
            last.update(dict.fromkeys(read, at))
        dead: list[list[Value]] = [[] for _ in self.ops]
        for value, at in last.items():
            dead[at].append(value)
        return dead

    def _step(self, at: int, values: dict[Value, Any], answer: Any) -> None:
        op = self.ops[at]
        if op in self._put_off:
            return
        if op in self._parts:
            values[op.results[0]] = (
                self._grouped(op, values) if isinstance(op, GroupedGemmOp) else self._plain(op, values)
            )
        elif op in self._attention:
            values[op.results[0]] = self._attend(op, values)
        else:
            super()._step(at, values, answer)
            return
        for value in self._dead_after[at]:
            values.pop(value, None)

    # -- products ----------------------------------------------------------------------------------------------------

    def _reader(self, name: str) -> Callable[[], np.ndarray]:
        return lambda: np.ascontiguousarray(self.read(name), np.float32)

    def _asked(self, product: Product) -> np.ndarray:
        """The weight to go on with."""
        found = self.hook(product) if self.hook is not None else None
        return product.read() if found is None else found

    def _plain(self, op: Any, values: dict[Value, Any]) -> np.ndarray:
        ((name, role),) = self._parts[op]
        x = _f32(values[op.x])
        return x @ self._asked(Product(op, name, role, x, self._reader(name), op.x)).T

    def _offer_head(self, op: Any, values: dict[Value, Any]) -> None:
        ((name, role),) = self._parts[op]
        if self.hook is not None:
            self.hook(Product(op, name, role, _f32(values[op.x]), self._reader(name), op.x))

    def _grouped(self, op: GroupedGemmOp, values: dict[Value, Any]) -> np.ndarray:
        x, order, offsets = _f32(values[op.x]), values[op.order], values[op.offsets]
        y: np.ndarray | None = None
        for expert, (name, role) in enumerate(self._parts[op]):
            rows = slice(int(offsets[expert]), int(offsets[expert + 1]))
            mine = x[order[rows] // op.gather] if op.gather else x[rows]
            shared = x if op.gather else None
            w = self._asked(Product(op, name, role, mine, self._reader(name), op.x, expert, shared))
            if y is None:
                y = np.zeros((order.shape[0], w.shape[0]), np.float32)
            y[rows] = mine @ w.T
        assert y is not None  # a stack has a tensor
        return y

    # -- attention, one sequence at a time ---------------------------------------------------------------------------

    def _attend(self, op: Any, values: dict[Value, Any]) -> np.ndarray:
        """softmax(scale q k^T) v of all tokens; the ops' meanings with the scores of one sequence held at a time."""
        scores = self._attention[op]
        q, keys_of, values_of = values[scores.q], values[scores.cache], values[op.cache]
        positions, slots = values[scores.positions], values[scores.slots]
        tokens, heads, width = q.shape
        kv_heads = keys_of.keys.shape[2]
        group = heads // kv_heads
        out = np.empty((tokens, heads, values_of.values.shape[3]), np.float32)
        for slot in np.unique(slots).tolist():
            rows = np.flatnonzero(slots == slot)
            at, own = np.arange(keys_of.ctx)[None, :], positions[rows][:, None]
            hidden = at > own
            if scores.window:
                hidden |= at <= own - scores.window
            for head in range(kv_heads):
                queries = _f32(q[rows, head * group : (head + 1) * group]).transpose(1, 0, 2)  # [group, rows, d]
                keys, held = _f32(keys_of.keys[slot, :, head]), _f32(values_of.values[slot, :, head])  # [ctx, d]
                share = (queries.reshape(-1, width) @ keys.T).reshape(group, len(rows), -1)
                share *= np.float32(scores.scale)
                share[:, hidden] = -np.inf
                share -= share.max(axis=-1, keepdims=True)
                np.exp(share, out=share)
                share /= share.sum(axis=-1, keepdims=True)
                found = (share.reshape(-1, share.shape[-1]) @ held).reshape(group, len(rows), -1)
                out[rows, head * group : (head + 1) * group] = found.transpose(1, 0, 2)
        return out


def is_streamed(op: Op) -> TypeGuard[ProductOp]:
    """Whether a product's weight is a tensor, or a stack of tensors, of the checkpoint, cast or as it is stored."""
    if not isinstance(op, (MatmulOp, GroupedGemmOp)):
        return False
    made = op.w.defining_op()
    if isinstance(made, CastOp):
        made = made.operands[0].defining_op()
    return isinstance(made, ConstantStackOp if isinstance(op, GroupedGemmOp) else ConstantOp)


def weight_names(op: Op) -> tuple[str, ...]:
    """The tensors that a streamed product multiplies by: one, or one for each expert."""
    (leaf,) = constant_leaves(op.operands[1])
    return leaf.symbols() if isinstance(leaf, ConstantStackOp) else (leaf.attributes["symbol"].name,)


def _whole_attention(op: Op) -> ScoresOp | None:
    """The scores of which `op` combines the softmax, when nobody else reads either, over one cache and slots."""
    softmax = op.p.defining_op() if isinstance(op, CombineOp) else None
    scores = softmax.operands[0].defining_op() if isinstance(softmax, SoftmaxOp) else None
    if not isinstance(scores, ScoresOp) or softmax is None:
        return None
    alone = len(scores.s.users) == 1 and len(softmax.results[0].users) == 1
    same = scores.cache is op.operands[1] and scores.slots is op.operands[2]
    return scores if alone and same else None


def _f32(value: Any) -> np.ndarray:
    return np.ascontiguousarray(value, np.float32)
