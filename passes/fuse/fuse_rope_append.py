"""fuse-rope-append: everything between the joint projection and the attention becomes one op.

    %y -> slice q, k, v -> [norm] -> [clip]              %q, %c1 = tensor.fused %y, %cos, %sin, %c0,
       -> heads -> [norm] -> rope q, k             -->       %positions, %slots, [%gq, %gk]
    %c1 = kv.append %c0, %k, %v, %positions, %slots          {kind = "rope_append"} ({ ... })

Rows are cut, normalised, rotated and stored in one sweep. Applies when q, k and v are the three parts of one value, in
this order and without gaps, every value in between has one reader, q and k are rotated by the same table and
normalised alike, all three are clipped alike or not at all, and nothing reads the rotated q before the append. The
fused op stands where the append stood, so no access of the cache moves. Body and operands come in one order, see
docs/passes/fuse.md; a clip that works on heads is moved in front of the reshape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ir.core import Op, Value
from ir.ops.attention import RopeOp
from ir.ops.fused import FusedOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.tensor import ClipOp, ReshapeOp, SliceOp
from ir.rewriter import PatternRewriter, RewritePattern, apply_greedily
from passes.fuse.forms import FormError, StreamForm, read_stream
from passes.fuse.outline import only_reader, outline
from passes.pass_base import FunctionPass, PassContext, register_pass


class FuseRopeAppend(RewritePattern[KVAppendOp]):
    """Slices of one projection, normalised, rotated and appended --> fused "rope_append" """

    op_type: ClassVar[type[Op]] = KVAppendOp

    def match_and_rewrite(self, op: KVAppendOp, rewriter: PatternRewriter) -> bool:
        if isinstance(op.parent_op, FusedOp):
            return False
        try:
            k, v = read_stream(op.k), read_stream(op.v)
            rotated = self._rotated_queries(k.slice, v.slice)
            q = read_stream(rotated)
            self._check(op, q, k, v)
        except FormError as error:
            return rewriter.no_match(op, str(error))
        self._rewrite(op, rotated, rewriter)
        return True

    def _rotated_queries(self, k: SliceOp, v: SliceOp) -> Value:
        """The rotated heads made of the third slice of the joint projection."""
        others = [u for u in k.x.users if u is not k and u is not v]
        if len(others) != 1 or not isinstance(others[0], SliceOp):
            raise FormError(f"the joint projection has {len(others)} readers besides keys and values, not one slice")
        op: Op | None = others[0]
        while op is not None and not isinstance(op, RopeOp):
            op = only_reader(op.results[0], op.parent)
        if op is None:
            raise FormError("the queries are not rotated, or have several readers before they are")
        return op.results[0]

    def _check(self, append: KVAppendOp, q: StreamForm, k: StreamForm, v: StreamForm) -> None:
        """Raises FormError unless the three streams can be one kernel."""
        if q.rope is None or k.rope is None or v.rope is not None:
            raise FormError("expected rotated queries and keys and values that are not")
        if q.rope.operands[1:] != k.rope.operands[1:]:
            raise FormError("queries and keys are rotated by different tables")
        start = 0
        for name, stream in (("queries", q), ("keys", k), ("values", v)):
            cut = stream.slice
            if cut.x is not k.slice.x or (cut.axis, cut.start) != (1, start):
                raise FormError(f"the {name} do not begin at column {start} of the joint projection")
            start += cut.size
            for op in stream.ops():
                if op.parent is not append.parent:
                    raise FormError(f"{op.name} of the {name} is in another block")
                if len(op.results[0].uses) > 1 and op is not q.rope:
                    raise FormError(f"{op.name} of the {name} has {len(op.results[0].uses)} readers")
        if k.slice.x.type.shape[1] != start:
            raise FormError(f"the joint projection is {k.slice.x.type}, its three parts have {start} columns")
        for kind in ("row_norm", "head_norm"):
            if (getattr(q, kind) is None) != (getattr(k, kind) is None):
                raise FormError("only one of queries and keys is normalised")
            if getattr(v, kind) is not None:
                raise FormError("the values are normalised")
        if q.row_norm is not None and q.head_norm is not None:
            raise FormError("queries are normalised twice")
        clips = [stream.clip.attributes if stream.clip is not None else None for stream in (q, k, v)]
        if clips[0] != clips[1] or clips[0] != clips[2]:
            raise FormError("queries, keys and values are clipped differently")
        assert append.parent is not None
        before = set(append.parent.ops[: append.parent.ops.index(append)])
        if any(user in before for user in q.rope.y.users):
            raise FormError("the rotated queries are read before the append")

    def _rewrite(self, append: KVAppendOp, rotated: Value, rewriter: PatternRewriter) -> None:
        for value in (rotated, append.k, append.v):
            _clip_before_reshape(value, rewriter)
        q, k, v = read_stream(rotated), read_stream(append.k), read_stream(append.v)
        assert q.rope is not None
        body = [op for step in zip(q.steps(), k.steps(), v.steps(), strict=True) for op in step if op is not None]
        gains = [n.operands[1] for s in (q, k) for n in (s.row_norm or s.head_norm,) if n is not None]
        leading = [k.slice.x, *q.rope.operands[1:], append.cache, append.positions, append.slots]
        outline(
            rewriter,
            "rope_append",
            [*body, append],
            [rotated, append.new_cache],
            anchor=append,
            leading=[*leading, *gains],
        )


def _clip_before_reshape(value: Value, rewriter: PatternRewriter) -> None:
    """reshape, clip --> clip, reshape in the stream that ends in `value`."""
    op = value.defining_op()
    while op is not None and not isinstance(op, SliceOp):
        inner = op.operands[0].defining_op()
        if isinstance(op, ClipOp) and isinstance(inner, ReshapeOp):
            clip = rewriter.insert_before(op, ClipOp(inner.x, location=op.location, **op.attributes))
            rewriter.replace(op, ReshapeOp(clip.results[0], shape=inner.shape, location=inner.location))
            rewriter.erase(inner)
            return
        op = inner


@register_pass
@dataclass(frozen=True)
class FuseRopeAppendPass(FunctionPass):
    """Cutting, normalising, rotating and storing of queries, keys and values in one op."""

    name: ClassVar[str] = "fuse-rope-append"

    def run(self, func: Op, ctx: PassContext) -> None:
        apply_greedily(func, [FuseRopeAppend()], ctx.rewriter())
