"""Small step functions for tests of code generation: every block the families use, sizes free, weights random."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ir.attributes import Rope, SymbolRef
from ir.builder import Builder
from ir.core import Value
from ir.formats import F32, I32, PlainFormat
from ir.kv_state import KVState
from ir.ops import moe, tensor
from ir.ops.attention import CombineOp, RopeOp, RopeTableOp, ScoresOp, SoftmaxOp
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp, KVStateOp
from ir.ops.norm import RmsNormOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.types import KVCacheType, SymbolicDim, TensorType

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `experts` = 0 makes it dense. `norms` is "none", "head" or "row" (of q and k)."""

    hidden: int = 64
    layers: int = 1
    q_heads: int = 4
    kv_heads: int = 2
    dim: int = 16
    ffn: int = 96
    vocab: int = 50
    experts: int = 0
    top_k: int = 2
    norms: str = "none"
    window: int = 0
    bias: bool = False
    clip: float = 0.0
    element: PlainFormat = F32


@dataclass
class Model:
    """A module with its @step and the weights, readable as codegen reads a checkpoint."""

    shape: Shape
    module: ModuleOp
    weights: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def step(self) -> FuncOp:
        return self.module.function("step")

    def read(self, name: str) -> np.ndarray:
        return self.weights[name]

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        return self.weights[name][first:last]

    def states(self, slots: int, ctx: int, dtype: Any = np.float32) -> dict[str, KVState]:
        s = self.shape
        return {f"layers.{i}": KVState.zeros(slots, ctx, s.kv_heads, s.dim, dtype) for i in range(s.layers)}


class _StepBuilder:
    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self.random = np.random.default_rng(seed)
        self.weights: dict[str, np.ndarray] = {}
        types = [TensorType((TOKENS,), I32)] * 3 + [TensorType((ROWS,), I32)]
        self.func = FuncOp.create("step", types, ["ids", "positions", "slots", "rows"])
        self.b = Builder.at_end(self.func.block)

    def constant(self, name: str, *shape: int, scale: float = 0.0) -> Value:
        """A weight as f32: matrices around 1/sqrt(k), vectors around one."""
        element = self.shape.element
        values = self.random.standard_normal(shape)
        values = values * (scale or shape[-1] ** -0.5) if len(shape) > 1 else 1 + 0.1 * values
        self.weights[name] = values.astype(element.dtype)
        made = self.b(ConstantOp(symbol=SymbolRef(name), result_types=[TensorType(shape, element)], origin=name))
        return made if element == F32 else self.b(tensor.CastOp(made, to=F32))

    def experts(self, name: str, *shape: int) -> Value:
        element, count = self.shape.element, self.shape.experts
        for e in range(count):
            values = self.random.standard_normal(shape) * shape[-1] ** -0.5
            self.weights[name.replace("*", str(e))] = values.astype(element.dtype)
        stacked = TensorType((count, *shape), element)
        made = self.b(ConstantStackOp(symbol=SymbolRef(name), count=count, result_types=[stacked], origin=name))
        return made if element == F32 else self.b(tensor.CastOp(made, to=F32))

    def project(self, x: Value, name: str, n: int, k: int) -> Value:
        y = self.b(MatmulOp(x, self.constant(f"{name}.weight", n, k)))
        if self.shape.bias:
            y = self.b(tensor.AddOp(y, self.constant(f"{name}.bias", n)))
        return y

    def attention(self, x: Value, layer: str, cos: Value, sin: Value) -> Value:
        b, s = self.b, self.shape
        _, positions, slots, _ = self.func.arguments
        heads = {"q": s.q_heads, "k": s.kv_heads, "v": s.kv_heads}
        made: dict[str, Value] = {}
        for part, count in heads.items():
            y = self.project(x, f"{layer}.{part}_proj", count * s.dim, s.hidden)
            if s.norms == "row" and part != "v":
                y = b(RmsNormOp(y, self.constant(f"{layer}.{part}_norm", count * s.dim), eps=1e-5))
            if s.clip:
                y = b(tensor.ClipOp(y, low=-s.clip, high=s.clip))
            y = b(tensor.ReshapeOp(y, shape=(TOKENS, count, s.dim)))
            if s.norms == "head" and part != "v":
                y = b(RmsNormOp(y, self.constant(f"{layer}.{part}_norm", s.dim), eps=1e-5))
            made[part] = b(RopeOp(y, cos, sin)) if part != "v" else y
        cache_type = KVCacheType(s.kv_heads, s.dim, F32)
        cache = b(KVStateOp(symbol=SymbolRef(layer), result_types=[cache_type]))
        cache = b(KVAppendOp(cache, made["k"], made["v"], positions, slots))
        scores = b(ScoresOp(made["q"], cache, positions, slots, scale=s.dim**-0.5, window=s.window))
        out = b(CombineOp(b(SoftmaxOp(scores)), cache, slots))
        out = b(tensor.ReshapeOp(out, shape=(TOKENS, s.q_heads * s.dim)))
        return self.project(out, f"{layer}.o_proj", s.hidden, s.q_heads * s.dim)

    def mlp(self, x: Value, layer: str) -> Value:
        b, s = self.b, self.shape
        if not s.experts:
            gate = self.project(x, f"{layer}.gate_proj", s.ffn, s.hidden)
            up = self.project(x, f"{layer}.up_proj", s.ffn, s.hidden)
            return self.project(b(tensor.MulOp(b(tensor.SiluOp(gate)), up)), f"{layer}.down_proj", s.hidden, s.ffn)
        logits = b(MatmulOp(x, self.constant(f"{layer}.router", s.experts, s.hidden)))
        ids, shares = b(moe.RouteOp(logits, top_k=s.top_k, normalize=True))
        order, offsets = b(moe.DispatchOp(ids, num_experts=s.experts))
        up_shape, down_shape = (s.ffn, s.hidden), (s.hidden, s.ffn)
        gate, up = (
            b(moe.GroupedGemmOp(x, self.experts(name, *up_shape), order, offsets, gather=s.top_k))
            for name in (f"{layer}.experts.*.gate", f"{layer}.experts.*.up")
        )
        hidden = b(tensor.MulOp(b(tensor.SiluOp(gate)), up))
        w = self.experts(f"{layer}.experts.*.down", *down_shape)
        down = b(moe.GroupedGemmOp(hidden, w, order, offsets, gather=0))
        return b(moe.CombineOp(down, shares, order))

    def build(self) -> Model:
        b, s = self.b, self.shape
        ids, positions, _, rows = self.func.arguments
        h = b(tensor.EmbedOp(ids, self.constant("embed", s.vocab, s.hidden, scale=1.0)))
        cos, sin = b(RopeTableOp(positions, rope=Rope(dim=s.dim)))
        for i in range(s.layers):
            layer = f"layers.{i}"
            normed = b(RmsNormOp(h, self.constant(f"{layer}.norm1", s.hidden), eps=1e-6))
            h = b(tensor.AddOp(h, self.attention(normed, layer, cos, sin)))
            normed = b(RmsNormOp(h, self.constant(f"{layer}.norm2", s.hidden), eps=1e-6))
            h = b(tensor.AddOp(h, self.mlp(normed, layer)))
        last = b(RmsNormOp(b(tensor.GatherRowsOp(h, rows)), self.constant("norm", s.hidden), eps=1e-6))
        b(ReturnOp(b(MatmulOp(last, self.constant("lm_head", s.vocab, s.hidden)))))
        return Model(s, ModuleOp.create(self.func), self.weights)


def build_model(shape: Shape, seed: int = 0) -> Model:
    """The step function of a model of that shape, with random weights."""
    return _StepBuilder(shape, seed).build()


class WholeTensors:
    """A `TensorSource` over `read(name) -> array`; keeps the tensor read last."""

    def __init__(self, read: Callable[[str], np.ndarray]) -> None:
        self._read = read
        self._last = ("", np.empty(0))  # replaced as a whole: several threads read

    def read_rows(self, name: str, first: int, last: int) -> np.ndarray:
        kept, tensor = self._last
        if name != kept:
            tensor = self._read(name)
            self._last = name, tensor
        return tensor[first:last] if tensor.ndim else tensor
