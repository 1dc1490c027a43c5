"""quantize: the formats that a recipe gives to weights, to activations in front of products, and to the KV cache.

    %y = gemm.matmul %x, %w   -->   %q = quant.quantize %x {format = q8_sym<group=32, scale=f32>}
                                    %v = quant.quantize %w {format = q4_sym<...>, rounding = "mse"}     (constant)
                                    %y = gemm.matmul %q, %v

Takes the place of set-precision, behind the fusions that join products: members of one product share a format, the
most precise one that the recipe asks for among them. What a recipe leaves open are `floats`, or what the checkpoint
stores: of a weight `dequantize(w)` the product takes w itself, bit by bit. Every product gets a quantize of its own,
which fuse-norm-gemm moves into it; casts are shared. A format whose groups do not fill the rows of a weight gives way
to one with smaller groups, at last to floats, with a remark. Products inside of regions are refused. Experts of which
the recipe says different things become stacks and products of their own (`split_experts`). Stand-ins (`add-stand-ins`)
get their formats by a recipe of their own.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from ir.core import Op, Value
from ir.formats import BF16, F16, F32, PLAIN_FORMATS, FP8Format, NumberFormat, PlainFormat
from ir.op_def import Op as DeclaredOp
from ir.ops.fused import FusedOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVStateOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.norm import RmsNormOp
from ir.ops.quant import DequantizeOp, QuantizeOp, RotateOp
from ir.ops.quant_columns import ClearColumnsOp, OutlierColumnsOp, SelectColumnsOp
from ir.ops.tensor import AddOp, CastOp, ConcatOp, EmbedOp, ReshapeOp, SliceOp
from ir.parse_value import parse_format
from ir.rewriter import PatternRewriter
from ir.types import KVCacheType
from passes.analysis.constants import is_constant_expression
from passes.analysis.exactness import is_exact
from passes.analysis.value_types import tensor_type
from passes.pass_base import FunctionPass, PassContext, register_pass
from passes.quantize.recipe import FLOAT, STORED, Choice, Recipe, load_recipe
from passes.quantize.recipe_formats import cache_type, can_meet, has_integer_levels
from passes.quantize.roles import expert_parts, weight_parts
from passes.quantize.set_precision import FloatName, set_cache, set_embedding
from passes.quantize.split_experts import split_experts

INT8 = parse_format("q8_sym<group=128, scale=f32>")  # activations in front of integers, unless a recipe says otherwise
SMALLER_GROUPS = (128, 64, 32)
_MOVES = (ConcatOp, ReshapeOp, SliceOp)


@dataclass(frozen=True)
class Storage:
    """How a product's operands are stored. `stored` is the weight where it stays as the checkpoint has it."""

    weights: NumberFormat
    activations: PlainFormat | NumberFormat
    stored: Value | None = None
    rounding: str = "mse"
    rotate: int = 0
    outliers: int = 0


@register_pass
@dataclass(frozen=True)
class QuantizePass(FunctionPass):
    """Formats by a recipe: names of shipped recipes or paths of files, later ones deciding where several speak.

    `stand_ins` names what decides those of stand-ins.
    """

    name: ClassVar[str] = "quantize"
    recipe: tuple[str, ...] = ("as-stored",)
    floats: FloatName = "bf16"
    stand_ins: tuple[str, ...] = ()

    def run(self, func: Op, ctx: PassContext) -> None:
        rewriter = ctx.rewriter()
        rewriter.pattern = self.name
        recipe = load_recipe(self.recipe)
        others = load_recipe(self.stand_ins) if self.stand_ins else recipe
        _Quantizer(recipe, others, PLAIN_FORMATS[self.floats], ctx, rewriter).function(func)


class _Quantizer:
    def __init__(
        self, recipe: Recipe, stand_ins: Recipe, floats: PlainFormat, ctx: PassContext, rewriter: PatternRewriter
    ) -> None:
        self.recipe, self.stand_ins, self.floats, self.ctx, self.rewriter = recipe, stand_ins, floats, ctx, rewriter
        self.roles: dict[str, str] = ctx.options.get("roles", {})
        self.made: dict[Hashable, Value] = {}
        self.numbers: dict[Op, tuple[int, ...]] = {}  # of products by some of a layer's experts: which they are
        self.parts: dict[Op, dict[int, list[tuple[str, str]]]] = {}  # names and roles by the number of the expert

    def function(self, func: Op) -> None:
        if any(rule.match or rule.experts for rule in self.recipe.rules):
            self.numbers = split_experts(func, self._said, self.rewriter)
        kept = self.recipe.kv or str(self.floats)
        for op in list(func.walk()):
            if isinstance(op, (MatmulOp, GroupedGemmOp)):
                self.product(op)
            elif isinstance(op, EmbedOp):
                asked = self.recipe.choice("", "embedding").format
                set_embedding(op, asked if isinstance(asked, PlainFormat) else self.floats, self.rewriter)
            elif isinstance(op, KVStateOp) and isinstance(op.cache.type, KVCacheType):
                old = op.cache.type
                set_cache(op.cache, cache_type(kept, old.num_kv_heads, old.head_dim), self.rewriter)

    # -- choosing ----------------------------------------------------------------------------------------------------

    def product(self, op: MatmulOp | GroupedGemmOp) -> None:
        if isinstance(op.parent_op, FusedOp):
            self.rewriter.no_match(op, "it is inside of a fused region: quantize before fusing")
            return
        if not is_constant_expression(op.w):
            self.rewriter.no_match(op, "the weight is computed from step inputs")
            return
        found = [self._storage(op, choice, role) for choice, role in self._choices(op)]
        widest = max(found, key=lambda s: _bits(s.weights, op))
        activations = max((s.activations for s in found), key=_precision)
        if isinstance(widest.weights, PlainFormat):
            activations = widest.weights  # products of floats multiply floats of one kind
        elif not can_meet(activations, widest.weights):
            activations = self.floats
        storage = replace(widest, activations=activations)
        if len({s.weights for s in found}) > 1:
            self.ctx.remark(op, f"its parts share one format, the most precise: {storage.weights}")
        self._store(op, storage)

    def _choices(self, op: MatmulOp | GroupedGemmOp) -> list[tuple[Choice, str]]:
        """What the recipe says of the weights of a product, each once, with their roles."""
        recipe = self.stand_ins if isinstance(op, GroupedGemmOp) and op.stand_ins else self.recipe
        if isinstance(op, GroupedGemmOp) and any(rule.experts for rule in recipe.rules):
            numbers = self.numbers.get(op, tuple(range(_experts(op))))
            return list(dict.fromkeys(said for e in numbers for said in self._of_expert(op, numbers, e, recipe)))
        parts = weight_parts(op, self.roles)
        return list(dict.fromkeys((recipe.choice(name, role), role) for name, role in parts))

    def _said(self, op: GroupedGemmOp, expert: int) -> tuple[tuple[Choice, str], ...]:
        """What the recipe says of one expert of a product of them all."""
        return self._of_expert(op, tuple(range(_experts(op))), expert, self.recipe)

    def _of_expert(
        self, op: GroupedGemmOp, numbers: tuple[int, ...], expert: int, recipe: Recipe
    ) -> tuple[tuple[Choice, str], ...]:
        if op not in self.parts:
            self.parts[op] = dict(zip(numbers, expert_parts(op, self.roles, numbers), strict=True))
        return tuple((recipe.choice(name, role, expert), role) for name, role in self.parts[op][expert])

    def _storage(self, op: MatmulOp | GroupedGemmOp, choice: Choice, role: str) -> Storage:
        """What a choice comes to for this product."""
        k = tensor_type(op.w).shape[-1]
        assert isinstance(k, int)  # weights are constants
        floats = F32 if role == "router" else self.floats
        stored = _stored(op.w)
        stored_format = tensor_type(stored).element if stored is not None else None
        asked = choice.format if choice.format is not None else (FLOAT if role == "router" else STORED)
        if asked == STORED:
            asked = stored_format or FLOAT
        weights = floats if isinstance(asked, str) else asked
        as_stored = weights == stored_format
        if stored is not None and not as_stored and not isinstance(weights, PlainFormat):
            self.ctx.remark(op, f"stored as {stored_format}, quantized again to {weights}")
        if not isinstance(weights, PlainFormat) and not as_stored:
            weights = self._fitting(op, weights, k, floats)
        activations = choice.activations
        if activations is None and not isinstance(weights, PlainFormat):
            group = getattr(weights, "group", 1)
            activations = INT8 if has_integer_levels(weights) and (group == 0 or group >= 32) else FLOAT
        chosen = floats if activations is None or isinstance(activations, str) else activations
        if isinstance(weights, PlainFormat):
            chosen = weights
        elif not isinstance(chosen, PlainFormat):
            chosen = self._fitting_rows(op, chosen, k)
        float_weights = isinstance(weights, PlainFormat)
        return Storage(
            weights,
            chosen,
            stored if as_stored else None,
            choice.rounding or "mse",
            0 if as_stored or float_weights or choice.outliers else self._block(op, choice.rotate or 0, k),
            0 if as_stored or float_weights else min(choice.outliers or 0, k),
        )

    def _fitting_rows(self, op: Op, format: NumberFormat, k: int) -> NumberFormat:
        """A format of activations, int8 or f8e4m3, with scales of fewer columns, or of rows, where those do not fill
        rows of k."""
        if not isinstance(format, FP8Format):
            return self._fitting(op, format, k, replace(format, group=0))
        whole = not format.block_cols or k % format.block_cols == 0
        return format if whole else replace(format, block_cols=0)

    def _fitting(self, op: Op, format: NumberFormat, k: int, last: NumberFormat) -> NumberFormat:
        """`format`, with smaller groups where its own do not fill rows of k elements; `last` when none do."""
        group = getattr(format, "group", 0)
        candidates = [format, *(replace(format, group=g) for g in SMALLER_GROUPS if g < group)]
        for candidate in candidates:
            if k % (getattr(candidate, "group", 0) or getattr(candidate, "dim", 1)) == 0:
                if candidate != format:
                    self.ctx.remark(op, f"rows of {k} are not whole groups of {format}: {candidate} instead")
                return candidate
        self.ctx.remark(op, f"rows of {k} are not whole groups of {format}: {last} instead")
        return last

    def _block(self, op: Op, block: int, k: int) -> int:
        """The rotation's block, or the largest power of two below it that divides k; 0 when there is none."""
        fitting = block
        while fitting > 1 and k % fitting:
            fitting //= 2
        if fitting != block:
            self.ctx.remark(op, f"rows of {k} are rotated in blocks of {fitting}, not {block}")
        return fitting if fitting > 1 else 0

    # -- rewriting ---------------------------------------------------------------------------------------------------

    def _store(self, op: MatmulOp | GroupedGemmOp, storage: Storage) -> None:
        if isinstance(storage.weights, PlainFormat):
            weight = self._cast(op, op.w, storage.weights)
        elif storage.stored is not None:
            weight = storage.stored
        elif storage.outliers:
            self._split(op, storage)
            return
        else:
            weight = self._quantized(op, self._unwidened(op, op.w), storage)
        self.rewriter.set_operand(op, 0, self._narrow(op, op.x, storage))
        self.rewriter.set_operand(op, 1, weight)

    def _split(self, op: MatmulOp | GroupedGemmOp, storage: Storage) -> None:
        """x w^T --> (x cleared) q(w cleared)^T + (columns of x) (columns of w)^T, the latter product in floats"""
        weight = self._unwidened(op, op.w)
        groups = op.operands[2:]
        columns = self._made(op, OutlierColumnsOp, weight, count=storage.outliers)
        few = self._cast(op, self._made(op, SelectColumnsOp, weight, columns), self.floats)
        x_few = self._cast(op, self._made(op, SelectColumnsOp, op.x, columns), self.floats)
        small = type(op)(x_few, few, *groups, location=op.location, **op.attributes)
        rest = self._quantized(op, self._made(op, ClearColumnsOp, weight, columns), storage)
        x = op.x if isinstance(storage.activations, PlainFormat) else self._without(op, columns)
        x_rest = self._narrow(op, x, storage)
        main = type(op)(x_rest, rest, *groups, location=op.location, **op.attributes)
        for product in (small, main):
            self.rewriter.insert_before(op, product)
        self.rewriter.replace(op, AddOp(main.y, small.y, location=op.location))

    def _without(self, op: MatmulOp | GroupedGemmOp, columns: Value) -> Value:
        """The activations with zeros in `columns`, which then do not stretch int8 scales; by the gain of a norm."""
        norm = op.x.defining_op()
        if isinstance(norm, RmsNormOp) and isinstance(op, MatmulOp) and is_constant_expression(norm.gain):
            gain = self._made(op, ClearColumnsOp, norm.gain, columns)
            return self.rewriter.insert_before(op, RmsNormOp(norm.x, gain, eps=norm.eps)).results[0]
        return self._made(op, ClearColumnsOp, op.x, columns)

    def _narrow(self, op: MatmulOp | GroupedGemmOp, x: Value, storage: Storage) -> Value:
        """`x` as the product multiplies it. A rotation and a quantize belong to one product alone."""
        if storage.rotate:
            x = self.rewriter.insert_before(op, RotateOp(x, block=storage.rotate, location=op.location)).results[0]
        if isinstance(storage.activations, PlainFormat):
            return self._cast(op, x, storage.activations)
        made = QuantizeOp(x, format=storage.activations, location=op.location)
        return self.rewriter.insert_before(op, made).results[0]

    def _quantized(self, op: Op, weight: Value, storage: Storage) -> Value:
        if storage.rotate:
            weight = self._made(op, RotateOp, weight, block=storage.rotate)
        return self._made(op, QuantizeOp, weight, format=storage.weights, rounding=storage.rounding)

    def _made(self, op: Op, kind: type[DeclaredOp], *operands: Value, **attributes: Any) -> Value:
        """The result of such an op, in front of `op`; one op for all its readers."""
        key = (kind, operands, tuple(attributes.items()))
        if not self._is_there(key, op):
            maker = operands[0].defining_op()
            location = maker.location if maker is not None else op.location
            made = kind(*operands, location=location, **attributes)
            self.made[key] = self.rewriter.insert_before(op, made).results[0]
        return self.made[key]

    def _cast(self, op: Op, value: Value, to: PlainFormat) -> Value:
        """`value` in the format `to`, in front of `op`; one cast for all its readers."""
        return value if tensor_type(value).element == to else self._made(op, CastOp, value, to=to)

    def _is_there(self, key: Hashable, op: Op) -> bool:
        """Whether what `key` stands for was made in front of `op`."""
        return key in self.made and self.made[key].owner.parent is op.parent

    def _unwidened(self, op: Op, value: Value) -> Value:
        """A constant with the numbers of `value` in fewer bytes: without the casts that only widen what is stored."""
        maker = value.defining_op()
        if isinstance(maker, CastOp) and is_exact(tensor_type(maker.x).element, maker.to):
            return self._unwidened(op, maker.x)
        if not isinstance(maker, _MOVES):
            return value
        inner = [self._unwidened(op, v) for v in maker.operands]
        if inner == list(maker.operands) or len({tensor_type(v).element for v in inner}) > 1:
            return value
        moved = type(maker)(*inner, location=maker.location, **maker.attributes)
        return self.rewriter.insert_before(op, moved).results[0]


def _stored(value: Value) -> Value | None:
    """The low-bit tensor of the checkpoint whose numbers `value` holds; None when it holds others."""
    maker = value.defining_op()
    if isinstance(maker, DequantizeOp) and maker.to == F32:
        return maker.w
    return _stored(maker.x) if isinstance(maker, CastOp) and is_exact(maker.x.type.element, maker.to) else None


def _bits(format: NumberFormat, op: MatmulOp | GroupedGemmOp) -> float:
    """Bits of a weight in this format, scales included."""
    shape = tuple(d for d in tensor_type(op.w).shape if isinstance(d, int))
    elements = 1
    for d in shape:
        elements *= d
    return format.nbytes(shape) * 8 / elements


def _experts(op: GroupedGemmOp) -> int:
    """How many experts a product has."""
    count = tensor_type(op.w).shape[0]
    assert isinstance(count, int)  # weights are constants
    return count


def _precision(format: NumberFormat) -> int:
    """Activation formats by how little they lose."""
    return 2 if format == F32 else int(format in (F16, BF16))  # others have 8 bits
