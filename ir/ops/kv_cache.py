"""kv.*: the state of attention. A cache is a value: `kv.append` gives the next version of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.attributes import SymbolRef
from ir.diagnostics import DiagnosticSink
from ir.kv_state import KVState
from ir.op_def import Op, attr, operand, register_op, result
from ir.ops import checks
from ir.sizes import num_bytes
from ir.traits import Pure, WritesKVCache
from ir.types import KVCacheType, TensorType, Type


@register_op
class KVStateOp(Op):
    """The KV cache of one layer as the step finds it: a name for state that outlives the step.

    Example:
        %cache = kv.state {symbol = @layers.0} : () -> kv<2 x 16 x bf16>
    """

    name = "kv.state"
    traits = (Pure,)
    symbol = attr(SymbolRef, "the layer, `layers.N`")
    cache = result("kv<heads x width x element>")

    def verify(self, diag: DiagnosticSink) -> None:
        type = self.cache.type
        if not isinstance(type, KVCacheType):
            diag.error(self.location, f"expected {self.name} to give a kv cache, got {type}")
        elif type.fault:
            diag.error(self.location, type.fault)

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.state(self.symbol.name),)


@register_op
class KVAppendOp(Op):
    """The cache with row t of k and v stored at (slots[t], positions[t]), rounded to the element of the cache.

    Rows of one step never share a (slot, position). Positions that are not written keep what they hold.

    Example:
        %new = kv.append %cache, %k, %v, %positions, %slots
            : (kv<2 x 16 x bf16>, tensor<tokens x 2 x 16 x f32>, tensor<tokens x 2 x 16 x f32>, tensor<tokens x i32>,
            tensor<tokens x i32>) -> kv<2 x 16 x bf16>
    """

    name = "kv.append"
    traits = (WritesKVCache,)
    cache = operand("kv<heads x width x element>")
    k = operand("keys [tokens, heads, width]")
    v = operand("values [tokens, heads, width]")
    positions = operand("i32 [tokens]: position of the row in its sequence")
    slots = operand("i32 [tokens]: sequence slot of the row")
    new_cache = result("the next version of the cache")

    @staticmethod
    def infer_types(cache: Type, k: Type, v: Type, positions: Type, slots: Type) -> KVCacheType:
        found = checks.kv_cache(cache)
        keys, values = checks.float_tensor(k, "k", rank=3), checks.float_tensor(v, "v", rank=3)
        checks.same("shapes of k and v", list(map(str, keys.shape)), list(map(str, values.shape)))
        checks.same("kv heads of cache and k", found.num_kv_heads, keys.shape[1])
        checks.same("head width of cache and k", found.head_dim, keys.shape[2])
        checks.same("tokens of k and positions", keys.shape[0], checks.i32_tensor(positions, "positions").shape[0])
        checks.same("tokens of k and slots", keys.shape[0], checks.i32_tensor(slots, "slots").shape[0])
        return found

    @staticmethod
    def reference(cache: KVState, k: np.ndarray, v: np.ndarray, positions: np.ndarray, slots: np.ndarray) -> KVState:
        return cache.append(k, v, positions, slots)

    def operand_bytes(self, index: int, sizes: dict[str, int]) -> int:
        if index != 0:
            return super().operand_bytes(index, sizes)
        return 2 * num_bytes(TensorType(self.k.type.shape, self.cache.type.element), sizes)  # what is written
