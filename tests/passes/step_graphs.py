"""Step functions of small transformers, built by hand as the frontends build them, with weights and inputs to run them.

`build_step(StepShape(...))` gives a module; `random_weights(module)` an array for every constant it names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ir.attributes import Rope, SymbolRef
from ir.builder import Builder
from ir.core import Op, Value
from ir.formats import F32, I32, PlainFormat
from ir.interpreter import interpret, zero_states
from ir.ops.attention import CombineOp as AttentionCombineOp
from ir.ops.attention import RopeOp, RopeTableOp, ScoresOp, SoftmaxOp
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp, KVStateOp
from ir.ops.moe import CombineOp, DispatchOp, GroupedGemmOp, RouteOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, EmbedOp, GatherRowsOp, MulOp, ReshapeOp, SiluOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.types import KVCacheType, SymbolicDim, TensorType

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")


@dataclass(frozen=True)
class StepShape:
    """Which model. `qk_norm` is "", "head" (over each head) or "row" (over all heads); `experts` 0 means dense."""

    layers: int = 1
    hidden: int = 32
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 8
    ffn: int = 48
    vocab: int = 40
    element: PlainFormat = F32
    bias: bool = False
    qk_norm: str = ""
    clip: float = 0.0
    window: int = 0
    experts: int = 0
    top_k: int = 2
    tied: bool = False


class _Step:
    def __init__(self, shape: StepShape) -> None:
        self.shape = shape
        rows = TensorType((TOKENS,), I32)
        names = ("ids", "positions", "slots", "rows")
        self.func = FuncOp.create("step", [rows, rows, rows, TensorType((ROWS,), I32)], names)
        self.b = Builder.at_end(self.func.block)

    def weight(self, name: str, *dims: int) -> Value:
        """A constant of the checkpoint's element, cast to f32 where it is not f32."""
        made = self.b(ConstantOp(symbol=SymbolRef(name), result_types=[TensorType(dims, self.shape.element)]), "w")
        return made if self.shape.element == F32 else self.b(CastOp(made, to=F32), "w")

    def stack(self, name: str, *dims: int) -> Value:
        type = TensorType((self.shape.experts, *dims), self.shape.element)
        made = self.b(ConstantStackOp(symbol=SymbolRef(name), count=self.shape.experts, result_types=[type]), "w")
        return made if self.shape.element == F32 else self.b(CastOp(made, to=F32), "w")

    def linear(self, x: Value, name: str, n: int, k: int, bias: bool = False) -> Value:
        with self.b.scope(name.split(".")[-1]):
            y = self.b(MatmulOp(x, self.weight(f"{self.prefix}{name}.weight", n, k)), name.split(".")[-1][0])
            return self.b(AddOp(y, self.weight(f"{self.prefix}{name}.bias", n))) if bias else y

    def norm(self, x: Value, name: str, n: int) -> Value:
        with self.b.scope(name.split(".")[-1]):
            return self.b(RmsNormOp(x, self.weight(f"{self.prefix}{name}.weight", n), eps=1e-5), "n")

    def module(self) -> ModuleOp:
        s, b = self.shape, self.b
        ids, positions, slots, rows = self.func.arguments
        self.prefix = "model."
        table = b(
            ConstantOp(symbol=SymbolRef("model.embed"), result_types=[TensorType((s.vocab, s.hidden), s.element)])
        )
        with b.scope("embed"):
            x = b(EmbedOp(ids, table), "x")
            if s.element != F32:
                x = b(CastOp(x, to=F32), "x")
        cos, sin = b(RopeTableOp(positions, rope=Rope(s.head_dim)))
        for layer in range(s.layers):
            self.prefix = f"model.layers.{layer}."
            with b.scope(f"layers.{layer}"):
                x = self.attention(layer, x, cos, sin, positions, slots)
                x = self.experts(x) if s.experts else self.mlp(x)
        self.prefix = "model."
        x = b(GatherRowsOp(x, rows), "x")
        x = self.norm(x, "norm", s.hidden)
        if s.tied:
            head = table if s.element == F32 else b(CastOp(table, to=F32))
        else:
            head = self.weight("lm_head.weight", s.vocab, s.hidden)
        with b.scope("lm_head"):
            logits = b(MatmulOp(x, head), "logits")
        b(ReturnOp(logits))
        return ModuleOp.create(self.func)

    def attention(self, layer: int, x: Value, cos: Value, sin: Value, positions: Value, slots: Value) -> Value:
        s, b = self.shape, self.b
        d, width = s.head_dim, s.heads * s.head_dim
        n = self.norm(x, "input_layernorm", s.hidden)
        with b.scope("self_attn"):
            parts = []
            for name, heads in (("q", s.heads), ("k", s.kv_heads), ("v", s.kv_heads)):
                y = self.linear(n, f"self_attn.{name}_proj", heads * d, s.hidden, s.bias)
                if s.qk_norm == "row" and name != "v":
                    y = self.norm(y, f"self_attn.{name}_norm", heads * d)
                if s.clip:
                    y = b(ClipOp(y, low=-s.clip, high=s.clip))
                y = b(ReshapeOp(y, shape=(TOKENS, heads, d)), name)
                if s.qk_norm == "head" and name != "v":
                    y = self.norm(y, f"self_attn.{name}_norm", d)
                if name != "v":
                    y = b(RopeOp(y, cos, sin), name)
                parts.append(y)
            q, k, v = parts
            cache_type = KVCacheType(s.kv_heads, d, F32)
            cache = b(KVStateOp(symbol=SymbolRef(f"layers.{layer}"), result_types=[cache_type]), "cache")
            cache = b(KVAppendOp(cache, k, v, positions, slots), "cache")
            scores = b(ScoresOp(q, cache, positions, slots, scale=d**-0.5, window=s.window), "s")
            o = b(AttentionCombineOp(b(SoftmaxOp(scores), "p"), cache, slots), "o")
            o = b(ReshapeOp(o, shape=(TOKENS, width)))
            o = self.linear(o, "self_attn.o_proj", s.hidden, width)
        return b(AddOp(x, o), "x")

    def mlp(self, x: Value) -> Value:
        s, b = self.shape, self.b
        n = self.norm(x, "post_attention_layernorm", s.hidden)
        with b.scope("mlp"):
            g = self.linear(n, "mlp.gate_proj", s.ffn, s.hidden)
            u = self.linear(n, "mlp.up_proj", s.ffn, s.hidden)
            h = b(MulOp(b(SiluOp(g)), u), "h")
            y = self.linear(h, "mlp.down_proj", s.hidden, s.ffn)
        return b(AddOp(x, y), "x")

    def experts(self, x: Value) -> Value:
        s, b = self.shape, self.b
        n = self.norm(x, "post_attention_layernorm", s.hidden)
        with b.scope("mlp"):
            ids, share = b(RouteOp(self.linear(n, "mlp.gate", s.experts, s.hidden), top_k=s.top_k, normalize=True))
            order, offsets = b(DispatchOp(ids, num_experts=s.experts))
            name = f"{self.prefix}mlp.experts.*."
            gate, up = (self.stack(f"{name}{p}_proj.weight", s.ffn, s.hidden) for p in ("gate", "up"))
            g = b(GroupedGemmOp(n, gate, order, offsets, gather=s.top_k), "g")
            u = b(GroupedGemmOp(n, up, order, offsets, gather=s.top_k), "u")
            h = b(MulOp(b(SiluOp(g)), u), "h")
            down = self.stack(f"{name}down_proj.weight", s.hidden, s.ffn)
            y = b(GroupedGemmOp(h, down, order, offsets, gather=0), "y")
            z = b(CombineOp(y, share, order), "z")
        return b(AddOp(x, z), "x")


def build_step(shape: StepShape | None = None, **changes: Any) -> ModuleOp:
    """A module with the function @step; `changes` are fields of StepShape."""
    return _Step(shape or StepShape(**changes)).module()


def random_weights(module: Op, seed: int = 0) -> dict[str, np.ndarray]:
    """An array for every constant of `module`, large enough that a wrong layer shows in the logits."""
    weights: dict[str, np.ndarray] = {}
    for op in module.walk():
        if not isinstance(op, (ConstantOp, ConstantStackOp)):
            continue
        type = op.results[0].type
        stacked = isinstance(op, ConstantStackOp)
        for name in op.symbols() if stacked else [op.symbol.name]:
            if name in weights:
                continue
            shape = type.shape[1:] if stacked else type.shape
            rng = np.random.default_rng([seed, *name.encode()])
            scale = 1.0 if len(shape) == 1 else 1.5 / np.sqrt(shape[-1])
            offset = 1.0 if len(shape) == 1 and "norm" in name else 0.0
            weights[name] = (rng.standard_normal(shape) * scale + offset).astype(type.element.dtype)
    return weights


def run_step(module: ModuleOp, weights: dict[str, np.ndarray], vocab: int = 40, ctx: int = 12) -> np.ndarray:
    """Logits of three ragged steps: two prompts at once, one token of each, then a chunk of one."""
    func = module.function("step")
    states = zero_states(func, slots=2, ctx=ctx)
    rng = np.random.default_rng(5)
    logits = []
    for positions, slots, rows in (
        ([0, 1, 2, 0, 1], [0, 0, 0, 1, 1], [2, 4]),
        ([3, 2], [0, 1], [0, 1]),
        ([3, 4, 5], [1, 1, 1], [2]),
    ):
        ids = rng.integers(0, vocab, len(positions))
        inputs = [np.asarray(a, np.int32) for a in (ids, positions, slots, rows)]
        (out,) = interpret(func, inputs, weights=weights, states=states)
        logits.append(out)
    return np.concatenate(logits)
