"""Which weights share one element type, because one product multiplies by all of them.

    func, products = joined_products(imported.module, roles)      # the module is not changed
    for op, group in products:                                     # ops of func
        group.name, group.role, group.tensors, group.shape

Takes a module as a frontend makes it and the role of every tensor by name. Runs the fusions that join products on a
copy (attention stays as it is imported, so that `passes.quantize.forward` runs it), and gives one group for every
product that is left: q|k|v, gate|up, all experts of a layer. Products that feed a router are no group: they keep their
precision (see `passes.quantize.set_precision`). Products by something that is no constant are left out too. Refuses
checkpoints whose weights are low-bit numbers already.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from ir.diagnostics import DiagnosticError
from ir.ops.builtin import FuncOp, ModuleOp
from ir.ops.gemm import MatmulOp
from ir.ops.moe import GroupedGemmOp
from ir.ops.quant import AssembleOp
from passes.analysis.constants import is_constant_expression
from passes.analysis.value_types import tensor_type
from passes.clone import clone
from passes.fuse.fuse_gate_up import FuseGateUpPass
from passes.fuse.fuse_qkv import FuseQKVPass
from passes.pass_manager import PassManager
from passes.pipelines import simplify
from passes.quantize.roles import weight_parts
from passes.quantize.set_precision import feeds_router

ProductOp = MatmulOp | GroupedGemmOp


@dataclass(frozen=True)
class WeightGroup:
    """The weights [..., n, k] of one joint product; `tensors` are their names in the checkpoint, in order.

    `role` is the part of the model: attention, mlp, experts, head. `parts` are the finer roles of the members
    (`attention.q`, ...), each once. Of a single expert, number `expert`, `of` is the group of the whole stack.
    """

    name: str
    role: str
    parts: tuple[str, ...]
    tensors: tuple[str, ...]
    shape: tuple[int, ...]
    of: WeightGroup | None = None
    expert: int = 0

    @property
    def count(self) -> int:
        """How many weights there are."""
        return math.prod(self.shape)

    @property
    def layer(self) -> int | None:
        """The layer by the names of the tensors; None for the head."""
        words = self.tensors[0].split(".")
        numbers = [w for before, w in itertools.pairwise(words) if before == "layers" and w.isdecimal()]
        return int(numbers[0]) if numbers else None


def expert_name(stack: str, expert: int) -> str:
    """The name of the group of one expert of a stack."""
    return f"{stack}[{expert}]"


def joined_products(module: ModuleOp, roles: Mapping[str, str]) -> tuple[FuncOp, list[tuple[ProductOp, WeightGroup]]]:
    """(a copy of @step with joined products, its products with their groups in the order in which a step uses them)."""
    copy = clone(module)
    assert isinstance(copy, ModuleOp)
    PassManager((*simplify(), FuseQKVPass(), FuseGateUpPass())).run(copy)
    func = copy.function("step")
    found: list[tuple[ProductOp, WeightGroup]] = []
    for op in func.walk():
        if isinstance(op, AssembleOp):
            raise DiagnosticError(
                "the weights of this checkpoint are low-bit numbers already",
                where=str(op.location.origin),
                expected="a checkpoint of floats, whose formats can be chosen",
                hint="build it without --bits-per-weight and --size: its own formats are kept",
            )
        if isinstance(op, (MatmulOp, GroupedGemmOp)) and is_constant_expression(op.w) and not feeds_router(op):
            named = dict(weight_parts(op, roles))
            tensors, parts = tuple(named), tuple(dict.fromkeys(named.values()))
            shape = tuple(int(d) for d in tensor_type(op.w).shape if isinstance(d, int))
            found.append((op, WeightGroup(_joint_name(tensors), parts[0].partition(".")[0], parts, tensors, shape)))
    return func, found


def _joint_name(tensors: tuple[str, ...]) -> str:
    """`model.layers.0.self_attn.q_proj+k_proj+v_proj`: the words in which the names differ, joined; numbers as `*`."""
    split = [t.removesuffix(".weight").split(".") for t in tensors]
    if len({len(s) for s in split}) > 1:
        return "+".join(tensors)
    words = []
    for column in zip(*split, strict=True):
        different = tuple(dict.fromkeys(column))
        joined = "*" if len(different) > 1 and all(w.isdecimal() for w in different) else "+".join(different)
        words.append(joined)
    return ".".join(words)
