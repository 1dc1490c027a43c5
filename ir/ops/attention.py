"""attn.*: rotary embedding, attention in three ops as a paper draws it, and attention as one op with a cascade inside.

Query head h reads kv head h // (query heads / kv heads). Row t sees the positions of its own slot in
[positions[t] - window + 1 .. positions[t]], all the way to 0 without a window. `ctx` is the capacity of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.attributes import Rope
from ir.diagnostics import DiagnosticSink
from ir.formats import F32, I1
from ir.kv_state import KVState
from ir.op_def import InferenceError, Op, attr, expect, operand, region, register_op, result
from ir.ops import checks
from ir.ops.fused import verify_arguments, yielded_types
from ir.sizes import num_bytes, num_elements
from ir.traits import IsolatedFromAbove, Pure, ReadsKVCache
from ir.types import KVCacheType, SymbolicDim, TensorType, Type

CTX = SymbolicDim("ctx")


@register_op
class RopeTableOp(Op):
    """cos and sin of position * frequency of every rotated pair, times `rope.attention_factor`.

    Example:
        %cos, %sin = attn.rope_table %positions {rope = #rope<dim = 16>}
            : (tensor<tokens x i32>) -> (tensor<tokens x 8 x f32>, tensor<tokens x 8 x f32>)
    """

    name = "attn.rope_table"
    traits = (Pure,)
    positions = operand("i32 [tokens]")
    rope = attr(Rope, "frequencies and their scaling")
    cos = result("f32 [tokens, dim/2]")
    sin = result("f32 [tokens, dim/2]")

    @staticmethod
    def infer_types(positions: Type, *, rope: Rope) -> tuple[TensorType, TensorType]:
        rows = checks.i32_tensor(positions, "positions")
        expect(rope.dim > 0 and rope.dim % 2 == 0, f"expected an even rope dim > 0, got {rope.dim}")
        table = TensorType((rows.shape[0], rope.dim // 2), F32)
        return table, table

    @staticmethod
    def reference(positions: np.ndarray, *, rope: Rope) -> tuple[np.ndarray, np.ndarray]:
        angles = positions.astype(np.float64)[:, None] * rope.inverse_frequencies()[None, :]
        cos, sin = np.cos(angles) * rope.attention_factor, np.sin(angles) * rope.attention_factor
        return cos.astype(np.float32), sin.astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 3 * num_elements(self.cos.type, sizes)


@register_op
class RopeOp(Op):
    """Every pair (x[i], x[i + d/2]) of a head rotated: the "rotate half" convention (arXiv:2104.09864).

    y[i] = x[i] * cos[i] - x[i + d/2] * sin[i];  y[i + d/2] = x[i + d/2] * cos[i] + x[i] * sin[i]

    Example:
        %y = attn.rope %x, %cos, %sin
            : (tensor<tokens x 2 x 16 x f32>, tensor<tokens x 8 x f32>, tensor<tokens x 8 x f32>)
            -> tensor<tokens x 2 x 16 x f32>
    """

    name = "attn.rope"
    traits = (Pure,)
    x = operand("[tokens, heads, d]")
    cos = operand("f32 [tokens, d/2]")
    sin = operand("f32 [tokens, d/2]")
    y = result("like x")

    @staticmethod
    def infer_types(x: Type, cos: Type, sin: Type) -> TensorType:
        found = checks.float_tensor(x, "x", rank=3)
        table, other = checks.float_tensor(cos, "cos", rank=2), checks.float_tensor(sin, "sin", rank=2)
        expect(table == other, f"expected cos and sin of one type, got {table} and {other}")
        checks.same("tokens of x and cos", found.shape[0], table.shape[0])
        half = checks.divided(found.shape[2], 2, "head width of x")
        checks.same("half of the head width of x and width of cos", half, table.shape[1])
        return found

    @staticmethod
    def reference(x: np.ndarray, cos: np.ndarray, sin: np.ndarray) -> np.ndarray:
        wide = x.astype(np.float64)
        half = x.shape[2] // 2
        first, second = wide[..., :half], wide[..., half:]
        c, s = cos.astype(np.float64)[:, None, :], sin.astype(np.float64)[:, None, :]
        return np.concatenate([first * c - second * s, second * c + first * s], axis=-1).astype(x.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 3 * num_elements(self.y.type, sizes)


def heads_per_kv_head(query: TensorType, cache: KVCacheType) -> int:
    """How many query heads share one kv head. `query` is [tokens, query heads, width]."""
    _, heads, width = query.shape
    checks.same("head width of q and cache", width, cache.head_dim)
    heads = checks.known(heads, "number of query heads")
    fits = heads % cache.num_kv_heads == 0
    expect(fits, f"expected query heads to be a multiple of {cache.num_kv_heads} kv heads, got {heads}")
    return heads // cache.num_kv_heads


def _check_rows(query: TensorType, positions: Type | None, slots: Type, window: int = 0) -> None:
    if positions is not None:
        checks.same("tokens of q and positions", query.shape[0], checks.i32_tensor(positions, "positions").shape[0])
    checks.same("tokens of q and slots", query.shape[0], checks.i32_tensor(slots, "slots").shape[0])
    expect(window >= 0, f"expected window >= 0 (0 = none), got {window}")


def visible(position: int, window: int, ctx: int) -> np.ndarray:
    """bool [ctx]: the positions that a row at `position` attends to."""
    at = np.arange(ctx)
    return (at <= position) & ((at > position - window) if window else True)


@register_op
class ScoresOp(Op):
    """s[t, h, c] = scale * (q[t, h] . key at (slots[t], c)), and -inf where row t does not see position c.

    Example:
        %s = attn.scores %q, %cache, %positions, %slots {scale = 0.25}
            : (tensor<tokens x 4 x 16 x f32>, kv<2 x 16 x f32>, tensor<tokens x i32>, tensor<tokens x i32>)
            -> tensor<tokens x 4 x ctx x f32>
    """

    name = "attn.scores"
    traits = (ReadsKVCache,)
    q = operand("[tokens, query heads, d]")
    cache = operand("kv<kv heads x d x element>")
    positions = operand("i32 [tokens]")
    slots = operand("i32 [tokens]")
    scale = attr(float, "multiplies every score, usually 1/sqrt(d)")
    window = attr(int, "positions a row sees, itself included; 0 = all", default=0)
    s = result("f32 [tokens, query heads, ctx]")

    @staticmethod
    def infer_types(q: Type, cache: Type, positions: Type, slots: Type, *, scale: float, window: int) -> TensorType:
        query, kv = checks.float_tensor(q, "q", rank=3), checks.kv_cache(cache)
        heads_per_kv_head(query, kv)
        _check_rows(query, positions, slots, window)
        return TensorType((query.shape[0], query.shape[1], CTX), F32)

    @staticmethod
    def reference(
        q: np.ndarray, cache: KVState, positions: np.ndarray, slots: np.ndarray, *, scale: float, window: int
    ) -> np.ndarray:
        tokens, heads, _ = q.shape
        group = heads // cache.heads
        scores = np.full((tokens, heads, cache.ctx), -np.inf)
        for t in range(tokens):
            seen = visible(int(positions[t]), window, cache.ctx)
            for h in range(heads):
                keys = cache.rows(int(slots[t]), h // group, int(positions[t]))[0].astype(np.float64)  # [ctx, d]
                scores[t, h, seen] = (scale * (keys @ q[t, h].astype(np.float64)))[seen]
        return scores.astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.s.type, sizes) * self.cache.type.head_dim

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        if index != 1:
            return super().operand_bytes(index, sizes)
        return _rows_read(self.cache.type, self.q.type, sizes, self.window)


@register_op
class SoftmaxOp(Op):
    """exp(s - max) / sum of it over the last axis.

    Example:
        %p = attn.softmax %s : (tensor<tokens x 4 x ctx x f32>) -> tensor<tokens x 4 x ctx x f32>
    """

    name = "attn.softmax"
    traits = (Pure,)
    s = operand("[..., n]; -inf gives probability 0, but not for a whole row")
    p = result("like s; rows add up to one")

    @staticmethod
    def infer_types(s: Type) -> TensorType:
        return checks.float_tensor(s, "s", min_rank=1)

    @staticmethod
    def reference(s: np.ndarray) -> np.ndarray:
        wide = s.astype(np.float64)
        exponent = np.exp(wide - wide.max(axis=-1, keepdims=True))
        return (exponent / exponent.sum(axis=-1, keepdims=True)).astype(s.dtype)

    def flops(self, sizes: dict[str, int]) -> int:
        return 5 * num_elements(self.p.type, sizes)


@register_op
class CombineOp(Op):
    """o[t, h] = sum over c of p[t, h, c] * value at (slots[t], c). Positions of probability 0 count nothing.

    Example:
        %o = attn.combine %p, %cache, %slots
            : (tensor<tokens x 4 x ctx x f32>, kv<2 x 16 x f32>, tensor<tokens x i32>) -> tensor<tokens x 4 x 16 x f32>
    """

    name = "attn.combine"
    traits = (ReadsKVCache,)
    p = operand("probabilities [tokens, query heads, ctx]")
    cache = operand("kv<kv heads x d x element>")
    slots = operand("i32 [tokens]")
    o = result("f32 [tokens, query heads, d]")

    @staticmethod
    def infer_types(p: Type, cache: Type, slots: Type) -> TensorType:
        found, kv = checks.float_tensor(p, "p", rank=3), checks.kv_cache(cache)
        expect(not kv.recent, f"cannot read {kv} without the rows' positions: fuse attention before setting its format")
        out = TensorType((found.shape[0], found.shape[1], kv.head_dim), F32)
        heads_per_kv_head(out, kv)
        _check_rows(out, None, slots)
        return out

    @staticmethod
    def reference(p: np.ndarray, cache: KVState, slots: np.ndarray) -> np.ndarray:
        tokens, heads, _ = p.shape
        group = heads // cache.heads
        out = np.zeros((tokens, heads, cache.keys.shape[3]), np.float64)
        for t in range(tokens):
            for h in range(heads):
                values = cache.values[slots[t], :, h // group].astype(np.float64)  # [ctx, d]
                out[t, h] = p[t, h].astype(np.float64) @ values
        return out.astype(np.float32)

    def flops(self, sizes: dict[str, int]) -> int:
        return 2 * num_elements(self.p.type, sizes) * self.cache.type.head_dim

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        if index != 1:
            return super().operand_bytes(index, sizes)
        return _rows_read(self.cache.type, self.o.type, sizes, 0)


def _rows_read(cache: KVCacheType, query: TensorType, sizes: dict[str, int], window: int) -> int:
    """Bytes of keys (or values) read when every row reads its own: an upper bound, rows of one slot share them."""
    seen = min(sizes["ctx"], window) if window else sizes["ctx"]
    return num_bytes(TensorType((query.shape[0], seen, cache.num_kv_heads, cache.head_dim), cache.element), sizes)


def row_argument_types(head_dim: int) -> tuple[TensorType, ...]:
    """Block arguments of the region of attn.attention: q [d], k [ctx, d], v [ctx, d], mask [ctx] (i1), scale []."""
    rows = TensorType((CTX, head_dim), F32)
    return TensorType((head_dim,), F32), rows, rows, TensorType((CTX,), I1), TensorType((), F32)


@register_op
class AttentionOp(Op):
    """Attention over the cache. The region says how one query row is computed: a cascade of einsums (arXiv:2406.10491).

    For every token t and query head h the region runs on q = q[t, h], the keys k [ctx, d] and values v [ctx, d] of
    (slots[t], kv head of h), mask [ctx] = the positions that row t sees, and `scale`; what it yields is y[t, h].
    `ir.ops.cascades` builds the regions: three passes over the keys, two, one.

    Example:
        %y = attn.attention %q, %cache, %positions, %slots {scale = 0.25} ({
          ^(%r: tensor<16 x f32>, %k: tensor<ctx x 16 x f32>, %v: tensor<ctx x 16 x f32>, %mask: tensor<ctx x i1>,
              %scale: tensor<f32>):
            %s = einsum.contract %k, %r {spec = "cd,d->c"}
                : (tensor<ctx x 16 x f32>, tensor<16 x f32>) -> tensor<ctx x f32>
            %t = einsum.map %s, %scale {op = "mul"} : (tensor<ctx x f32>, tensor<f32>) -> tensor<ctx x f32>
            %u = einsum.map %t, %mask {op = "mask"} : (tensor<ctx x f32>, tensor<ctx x i1>) -> tensor<ctx x f32>
            %m = einsum.reduce %u {op = "max", spec = "c->"} : (tensor<ctx x f32>) -> tensor<f32>
            %d = einsum.map %u, %m {op = "sub"} : (tensor<ctx x f32>, tensor<f32>) -> tensor<ctx x f32>
            %e = einsum.map %d {op = "exp"} : (tensor<ctx x f32>) -> tensor<ctx x f32>
            %l = einsum.reduce %e {op = "sum", spec = "c->"} : (tensor<ctx x f32>) -> tensor<f32>
            %p = einsum.map %e, %l {op = "div"} : (tensor<ctx x f32>, tensor<f32>) -> tensor<ctx x f32>
            %o = einsum.contract %p, %v {spec = "c,cd->d"}
                : (tensor<ctx x f32>, tensor<ctx x 16 x f32>) -> tensor<16 x f32>
            tensor.yield %o : (tensor<16 x f32>) -> ()
        })
            : (tensor<tokens x 4 x 16 x f32>, kv<2 x 16 x f32>, tensor<tokens x i32>, tensor<tokens x i32>)
            -> tensor<tokens x 4 x 16 x f32>
    """

    name = "attn.attention"
    traits = (ReadsKVCache, IsolatedFromAbove)
    q = operand("[tokens, query heads, d]")
    cache = operand("kv<kv heads x d x element>")
    positions = operand("i32 [tokens]")
    slots = operand("i32 [tokens]")
    scale = attr(float, "multiplies every score, usually 1/sqrt(d)")
    window = attr(int, "positions a row sees, itself included; 0 = all", default=0)
    body = region("(q [d], k [ctx, d], v [ctx, d], mask [ctx], scale []) -> y [d]: one query row")
    y = result("f32 [tokens, query heads, d]")

    @staticmethod
    def infer_types(q: Type, cache: Type, positions: Type, slots: Type, *, scale: float, window: int) -> TensorType:
        query, kv = checks.float_tensor(q, "q", rank=3), checks.kv_cache(cache)
        heads_per_kv_head(query, kv)
        _check_rows(query, positions, slots, window)
        return query.with_element(F32)

    def verify(self, diag: DiagnosticSink) -> None:
        width = self.cache.type.head_dim
        verify_arguments(self, row_argument_types(width), diag)
        try:
            given = yielded_types(self.name, self.regions)
        except InferenceError as error:
            diag.error(self.location, str(error))
            return
        wanted = TensorType((width,), F32)
        if given != (wanted,):
            texts = ", ".join(map(str, given)) or "nothing"
            diag.error(self.location, f"expected the region of {self.name} to yield {wanted}, got {texts}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        q, cache, positions, slots = values
        tokens, heads, _ = q.shape
        group = heads // cache.heads
        scale = np.asarray(self.scale, np.float32)
        y = np.zeros(q.shape, np.float32)
        for t in range(tokens):
            mask = visible(int(positions[t]), self.window, cache.ctx)
            for h in range(heads):
                k, v = (x.astype(np.float32) for x in cache.rows(int(slots[t]), h // group, int(positions[t])))
                (y[t, h],) = context.run_region(self.body, (q[t, h].astype(np.float32), k, v, mask, scale))
        return (y,)

    def flops(self, sizes: dict[str, int]) -> int:
        seen = min(sizes["ctx"], self.window) if self.window else sizes["ctx"]
        return num_elements(self.q.type, sizes) * seen * 4

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        if index != 1:
            return super().operand_bytes(index, sizes)
        return 2 * _rows_read(self.cache.type, self.q.type, sizes, self.window)  # keys and values
