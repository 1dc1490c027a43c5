"""moe.*: a mixture of experts: choose, group the rows by expert, multiply, add up.

A pair (token t, choice s) has the flat index t * top_k + s. "Grouped order" lists the pairs expert by expert, so that
the rows of one expert are next to each other; an expert without rows is an empty group.

Where experts differ in format, those of one format are a stack and a product of their own. `moe.dispatch` then groups
by the *places* of experts, so that the experts of a stack are neighbours: the groups first, first + 1, ...

Where experts have stand-ins (copies in fewer bits), those of E experts are the groups E .. 2E-1, which are empty unless
whoever runs the program says otherwise: `moe.stand_ins` is where it may.
"""

from __future__ import annotations

import numpy as np

from ir.formats import F32, I32, PackedArray
from ir.op_def import Op, attr, expect, operand, register_op, result
from ir.ops import checks
from ir.ops.low_bit import unpacked
from ir.sizes import dim_size, num_elements
from ir.traits import Pure
from ir.types import SymbolicDim, TensorType, Type


@register_op
class RouteOp(Op):
    """The top_k experts of every token, most probable first; of equal logits the lower expert comes first.

    weights = softmax over all experts, picked at the chosen ones and, if `normalize`, divided by their sum.

    Example:
        %ids, %weights = moe.route %logits {top_k = 2, normalize = true}
            : (tensor<tokens x 8 x f32>) -> (tensor<tokens x 2 x i32>, tensor<tokens x 2 x f32>)
    """

    name = "moe.route"
    traits = (Pure,)
    logits = operand("[tokens, E]")
    top_k = attr(int, "experts per token")
    normalize = attr(bool, "whether the weights of a token add up to one")
    ids = result("i32 [tokens, top_k]")
    weights = result("f32 [tokens, top_k]")

    @staticmethod
    def infer_types(logits: Type, *, top_k: int, normalize: bool) -> tuple[TensorType, TensorType]:
        found = checks.float_tensor(logits, "logits", rank=2)
        tokens, experts = found.shape
        inside = isinstance(experts, int) and 1 <= top_k <= experts
        expect(inside, f"expected 1 <= top_k <= {experts} experts, got top_k = {top_k}")
        return TensorType((tokens, top_k), I32), TensorType((tokens, top_k), F32)

    @staticmethod
    def reference(logits: np.ndarray, *, top_k: int, normalize: bool) -> tuple[np.ndarray, np.ndarray]:
        wide = logits.astype(np.float64)
        ids = np.argsort(-wide, axis=-1, kind="stable")[:, :top_k]  # stable: ties keep the lower expert first
        exponent = np.exp(wide - wide.max(axis=-1, keepdims=True))
        probability = exponent / exponent.sum(axis=-1, keepdims=True)
        weights = np.take_along_axis(probability, ids, axis=-1)
        if normalize:
            weights = weights / weights.sum(axis=-1, keepdims=True)
        return ids.astype(np.int32), weights.astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 4 * num_elements(self.logits.type, sizes)


@register_op
class StandInsOp(Op):
    """The experts that are used: each as chosen, or its stand-in, number e + E, where whoever runs the program says so.

    The graph means the whole model, in which nobody does.

    Example:
        %used = moe.stand_ins %ids {num_experts = 8} : (tensor<tokens x 2 x i32>) -> tensor<tokens x 2 x i32>
    """

    name = "moe.stand_ins"
    traits = (Pure,)
    ids = operand("i32 [tokens, top_k], each in 0 .. num_experts-1")
    num_experts = attr(int, "E, the number of experts")
    used = result("i32 [tokens, top_k], each in 0 .. 2 * num_experts - 1")

    @staticmethod
    def infer_types(ids: Type, *, num_experts: int) -> TensorType:
        found = checks.i32_tensor(ids, "ids", rank=2)
        expect(num_experts >= 1, f"expected num_experts >= 1, got {num_experts}")
        return TensorType(found.shape, I32)

    @staticmethod
    def reference(ids: np.ndarray, *, num_experts: int) -> np.ndarray:
        return ids.copy()


@register_op
class DispatchOp(Op):
    """The pairs in grouped order, pairs of one expert in order of their flat index, and where each group starts.

    Expert e is the group places[e]; e itself where there are no places.

    Example:
        %order, %offsets = moe.dispatch %ids {num_experts = 8}
            : (tensor<tokens x 2 x i32>) -> (tensor<tokens*2 x i32>, tensor<9 x i32>)
    """

    name = "moe.dispatch"
    traits = (Pure,)
    ids = operand("i32 [tokens, top_k], each in 0 .. num_experts-1")
    num_experts = attr(int, "E, the number of experts")
    places = attr(tuple, "the group of each expert, all different; empty: expert e is group e", default=())
    order = result("i32 [tokens * top_k]: order[j] is the flat index of the pair in row j of grouped order")
    offsets = result("i32 [E + 1]: group g has the rows offsets[g] .. offsets[g+1]-1")

    @staticmethod
    def infer_types(ids: Type, *, num_experts: int, places: tuple[int, ...]) -> tuple[TensorType, TensorType]:
        found = checks.i32_tensor(ids, "ids", rank=2)
        tokens, top_k = found.shape
        expect(num_experts >= 1, f"expected num_experts >= 1, got {num_experts}")
        inside = len(places) == num_experts and dict.fromkeys(places).keys() == dict.fromkeys(range(num_experts)).keys()
        expect(not places or inside, f"expected places to be 0 .. {num_experts - 1} in some order, got {list(places)}")
        pairs = checks.times(tokens, checks.known(top_k, "number of experts per token"))
        return TensorType((pairs,), I32), TensorType((num_experts + 1,), I32)

    @staticmethod
    def reference(ids: np.ndarray, *, num_experts: int, places: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        flat = ids.reshape(-1)
        if places:
            flat = np.array(places)[flat]
        order = np.argsort(flat, kind="stable")
        counts = [int(np.sum(flat == e)) for e in range(num_experts)]
        offsets = np.cumsum([0, *counts])
        return order.astype(np.int32), offsets.astype(np.int32)


@register_op
class GroupedGemmOp(Op):
    """One matrix product per expert: y[j] = x[i] @ w[e].T, where row j of grouped order is in the group first + e.

    With gather > 0, x has one row per token and i = order[j] // gather (gather = top_k). With gather = 0, x is in
    grouped order already and i = j. The elements of x and w are floats or low-bit numbers, as for gemm.matmul.

    Example:
        %y = moe.grouped_gemm %x, %w, %order, %offsets {gather = 2}
            : (tensor<tokens x 16 x f32>, tensor<8 x 32 x 16 x f32>, tensor<tokens*2 x i32>, tensor<9 x i32>)
            -> tensor<tokens*2 x 32 x f32>
    """

    name = "moe.grouped_gemm"
    traits = (Pure,)
    x = operand("[tokens, k], or [tokens * top_k, k] in grouped order")
    w = operand("weights [E, n, k], with or without a layout")
    order = operand("i32 [tokens * top_k], of moe.dispatch")
    offsets = operand("i32 [groups + 1], of moe.dispatch")
    gather = attr(int, "pairs per row of x; 0 when x is in grouped order")
    first = attr(int, "the group of the first of these experts: E or more for stand-ins", default=0)
    of = attr(int, "experts of the layer, where these are some of them; 0: these are all", default=0)
    y = result("f32 [tokens * top_k, n] in grouped order; only rows of these experts' groups count")

    @staticmethod
    def infer_types(x: Type, w: Type, order: Type, offsets: Type, *, gather: int, first: int, of: int) -> TensorType:
        left, right = checks.factor(x, "x", rank=2), checks.factor(w, "w", rank=3)
        pairs, starts = checks.i32_tensor(order, "order"), checks.i32_tensor(offsets, "offsets")
        experts, n, k = right.shape
        checks.same("k of x and w", left.shape[1], k)
        _check_groups(experts, starts, first, of)
        expect(gather >= 0, f"expected gather >= 0, got {gather}")
        rows = checks.times(left.shape[0], gather or 1)
        checks.same(
            "rows of x times gather and rows of order" if gather else "rows of x and order", rows, pairs.shape[0]
        )
        return TensorType((pairs.shape[0], n), F32)

    @staticmethod
    def reference(
        x: np.ndarray | PackedArray,
        w: np.ndarray | PackedArray,
        order: np.ndarray,
        offsets: np.ndarray,
        *,
        gather: int,
        first: int = 0,
        of: int = 0,
    ) -> np.ndarray:
        x, w = unpacked(x), unpacked(w)
        y = np.zeros((order.shape[0], w.shape[1]), np.float64)
        for e in range(w.shape[0]):
            for j in range(int(offsets[first + e]), int(offsets[first + e + 1])):
                row = x[order[j] // gather] if gather else x[j]
                y[j] = w[e].astype(np.float64) @ row.astype(np.float64)
        return y.astype(np.float32)

    @property
    def stand_ins(self) -> bool:
        """Whether these stand in for the experts of the groups before."""
        return self.first >= self._all()

    def _all(self) -> int:
        """The experts of the layer."""
        return self.of or dim_size(self.w.type.shape[0], {})

    def flops(self, sizes: dict[str, int]) -> int:
        """None for stand-ins: the model does without. Of some of the experts their share, all being met alike."""
        experts = 0 if self.stand_ins else dim_size(self.w.type.shape[0], sizes)
        whole = 2 * num_elements(self.y.type, sizes) * dim_size(self.w.type.shape[2], sizes)
        return whole * experts // self._all()

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        """No more experts are read than there are pairs, and no stand-ins."""
        whole = super().operand_bytes(index, sizes)
        if index != 1:
            return whole
        if self.stand_ins:
            return 0
        experts = self._all()
        return whole * min(experts, num_elements(self.order.type, sizes)) // experts


def _check_groups(experts: int | SymbolicDim, starts: TensorType, first: int, of: int) -> None:
    """The groups first, first + 1, ... of `experts` experts are there. Raises InferenceError."""
    if of and isinstance(experts, int):
        fits = starts.shape[0] in (of + 1, 2 * of + 1)
        expect(fits, f"expected offsets of {of} experts + 1, got {starts}")
        inside = 0 <= first <= of - experts
        expect(inside, f"expected {experts} of {of} groups, the first in 0 .. {of - experts}, got first = {first}")
    elif isinstance(experts, int) and starts.shape[0] == 2 * experts + 1:
        expect(first in (0, experts), f"expected first = 0 or {experts}, the stand-ins, got {first}")
    else:
        wanted = experts + 1 if isinstance(experts, int) else None
        expect(starts.shape[0] == wanted, f"expected offsets of {experts} experts + 1, got {starts}")
        expect(first == 0, f"expected first = 0 where there are no stand-ins, got {first}")


@register_op
class JoinRowsOp(Op):
    """Rows in grouped order of two products: those of the first groups from y, those of the others from `others`.

    Example:
        %all = moe.join_rows %y, %s, %offsets {first = 8}
            : (tensor<tokens*2 x 16 x f32>, tensor<tokens*2 x 16 x f32>, tensor<17 x i32>)
            -> tensor<tokens*2 x 16 x f32>
    """

    name = "moe.join_rows"
    traits = (Pure,)
    y = operand("[tokens * top_k, n]: rows before offsets[first] count")
    others = operand("like y: the other rows count")
    offsets = operand("i32 [groups + 1], of moe.dispatch")
    first = attr(int, "the first group of `others`: other experts of the layer, or stand-ins")
    joined = result("like y")

    @staticmethod
    def infer_types(y: Type, others: Type, offsets: Type, *, first: int) -> TensorType:
        rows, more = checks.float_tensor(y, "y", rank=2), checks.float_tensor(others, "others", rank=2)
        expect(rows == more, f"expected y and others of one type, got {rows} and {more}")
        starts = checks.i32_tensor(offsets, "offsets", rank=1)
        groups = checks.known(starts.shape[0], "number of offsets") - 1
        expect(1 <= first < groups, f"expected first to be one of {groups} groups but group 0, got {first}")
        return rows

    @staticmethod
    def reference(y: np.ndarray, others: np.ndarray, offsets: np.ndarray, *, first: int) -> np.ndarray:
        start = int(offsets[first])
        return np.concatenate([y[:start], others[start:]])


@register_op
class CombineOp(Op):
    """z[t] = sum over s of weights[t, s] * (the row of pair (t, s)): the experts' answers added up.

    Example:
        %z = moe.combine %y, %weights, %order
            : (tensor<tokens*2 x 16 x f32>, tensor<tokens x 2 x f32>, tensor<tokens*2 x i32>)
            -> tensor<tokens x 16 x f32>
    """

    name = "moe.combine"
    traits = (Pure,)
    y = operand("[tokens * top_k, n] in grouped order")
    weights = operand("[tokens, top_k]")
    order = operand("i32 [tokens * top_k], of moe.dispatch")
    z = result("f32 [tokens, n]")

    @staticmethod
    def infer_types(y: Type, weights: Type, order: Type) -> TensorType:
        rows, share = checks.float_tensor(y, "y", rank=2), checks.float_tensor(weights, "weights", rank=2)
        pairs = checks.i32_tensor(order, "order")
        tokens, top_k = share.shape
        wanted = checks.times(tokens, checks.known(top_k, "number of experts per token"))
        checks.same("rows of y and order", rows.shape[0], pairs.shape[0])
        checks.same("tokens * top_k of weights and rows of order", wanted, pairs.shape[0])
        return TensorType((tokens, rows.shape[1]), F32)

    @staticmethod
    def reference(y: np.ndarray, weights: np.ndarray, order: np.ndarray) -> np.ndarray:
        tokens, top_k = weights.shape
        z = np.zeros((tokens, y.shape[1]), np.float64)
        for j, pair in enumerate(order.tolist()):
            t, s = divmod(pair, top_k)
            z[t] += float(weights[t, s]) * y[j].astype(np.float64)
        return z.astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.y.type, sizes)
