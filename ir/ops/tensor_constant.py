"""tensor.constant and tensor.constant_stack: weights of the checkpoint, by name; their bytes are never in the IR."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ir.attributes import SymbolRef
from ir.op_def import Op, attr, register_op, result
from ir.traits import ConstantLike, Pure
from ir.types import TensorType


@register_op
class ConstantOp(Op):
    """A weight of the checkpoint, by name. Its type is given; its bytes are never part of the IR.

    Example:
        %w = tensor.constant {symbol = @model.norm.weight} : () -> tensor<64 x bf16>
    """

    name = "tensor.constant"
    traits = (ConstantLike, Pure)
    symbol = attr(SymbolRef, "name of the tensor in the checkpoint")
    value = result("the weight; shape and element are part of its type")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (context.weight(self.symbol.name),)


@register_op
class ConstantStackOp(Op):
    """`count` equally shaped weights stacked along a new first axis: the experts of a layer, or some of them.

    Example:
        %w = tensor.constant_stack {symbol = @experts.*.up_proj.weight, count = 8} : () -> tensor<8 x 32 x 16 x bf16>
    """

    name = "tensor.constant_stack"
    traits = (ConstantLike, Pure)
    symbol = attr(SymbolRef, "name in the checkpoint with one `*`, which stands for 0 .. count-1, or for `members`")
    count = attr(int, "how many tensors are stacked")
    members = attr(tuple, "the numbers that `*` stands for, ascending; empty: 0 .. count-1", default=())
    value = result("[count, ...]")

    def symbols(self) -> tuple[str, ...]:
        """The names of the stacked tensors, in order."""
        return tuple(self.symbol.name.replace("*", str(i), 1) for i in self.members or range(self.count))

    def verify(self, diag: Any) -> None:
        if self.symbol.name.count("*") != 1:
            diag.error(self.location, f"expected one '*' in the symbol of {self.name}, got {self.symbol}")
        numbers, found = self.members, self.value.type
        whole = all(type(i) is int and i >= 0 for i in numbers) and len(numbers) == self.count
        if numbers and not (whole and list(numbers) == sorted(set(numbers))):
            diag.error(self.location, f"expected {self.count} ascending members of {self.name}, got {list(numbers)}")
        if not isinstance(found, TensorType) or found.rank < 1 or found.shape[0] != self.count:
            diag.error(self.location, f"expected a tensor whose first dimension is count = {self.count}, got {found}")

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return (np.stack([context.weight(name) for name in self.symbols()]),)
