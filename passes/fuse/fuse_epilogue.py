"""fuse-epilogue: what is done to the result of a product, element by element, goes into the product's kernel.

    %y = gemm.matmul %x, %w            %s = tensor.fused %x, %w, %r {kind = "gemm"} ({
    %s = tensor.add %y, %r     -->       %y = gemm.matmul, %s = tensor.add
                                         tensor.yield %s })

Takes bias and residual additions, products with a vector or a matrix of the result's shape, silu, clip, one swiglu
and at last one cast, as long as each value has one reader. The fused op stands where the last of them stood. It grows
what fuse-norm-gemm made, or starts anew; grouped GEMMs likewise. An attention takes the reshape and cast behind it
in the same way (kind "attention", at the place of the attention). The latest product of a block chooses first, so that
a sum of two products goes to the later one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Block, Op, Value
from ir.ops.attention import AttentionOp
from ir.ops.fused import FusedOp
from ir.ops.tensor import AddOp, CastOp, MulOp, ReshapeOp, SwigluOp
from ir.rewriter import PatternRewriter
from passes.analysis.value_types import tensor_type
from passes.fuse.forms import EPILOGUE_OPS, PRODUCTS, describe_gemm
from passes.fuse.outline import only_reader, outline
from passes.pass_base import FunctionPass, PassContext, register_pass


class GrowEpilogue:
    """Product, then a chain of single readers --> fused "gemm" """

    def apply(self, op: Op, rewriter: PatternRewriter) -> bool:
        block = op.parent
        assert block is not None
        chain: list[Op] = []
        seen = list(describe_gemm(op).epilogue) if isinstance(op, FusedOp) else []
        last = op.results[0]
        while True:
            reader = self._next(op, last, block, seen, rewriter)
            if reader is None:
                break
            chain.append(reader)
            seen.append(reader)
            last = reader.results[0]
        if not chain:
            return False
        outline(rewriter, "gemm", [op, *chain], [last], anchor=chain[-1])
        return True

    def _next(self, op: Op, last: Value, block: Block, seen: list[Op], rewriter: PatternRewriter) -> Op | None:
        """The next op of the chain, its chain operand turned to the front; None with a reason when the chain ends."""
        reader = only_reader(last, block)
        if reader is None:
            if any(isinstance(user, EPILOGUE_OPS) for user in last.users):
                rewriter.no_match(op, f"its result has {len(last.uses)} readers")
            return None
        if not isinstance(reader, EPILOGUE_OPS):
            return None
        if any(isinstance(o, CastOp) for o in seen):
            rewriter.no_match(op, f"{reader.name} follows a cast, which ends an epilogue")
            return None
        if isinstance(reader, SwigluOp) and any(isinstance(o, SwigluOp) for o in seen):
            rewriter.no_match(op, "a second swiglu follows the first")
            return None
        if isinstance(reader, (AddOp, MulOp)):
            if reader.operands[0] is not last:
                first, second = reader.operands
                rewriter.set_operand(reader, 0, second)
                rewriter.set_operand(reader, 1, first)
            type, other = tensor_type(last), tensor_type(reader.operands[1])
            if reader.y.type != type or (other.shape != type.shape and other.rank != 1):
                rewriter.no_match(op, f"{reader.name} of {type} and {other} is neither a bias nor a residual")
                return None
        return reader


class GrowAttention:
    """attention, [reshape to a matrix], [cast] --> fused "attention" """

    def apply(self, op: AttentionOp, rewriter: PatternRewriter) -> bool:
        chain: list[Op] = []
        last: Value = op.y
        for kind in (ReshapeOp, CastOp):
            reader = only_reader(last, op.parent)
            if isinstance(reader, kind) and (kind is CastOp or tensor_type(reader.results[0]).rank == 2):
                chain.append(reader)
                last = reader.results[0]
        if not chain:
            return False
        outline(rewriter, "attention", [op, *chain], [last], anchor=op)
        return True


@register_pass
@dataclass(frozen=True)
class FuseEpiloguePass(FunctionPass):
    """Bias, residual, activation and cast into the epilogues of GEMMs; reshape and cast into those of attentions."""

    name: ClassVar[str] = "fuse-epilogue"

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        for region in func.regions:
            for block in region.blocks:
                for op in reversed(list(block.ops)):
                    if isinstance(op, PRODUCTS) or (isinstance(op, FusedOp) and op.kind == "gemm"):
                        rewriter.pattern = GrowEpilogue.__name__
                        GrowEpilogue().apply(op, rewriter)
                    elif isinstance(op, AttentionOp):
                        rewriter.pattern = GrowAttention.__name__
                        GrowAttention().apply(op, rewriter)
