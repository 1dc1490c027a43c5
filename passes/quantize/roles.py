"""What a product's weights are for: the names and roles that recipes choose by.

    weight_parts(op, roles)     # [("model.layers.0.self_attn.q_proj.weight", "attention.q"), ...]

Takes a product of the graph before its regions are fused, and the roles that the frontend gave to tensors (maybe none:
then the role is read off the graph, and its finer part off the name). A table that a product multiplies by is the head.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from ir.core import Op, Value
from ir.ops.attention import AttentionOp
from ir.ops.attention import CombineOp as AttentionCombineOp
from ir.ops.builtin import ReturnOp
from ir.ops.gemm import MatmulOp
from ir.ops.kv_cache import KVAppendOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.tensor_constant import ConstantStackOp
from ir.traits import Elementwise, has_trait
from passes.analysis.constants import constant_leaves
from passes.quantize.set_precision import feeds_router

_PART = re.compile(r"(?:^|[._])(q|k|v|o|gate|up|down)(?:_proj)?(?:$|[._])")
_MOVES = ("tensor.reshape", "tensor.slice", "norm.rms", "attn.rope", "quant.rotate", "quant.quantize")
_VIRTUAL = re.compile(r"\.(codes|scales|zeros|channel|table)$")  # a part of a quantized tensor


def weight_parts(op: MatmulOp | GroupedGemmOp, roles: Mapping[str, str]) -> list[tuple[str, str]]:
    """(tensor name, role) of all weights that a product multiplies by, each name once."""
    coarse = graph_role(op)
    found: dict[str, str] = {}
    for leaf in constant_leaves(op.w):
        names = leaf.symbols() if isinstance(leaf, ConstantStackOp) else (leaf.attributes["symbol"].name,)
        for name in (_VIRTUAL.sub("", n) for n in names):
            found.setdefault(name, _role_of(name, coarse, roles))
    return list(found.items())


def expert_parts(op: GroupedGemmOp, roles: Mapping[str, str], numbers: Sequence[int]) -> list[list[tuple[str, str]]]:
    """(tensor name, role) of the weights of each expert of a product; `numbers`: which of the layer's they are."""
    found: list[dict[str, str]] = [{} for _ in numbers]
    for leaf in constant_leaves(op.w):
        one = [leaf.attributes["symbol"].name] * len(numbers)
        names = leaf.symbols() if isinstance(leaf, ConstantStackOp) and leaf.count == len(numbers) else one
        for parts, name in zip(found, (_VIRTUAL.sub("", n) for n in names), strict=True):
            parts.setdefault(name, _role_of(name, "experts", roles))
    return [list(parts.items()) for parts in found]


def _role_of(name: str, coarse: str, roles: Mapping[str, str]) -> str:
    """The role that the frontend gave to a tensor, in the words of recipes; else by graph and name."""
    first, _, part = (roles.get(name) or roles.get(f"{name}.weight", "")).partition(".")
    if coarse == "router" or (first, part) == ("moe", "router"):
        return "router"
    if first == "moe":
        return f"experts.{part}"
    if first:
        return "head" if first == "embedding" else f"{first}.{part}" if part else first
    part = next(reversed(_PART.findall(name)), "")
    return f"{coarse}.{part}" if part and coarse in ("attention", "mlp", "experts") else coarse


def graph_role(op: MatmulOp | GroupedGemmOp) -> str:
    """router, experts, head, attention or mlp, by what the product reads and who reads it."""
    if isinstance(op, GroupedGemmOp):
        return "experts"
    if feeds_router(op):
        return "router"
    readers = _readers_of_rows(op.y)
    if any(isinstance(r, KVAppendOp) for r in readers) or _made_by_attention(op.x):
        return "attention"
    return "head" if any(isinstance(r, ReturnOp) for r in op.y.users) else "mlp"


def _readers_of_rows(value: Value) -> list[Op]:
    """The ops that read `value`, or what is made of it row by row."""
    found: dict[Op, None] = {}
    worklist = [value]
    while worklist:
        for user in worklist.pop().users:
            if user not in found:
                found[user] = None
                if user.name in _MOVES or has_trait(user, Elementwise):
                    worklist.extend(user.results)
    return list(found)


def _made_by_attention(value: Value) -> bool:
    op = value.defining_op()
    while op is not None and (op.name in _MOVES or op.name == "tensor.cast"):
        op = op.operands[0].defining_op()
    return isinstance(op, (AttentionOp, AttentionCombineOp))
