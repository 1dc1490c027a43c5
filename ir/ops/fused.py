"""tensor.fused and tensor.yield: ops that are to become one kernel, and the end of a region."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ir.core import Op as CoreOp
from ir.core import Region
from ir.diagnostics import DiagnosticSink
from ir.op_def import InferenceError, Op, attr, operand, region, register_op, result
from ir.sizes import num_bytes
from ir.traits import HasRecursiveEffects, IsolatedFromAbove, Terminator
from ir.types import KVCacheType, TensorType, Type

FUSED_KINDS = ("gemm", "elementwise", "rope_append", "attention")


@register_op
class YieldOp(Op):
    """Ends a region; its operands are what the region gives.

    Example:
        %y = tensor.fused %x {kind = "elementwise"} ({
          ^(%a: tensor<tokens x 16 x f32>):
            tensor.yield %a : (tensor<tokens x 16 x f32>) -> ()
        }) : (tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.yield"
    traits = (Terminator,)
    values = operand("what the region gives", variadic=True)

    @staticmethod
    def infer_types(*values: Type) -> tuple[Type, ...]:
        return ()

    @staticmethod
    def reference(*values: Any) -> tuple[Any, ...]:
        return ()


def yielded_types(name: str, regions: Sequence[Region]) -> tuple[Type, ...]:
    """The types that the only region of an op yields."""
    if len(regions) != 1 or len(regions[0].blocks) != 1:
        raise InferenceError(f"expected {name} to have one region of one block, got {len(regions)} regions")
    end = regions[0].block.terminator
    if not isinstance(end, YieldOp):
        found = end.name if end else "nothing"
        raise InferenceError(f"expected the region of {name} to end in tensor.yield, got {found}")
    return tuple(v.type for v in end.operands)


def verify_arguments(op: CoreOp, wanted: Sequence[Type], diag: DiagnosticSink) -> bool:
    """Reports when the block arguments of the only region of `op` have other types than `wanted`."""
    found = tuple(a.type for a in op.region.block.arguments)
    if found == tuple(wanted):
        return True
    texts = ["(" + ", ".join(map(str, types)) + ")" for types in (wanted, found)]
    diag.error(op.location, f"expected block arguments of {op.name} of types {texts[0]}, got {texts[1]}")
    return False


@register_op
class FusedOp(Op):
    """Ops that run as one kernel. The meaning is the body, nothing else; `kind` says which kernel family takes it.

    Example:
        %y = tensor.fused %x, %r {kind = "elementwise"} ({
          ^(%a: tensor<tokens x 16 x f32>, %b: tensor<tokens x 16 x f32>):
            %s = tensor.silu %a : (tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
            %t = tensor.add %s, %b : (tensor<tokens x 16 x f32>, tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
            tensor.yield %t : (tensor<tokens x 16 x f32>) -> ()
        }) : (tensor<tokens x 16 x f32>, tensor<tokens x 16 x f32>) -> tensor<tokens x 16 x f32>
    """

    name = "tensor.fused"
    traits = (IsolatedFromAbove, HasRecursiveEffects)
    inputs = operand("the block arguments' values, one for one", variadic=True)
    kind = attr(str, "kernel family: gemm, elementwise, rope_append or attention")
    body = region("one block, ended by tensor.yield")
    outputs = result("what the body yields", variadic=True)

    @classmethod
    def inferred_types(
        cls, operand_types: Sequence[Type], attributes: dict[str, Any], regions: Sequence[Region] = ()
    ) -> tuple[Type, ...]:
        return yielded_types(cls.name, regions)

    def verify(self, diag: DiagnosticSink) -> None:
        if self.kind not in FUSED_KINDS:
            diag.error(self.location, f"expected kind of {self.name} among {', '.join(FUSED_KINDS)}, got {self.kind!r}")
        verify_arguments(self, [v.type for v in self.operands], diag)

    def interpret(self, values: Sequence[Any], context: Any) -> tuple[Any, ...]:
        return tuple(context.run_region(self.body, values))

    def flops(self, sizes: dict[str, int]) -> int:
        return sum(inner.flops(sizes) for inner in self.body.block.ops if isinstance(inner, Op))

    def bytes_moved(self, sizes: dict[str, int]) -> int:
        """Operands and results once, what stays inside never; of a cache what the inner ops touch."""
        moved = sum(num_bytes(r.type, sizes) for r in self.results if isinstance(r.type, TensorType))
        for argument in self.body.block.arguments:
            if isinstance(argument.type, TensorType):
                reads = sum(op.operand_bytes(i, sizes) for op, i in argument.uses if isinstance(op, Op))
                moved += min(num_bytes(argument.type, sizes), reads)
        for inner in self.body.block.ops:
            for i, value in enumerate(inner.operands):
                if isinstance(value.type, KVCacheType) and isinstance(inner, Op):
                    moved += inner.operand_bytes(i, sizes)
        return moved
