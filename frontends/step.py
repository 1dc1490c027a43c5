"""StepBuilder: makes the step function of a model, and remembers which checkpoint tensor every constant stands for.

    func @step(%ids, %positions, %slots: tensor<tokens x i32>, %rows: tensor<rows x i32>)
        -> tensor<rows x VOCAB x f32>

The origin of an op and the name of a weight are the same path: inside `scope("layers.0")`, `scope("self_attn")`,
`scope("q_proj")`, `weight(n, k)` is the tensor `model.layers.0.self_attn.q_proj.weight`. Constants have the element
that the checkpoint stores and are cast to f32; those of quantized checkpoints are assembled from their parts and
dequantized to f32: the graph means the float32 model. Tensors that are missing or
unlike what the model needs do not stop the building: `frontends.tensor_match` reports all of them at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from frontends.checkpoint import WEIGHT_FORMATS
from frontends.config import ModelConfig
from frontends.quantized import ColumnOrder, QuantizedWeight
from frontends.safetensors_header import MAX_TENSORS, TensorInfo
from ir.attributes import SymbolRef
from ir.builder import Builder
from ir.core import Op, Value
from ir.diagnostics import DiagnosticError
from ir.formats import F32, I32, PlainFormat
from ir.ops.builtin import FuncOp, ModuleOp, ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.quant import AssembleOp, DequantizeOp
from ir.ops.quant_columns import SelectColumnsOp
from ir.ops.tensor import CastOp
from ir.ops.tensor_constant import ConstantOp, ConstantStackOp
from ir.types import SymbolicDim, TensorType

TOKENS, ROWS = SymbolicDim("tokens"), SymbolicDim("rows")


@dataclass(frozen=True)
class WeightSpec:
    """A tensor that the model needs. `role` says what for: "embedding", "head", "norm", "bias", "attention.q",
    "mlp.gate", "moe.router", "moe.up", ...: what quantization recipes choose by.
    """

    name: str
    shape: tuple[int, ...]
    role: str


class StepBuilder:
    """Calling it inserts an op and gives its result, as `ir.Builder` does."""

    def __init__(
        self,
        config: ModelConfig,
        tensors: Mapping[str, TensorInfo] | None = None,
        quantized: Mapping[str, QuantizedWeight] | None = None,
    ) -> None:
        """`tensors` are those of the checkpoint; without them every constant is f32. `quantized` are those among them
        that are packed.
        """
        self.config = config
        self.weights: dict[str, WeightSpec] = {}
        self.stacks: dict[str, str] = {}  # tensor -> first tensor of the stack it is part of
        self._tensors = tensors or {}
        self._quantized = quantized or {}
        # A config may claim any number of layers and experts; what is built stays near what is there.
        self._limit = 2 * len(tensors) + 10_000 if tensors is not None else MAX_TENSORS
        rows = TensorType((TOKENS,), I32)
        self.func = FuncOp.create(
            "step", [rows, rows, rows, TensorType((ROWS,), I32)], ("ids", "positions", "slots", "rows")
        )
        self.ids, self.positions, self.slots, self.rows = self.func.arguments
        self._builder = Builder.at_end(self.func.block)

    def __call__(self, op: Op, name: str = "") -> Value:
        return self._builder(op, name)

    def pair(self, op: Op) -> tuple[Value, Value]:
        """Inserts an op of two results."""
        first, second = self._builder(op)
        return first, second

    def scope(self, part: str) -> AbstractContextManager[None]:
        """Ops made inside have `part` appended to their origin."""
        return self._builder.scope(part)

    def constant(self, name: str, *shape: int, role: str) -> Value:
        """The tensor `name` as the checkpoint stores it; a quantized one in f32."""
        self._need(name, shape, role)
        if self._is_low_bit(name, shape) and self._order(name) is None:
            return self._dequantized(name, shape)
        made = ConstantOp(symbol=SymbolRef(name), result_types=[TensorType(shape, self._element(name))])
        return self(made, "w")

    def product(self, x: Value, name: str, n: int, k: int, *, role: str) -> MatmulOp:
        """x [m, k] times the matrix [n, k] that is the tensor `name`, in f32; not inserted.

        Where the codes of a quantized matrix are in an order of their own, the columns of x are put in that order.
        """
        order = self._order(name) if self._is_low_bit(name, (n, k)) else None
        if order is None:
            return MatmulOp(x, self.as_f32(self.constant(name, n, k, role=role)))
        self._need(name, (n, k), role)
        type = TensorType((k,), I32)
        columns = self(ConstantOp(symbol=SymbolRef(order.name), result_types=[type]), "columns")
        return MatmulOp(self(SelectColumnsOp(x, columns), "x"), self._dequantized(name, (n, k)))

    def named(self, leaf: str) -> str:
        """The tensor `model.` + origin + "." + `leaf`."""
        return f"model.{self._builder.origin}.{leaf}"

    def weight(self, *shape: int, role: str, leaf: str = "weight") -> Value:
        """The tensor `model.` + origin + "." + `leaf` in f32."""
        return self.as_f32(self.constant(self.named(leaf), *shape, role=role))

    def stack(self, count: int, part: str, *shape: int, role: str) -> Value:
        """The tensors `model.` + origin + ".N." + `part` + ".weight" for N = 0 .. count-1, stacked, in f32."""
        symbol = f"model.{self._builder.origin}.*.{part}.weight"
        names = [symbol.replace("*", str(i)) for i in range(count)]
        for name in names:
            self._need(name, shape, role)
        self.stacks.update(dict.fromkeys(names, names[0]))
        with self.scope(part):
            if self._is_low_bit(names[0], shape):
                return self._dequantized(names[0], shape, symbol, count)
            type = TensorType((count, *shape), self._element(names[0]))
            made = ConstantStackOp(symbol=SymbolRef(symbol), count=count, result_types=[type])
            return self.as_f32(self(made, "w"))

    def as_f32(self, value: Value) -> Value:
        """`value`, cast unless it is f32 already."""
        element = value.type.element if isinstance(value.type, TensorType) else None
        return value if element == F32 else self(CastOp(value, to=F32), "w")

    def _is_low_bit(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether the tensor is there in a low-bit format, and of the shape that is needed."""
        weight = self._quantized.get(name)
        return weight is not None and weight.low_bit and weight.shape == shape

    def _order(self, name: str) -> ColumnOrder | None:
        """The order of the codes of a quantized weight, where it is not that of the columns."""
        weight = self._quantized.get(name)
        return weight.order_of_codes if weight is not None else None

    def _dequantized(self, name: str, shape: tuple[int, ...], symbol: str = "", count: int = 0) -> Value:
        """The floats that a quantized weight stands for; with `count`, of the stack of weights like it."""
        weight = self._quantized[name]
        parts = []
        for part, type in weight.parts().items():
            reference = SymbolRef(f"{symbol or name}.{part}")
            if count:
                stacked = TensorType((count, *type.shape), type.element)
                op: Op = ConstantStackOp(symbol=reference, count=count, result_types=[stacked])
            else:
                op = ConstantOp(symbol=reference, result_types=[type])
            parts.append(self(op, part))
        packed = self(AssembleOp(*parts, format=weight.format), "w")
        return self(DequantizeOp(packed, to=F32), "w")

    def has_tensor(self, name: str) -> bool:
        """Whether the checkpoint holds a tensor of that name."""
        return name in self._tensors

    def finish(self, logits: Value) -> ModuleOp:
        """The module with the function, which returns `logits`."""
        self(ReturnOp(logits))
        return ModuleOp.create(self.func)

    def _need(self, name: str, shape: tuple[int, ...], role: str) -> None:
        spec = WeightSpec(name, shape, role)
        known = self.weights.setdefault(name, spec)
        if known != spec:
            raise ValueError(f"{name} is needed as {known} and as {spec}")
        if len(self.weights) > self._limit:
            raise DiagnosticError(
                f"config.json describes a model of more than {self._limit} tensors",
                where=self.config.family,
                expected=f"about as many as the checkpoint has, {len(self._tensors)}" if self._tensors else "",
            )

    def _element(self, name: str) -> PlainFormat:
        info = self._tensors.get(name)
        return WEIGHT_FORMATS.get(info.dtype, F32) if info is not None else F32
