"""Rewrites of attention cascades that take away passes over the cache (FuseMax, arXiv:2406.10491).

    DeferDivision      sum over c of (e[c] / l) v[c]   -->   (sum over c of e[c] v[c]) / l               3 -> 2 passes
    FoldOnlineSoftmax  m = max s;  e = exp(s - m);  sums over c of e[c] (and of e[c] v[c])
                       --> one einsum.fold over blocks of c, which keeps a running maximum and shrinks the
                           running sums by exp(old maximum - new maximum) when it grows                   2 -> 1 pass

Both follow from algebra, not from the shape of softmax attention: the first needs a divisor that is the same for every
point, the second that everything made of the exponentials is a sum over the rank. Rounding differs in the last bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.builder import Builder
from ir.core import Block, Op, Region, Value
from ir.ops.einsum import ContractOp, FoldOp, MapOp, ReduceOp, parse_spec
from ir.ops.fused import YieldOp
from ir.rewriter import PatternRewriter, RewritePattern
from passes.analysis.cascade_passes import has_rank


def _is_map(op: Op | None, kind: str) -> bool:
    return isinstance(op, MapOp) and op.op == kind


class DeferDivision(RewritePattern[ContractOp]):
    """contract(div(e, l), v) --> div(contract(e, v), l) for a scalar l"""

    op_type: ClassVar[type[Op]] = ContractOp

    def match_and_rewrite(self, op: ContractOp, rewriter: PatternRewriter) -> bool:
        divided = op.a.defining_op()
        if not _is_map(divided, "div"):
            return False
        assert divided is not None
        numerator, divisor = divided.operands
        if divisor.type.rank != 0:
            return rewriter.no_match(op, f"the divisor {divisor.type} is not the same for every point")
        if not op.a.has_one_use():
            return rewriter.no_match(op, "the quotient has other readers")
        summed = rewriter.insert_before(op, ContractOp(numerator, op.b, spec=op.spec))
        summed.results[0].name_hint = "u"
        return rewriter.replace(op, MapOp(summed.results[0], divisor, op="div"))


@dataclass
class FoldOnlineSoftmax(RewritePattern[ReduceOp]):
    """The maximum of s, the exponentials of s - maximum, and sums of those over `rank` --> one fold over `rank`"""

    op_type: ClassVar[type[Op]] = ReduceOp
    rank: str = "ctx"
    block: int = 64

    def match_and_rewrite(self, op: ReduceOp, rewriter: PatternRewriter) -> bool:
        if op.op != "max" or op.x.type.rank != 1 or not has_rank(op.x, self.rank):
            return False
        scores = op.x
        exponentials: list[Value] = []
        for user in op.y.users:
            if not (_is_map(user, "sub") and user.operands[0] is scores and user.operands[1] is op.y):
                return rewriter.no_match(op, f"the maximum is read by {user.name}, not only taken off the scores")
            for reader in user.results[0].users:
                if not _is_map(reader, "exp"):
                    return rewriter.no_match(op, f"the differences are read by {reader.name}, not only by exp")
                exponentials.append(reader.results[0])
        sums: list[Op] = []
        for user in (u for e in exponentials for u in e.users):
            if not self._is_sum(user, exponentials):
                return rewriter.no_match(op, f"the exponentials are read by {user.name}, no sum over {self.rank}")
            sums.append(user)
        assert op.parent is not None
        sums = sorted(dict.fromkeys(sums), key=op.parent.ops.index)
        if not sums:
            return rewriter.no_match(op, "nothing is summed")
        self._rewrite(scores, sums, rewriter)
        return True

    def _is_sum(self, op: Op, exponentials: list[Value]) -> bool:
        if isinstance(op, ReduceOp):
            return op.op == "sum" and op.y.type.rank == 0
        if not isinstance(op, ContractOp) or op.a not in exponentials or op.b in exponentials:
            return False
        (first, second), output = parse_spec(op.spec, 2)
        return first not in output and second[0] == first and has_rank(op.b, self.rank) and op.y.type.static

    def _rewrite(self, scores: Value, sums: list[Op], rewriter: PatternRewriter) -> None:
        """Puts the fold in front of the last sum: everything it reads is there by then."""
        factors = list(dict.fromkeys(op.operands[1] for op in sums if isinstance(op, ContractOp)))
        operands = [scores, *factors]
        maximum = ReduceOp.inferred_types([scores.type], {"op": "max", "spec": "c->"})[0]
        running = [maximum, *(op.results[0].type for op in sums)]
        hints = ["m", *(op.results[0].name_hint for op in sums), *(v.name_hint for v in operands)]
        body = Block([*running, *(FoldOp.block_type(v.type, self.rank) for v in operands)], hints)
        self._fill(body, sums, factors)
        carry = ("max", *("sum" for _ in sums))
        fold = FoldOp(*operands, regions=[Region(body)], rank=self.rank, block=self.block, carry=carry)
        rewriter.insert_before(sums[-1], fold)
        for old, new in zip(sums, fold.results[1:], strict=True):
            new.name_hint = old.results[0].name_hint
            rewriter.replace_with_values(old, [new])

    def _fill(self, body: Block, sums: list[Op], factors: list[Value]) -> None:
        """The step of one block: the new maximum, what the old sums shrink by, the new sums."""
        b = Builder.at_end(body)
        m, old_sums = body.arguments[0], body.arguments[1 : 1 + len(sums)]
        s, *blocks = body.arguments[1 + len(sums) :]
        new_m = b(MapOp(m, b(ReduceOp(s, op="max", spec="c->")), op="max"), "m")
        e = b(MapOp(b(MapOp(s, new_m, op="sub"), "d"), op="exp"), "e")
        shrink = b(MapOp(b(MapOp(m, new_m, op="sub")), op="exp"), "f")
        new_sums = []
        for op, old in zip(sums, old_sums, strict=True):
            kept = b(MapOp(old, shrink, op="mul"))
            if isinstance(op, ContractOp):
                added = b(ContractOp(e, blocks[factors.index(op.operands[1])], spec=op.spec))
            else:
                added = b(ReduceOp(e, op="sum", spec=op.attributes["spec"]))
            new_sums.append(b(MapOp(kept, added, op="add"), old.name_hint))
        b(YieldOp(new_m, *new_sums))
