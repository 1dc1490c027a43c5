"""fuse-gate-up: the two projections of a gated MLP become one GEMM, their product one op.

    %g = gemm.matmul %x, %wg            %w = tensor.concat %wg, %wu {axis = 0}            (constant expression)
    %u = gemm.matmul %x, %wu    -->     %y = gemm.matmul %x, %w
    %s = tensor.silu %g                 %h = tensor.swiglu %y
    %h = tensor.mul %s, %u

The same for experts, `moe.grouped_gemm` with stacked weights [E, n, k] concatenated along axis 1. Biases right behind
both products are concatenated too. Applies when every value in between has this one reader and the weights are
constants of one type; either order of the product is met, canonicalized or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op, Value
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.tensor import AddOp, MulOp, SiluOp, SwigluOp
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily, fused_location
from passes.analysis.constants import is_constant_expression
from passes.fuse.horizontal import stack, stackable_weights
from passes.pass_base import FunctionPass, PassContext, register_pass


@dataclass(frozen=True)
class _Branch:
    """One of the two projections: the product and its bias, if it has one."""

    product: MatmulOp | GroupedGemmOp
    bias: AddOp | None


def _branch(value: Value) -> _Branch | str:
    """The projection that makes `value`, or why it is none."""
    op, bias = value.defining_op(), None
    if isinstance(op, AddOp) and op.b.type.rank == 1 and is_constant_expression(op.b):
        op, bias = op.a.defining_op(), op
    if not isinstance(op, (MatmulOp, GroupedGemmOp)):
        return f"a factor is made by {op.name if op is not None else 'no op'}, not by a product"
    if not op.y.has_one_use() or (bias is not None and not bias.y.has_one_use()):
        return "a projection has other readers"
    return _Branch(op, bias)


class FuseGateUp(RewritePattern[MulOp]):
    """mul(silu(product(x, gate)), product(x, up)) --> swiglu(product(x, gate | up))"""

    op_type: ClassVar[type[Op]] = MulOp

    def match_and_rewrite(self, op: MulOp, rewriter: PatternRewriter) -> bool:
        factors = op.operands
        silu = next((f.defining_op() for f in factors if isinstance(f.defining_op(), SiluOp)), None)
        if silu is None:
            return False
        if not silu.results[0].has_one_use():
            return rewriter.no_match(op, "the activated gate has other readers")
        other = factors[1] if factors[0] is silu.results[0] else factors[0]
        gate, up = _branch(silu.operands[0]), _branch(other)
        for branch in (gate, up):
            if isinstance(branch, str):
                return rewriter.no_match(op, branch)
        assert isinstance(gate, _Branch) and isinstance(up, _Branch)
        reason = self._mismatch(gate, up, op)
        if reason:
            return rewriter.no_match(op, reason)
        self._rewrite(op, silu, gate, up, rewriter)
        return True

    def _mismatch(self, gate: _Branch, up: _Branch, op: Op) -> str:
        g, u = gate.product, up.product
        if type(g) is not type(u) or g.attributes != u.attributes:
            return f"gate and up are different ops: {g.name} and {u.name}"
        if g.operands[0] is not u.operands[0] or g.operands[2:] != u.operands[2:]:
            return "gate and up read different activations"
        if g.parent is not op.parent or u.parent is not op.parent:
            return "gate and up are in different blocks"
        if (gate.bias is None) != (up.bias is None):
            return "only one of gate and up has a bias"
        if g.w.type != u.w.type:
            return f"the weights have the types {g.w.type} and {u.w.type}"
        return stackable_weights([g.w, u.w], axis=g.w.type.rank - 2)

    def _rewrite(self, op: MulOp, silu: Op, gate: _Branch, up: _Branch, rewriter: PatternRewriter) -> None:
        """Everything new stands where the product of the two stood: whatever it reads is there by then."""
        g, u = gate.product, up.product
        weight = stack([g.w, u.w], g.w.type.rank - 2, op, rewriter)
        x, _, *groups = g.operands
        made: Op = type(g)(x, weight, *groups, location=fused_location(g, u), **g.attributes)
        rewriter.insert_before(op, made)
        if gate.bias is not None and up.bias is not None:
            bias = stack([gate.bias.b, up.bias.b], 0, op, rewriter)
            made = rewriter.insert_before(op, AddOp(made.results[0], bias, location=fused_location(gate.bias, up.bias)))
        rewriter.replace(op, SwigluOp(made.results[0], location=fused_location(silu, op)))
        for dead in (silu, gate.bias, up.bias, g, u):
            if dead is not None:
                rewriter.erase(dead)


@register_pass
@dataclass(frozen=True)
class FuseGateUpPass(FunctionPass):
    """Gate and up by one GEMM, dense and experts."""

    name: ClassVar[str] = "fuse-gate-up"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FuseGateUp()], ctx.rewriter())
