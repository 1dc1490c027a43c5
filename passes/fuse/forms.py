"""The normal forms of fused regions, by part: what kernel emitters are written against. See docs/passes/fuse.md.

`describe(op)` takes a `tensor.fused`, a bare `gemm.matmul`, `moe.grouped_gemm` or `attn.attention` and names its parts;
operands are named by their index in `op.operands`. It raises FormError for a region that no fusion pass makes.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ir.core import BlockArgument, Op, Value
from ir.ops.attention import AttentionOp, RopeOp
from ir.ops.fused import FusedOp, YieldOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.moe import CombineOp, GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.quant import QuantizeOp, RotateOp
from ir.ops.tensor import AddOp, CastOp, ClipOp, EmbedOp, MulOp, ReshapeOp, SiluOp, SliceOp, SwigluOp
from ir.traits import Elementwise, has_trait

T = TypeVar("T", bound=Op)
PRODUCTS = (MatmulOp, GroupedGemmOp)
EPILOGUE_OPS = (AddOp, MulOp, SiluOp, ClipOp, SwigluOp, CastOp)
ELEMENTWISE_HEADS = (RmsNormOp, EmbedOp, CombineOp)


class FormError(Exception):
    """A fused region that has none of the normal forms."""


@dataclass(frozen=True)
class GemmForm:
    """[norm] [rotate] [narrow] product, then the epilogue; `epilogue_operands[i]` is what `epilogue[i]` reads besides.

    `narrow` is the cast or the quantize that makes the activations what the product multiplies.
    """

    norm: RmsNormOp | None
    rotate: RotateOp | None
    narrow: CastOp | QuantizeOp | None
    product: MatmulOp | GroupedGemmOp
    epilogue: tuple[Op, ...]
    x: int
    weight: int
    gain: int | None
    order: int | None
    offsets: int | None
    epilogue_operands: tuple[int | None, ...]

    @property
    def cast(self) -> CastOp | None:
        """The cast in front of the product."""
        return self.narrow if isinstance(self.narrow, CastOp) else None

    @property
    def quantize(self) -> QuantizeOp | None:
        """The quantize in front of the product: its activations are low-bit numbers."""
        return self.narrow if isinstance(self.narrow, QuantizeOp) else None

    @property
    def prologue(self) -> tuple[Op, ...]:
        """What is done to the activations inside of the region, in order."""
        return tuple(op for op in (self.norm, self.rotate, self.narrow) if op is not None)

    @property
    def has_swiglu(self) -> bool:
        """Whether the weight is gate|up concatenated."""
        return any(isinstance(op, SwigluOp) for op in self.epilogue)


@dataclass(frozen=True)
class StreamForm:
    """q, k or v on its way out of the joint projection."""

    slice: SliceOp
    row_norm: RmsNormOp | None
    clip: ClipOp | None
    reshape: ReshapeOp
    head_norm: RmsNormOp | None
    rope: RopeOp | None

    def steps(self) -> tuple[Op | None, ...]:
        """One entry per step of the normal form, in order; None for a step that this stream lacks."""
        return self.slice, self.row_norm, self.clip, self.reshape, self.head_norm, self.rope

    def ops(self) -> tuple[Op, ...]:
        """The steps that are there."""
        return tuple(op for op in self.steps() if op is not None)


@dataclass(frozen=True)
class RopeAppendForm:
    """Operands are qkv, cos, sin, cache, positions, slots = 0 .. 5, then the gains when the streams have norms."""

    q: StreamForm
    k: StreamForm
    v: StreamForm
    append: KVAppendOp
    q_gain: int | None
    k_gain: int | None


@dataclass(frozen=True)
class AttentionForm:
    """Operands are q, cache, positions, slots = 0 .. 3."""

    attention: AttentionOp
    reshape: ReshapeOp | None
    cast: CastOp | None


@dataclass(frozen=True)
class ElementwiseForm:
    """An optional head, then elementwise ops; `results` are the values yielded, each made by one of `ops`."""

    head: RmsNormOp | EmbedOp | CombineOp | None
    ops: tuple[Op, ...]
    results: tuple[Value, ...]


Form = GemmForm | RopeAppendForm | AttentionForm | ElementwiseForm


def describe(op: Op) -> Form:
    """The parts of `op`. Raises FormError."""
    if isinstance(op, PRODUCTS):
        return _bare_gemm(op)
    if isinstance(op, AttentionOp):
        return AttentionForm(op, None, None)
    if not isinstance(op, FusedOp):
        raise FormError(f"{op.name} is no fused region")
    body = op.region.block.ops
    if not body or not isinstance(body[-1], YieldOp):
        raise FormError("the region does not end in tensor.yield")
    read = _READERS.get(op.kind)
    if read is None:
        raise FormError(f"there are no regions of kind {op.kind!r}")
    return read(body[:-1], body[-1])


def describe_gemm(op: Op) -> GemmForm:
    """`describe` for a product, bare or in a fused region of kind "gemm"."""
    form = describe(op)
    if not isinstance(form, GemmForm):
        raise FormError(f"{op.name} is no product")
    return form


def _require(condition: bool, what: str) -> None:
    if not condition:
        raise FormError(what)


def _next(rest: list[Op], *kinds: type[T]) -> T | None:
    """The first of `rest`, taken off when it is one of these ops; else None."""
    if not rest or not isinstance(rest[0], kinds):
        return None
    found = rest.pop(0)
    assert isinstance(found, kinds)
    return found


def _argument(value: Value) -> int:
    """The operand index that `value`, read in a body, stands for."""
    if not isinstance(value, BlockArgument):
        raise FormError("an operand is computed where an argument of the region was expected")
    return value.index


def _bare_gemm(product: MatmulOp | GroupedGemmOp) -> GemmForm:
    order, offsets = (2, 3) if isinstance(product, GroupedGemmOp) else (None, None)
    return GemmForm(None, None, None, product, (), 0, 1, None, order, offsets, ())


def _gemm(body: Sequence[Op], end: Op) -> GemmForm:
    rest = list(body)
    norm, rotate, narrow = _next(rest, RmsNormOp), _next(rest, RotateOp), _next(rest, CastOp, QuantizeOp)
    product = _next(rest, MatmulOp, GroupedGemmOp)
    if product is None:
        raise FormError("expected gemm.matmul or moe.grouped_gemm")
    chain = [op for op in (norm, rotate, narrow, product, *rest) if op is not None]
    for before, op in itertools.pairwise(chain):
        _require(op.operands[0] is before.results[0], f"{op.name} does not continue the chain")
    for op in rest:
        _require(isinstance(op, EPILOGUE_OPS), f"{op.name} is no epilogue op")
    _require(list(end.operands) == [chain[-1].results[0]], "the region does not yield the end of its chain")
    x = _argument(chain[0].operands[0])
    gain = _argument(norm.operands[1]) if norm is not None else None
    weight, *groups = [_argument(v) for v in product.operands[1:]]
    order, offsets = groups or (None, None)
    extra = tuple(_argument(op.operands[1]) if len(op.operands) == 2 else None for op in rest)
    return GemmForm(norm, rotate, narrow, product, tuple(rest), x, weight, gain, order, offsets, extra)


def _attention(body: Sequence[Op], end: Op) -> AttentionForm:
    rest = list(body)
    attention = _next(rest, AttentionOp)
    if attention is None:
        raise FormError("expected attn.attention first")
    reshape, cast = _next(rest, ReshapeOp), _next(rest, CastOp)
    _require(not rest and end.operands[0] is body[-1].results[0], "expected attention, reshape, cast and nothing else")
    return AttentionForm(attention, reshape, cast)


def _elementwise(body: Sequence[Op], end: Op) -> ElementwiseForm:
    head = body[0] if body and isinstance(body[0], ELEMENTWISE_HEADS) else None
    ops = body[1:] if head is not None else body
    for op in ops:
        _require(has_trait(op, Elementwise) or isinstance(op, SwigluOp), f"{op.name} is not elementwise")
    return ElementwiseForm(head, tuple(ops), tuple(end.operands))


def _rope_append(body: Sequence[Op], end: Op) -> RopeAppendForm:
    append = body[-1]
    if not isinstance(append, KVAppendOp) or len(end.operands) != 2:
        raise FormError("expected kv.append last and two results")
    q, k = read_stream(end.operands[0]), read_stream(append.k)
    v = read_stream(append.v)
    for name, stream, rotated in (("q", q, True), ("k", k, True), ("v", v, False)):
        _require((stream.rope is not None) == rotated, f"{name} is {'not ' * rotated}rotated")
    gains = [_gain_of(stream) for stream in (q, k)]
    return RopeAppendForm(q, k, v, append, gains[0], gains[1])


def _gain_of(stream: StreamForm) -> int | None:
    norm = stream.row_norm or stream.head_norm
    return None if norm is None else _argument(norm.operands[1])


def read_stream(value: Value) -> StreamForm:
    """The ops that make `value`, read backwards: rope, head norm, reshape, clip, row norm, slice. Raises FormError.

    A clip is met on either side of the reshape; in the normal form it stands in front of it.
    """

    def take(kind: type[T]) -> T | None:
        nonlocal value
        op = value.defining_op()
        if not isinstance(op, kind):
            return None
        value = op.operands[0]
        return op

    rope, head_norm = take(RopeOp), take(RmsNormOp)
    clip, reshape = take(ClipOp), take(ReshapeOp)
    clip, row_norm = clip or take(ClipOp), take(RmsNormOp)
    cut = take(SliceOp)
    made_by = value.defining_op()
    if reshape is None or cut is None:
        met = made_by.name if made_by is not None and cut is None else "an input"
        raise FormError(f"expected a slice of the joint projection, reshaped to heads; found {met}")
    return StreamForm(cut, row_norm, clip, reshape, head_norm, rope)


_READERS = {"gemm": _gemm, "rope_append": _rope_append, "attention": _attention, "elementwise": _elementwise}
