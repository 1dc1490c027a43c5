"""What the programs of one model share while the step function is lowered: kernels, weights, layers, the KV cache.

The same graph becomes several programs (`codegen.lower_to_plan`, `codegen.nvptx.lower_to_grid`). Weights are the roots
of constant expressions, in the order in which the step reads them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from codegen.kernels.call import KernelSpec
from codegen.kernels.kv_layout import KVLayout
from codegen.programs import WeightsFile
from codegen.weight_pieces import ExpertBundle, expert_bundles, in_file_order, plan_pieces
from codegen.weights import plan_weights
from ir.core import Op, Value
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.ops.builtin import FuncOp
from ir.ops.kv_cache import KVStateOp
from ir.ops.tile_control import TicketOp
from ir.types import KVCacheType
from passes.analysis.constants import is_constant_expression


@dataclass
class Lowering:
    """Shared between the programs of one model: kernels by what they compute, weights in the order they are read."""

    step: FuncOp
    kernels: dict[Any, FuncOp] = field(default_factory=dict)
    weights: dict[Value, str] = field(default_factory=dict)
    layers: dict[str, int] = field(default_factory=dict)
    names: dict[str, int] = field(default_factory=dict)
    with_tickets: dict[str, None] = field(default_factory=dict)  # kernels that take tickets
    kv: Any = None  # KVLayout, or what `kv_layout` of a subclass gives
    bundles: tuple[ExpertBundle, ...] = ()

    def __post_init__(self) -> None:
        """Finds weights and layers once, in the order of the step."""
        for op in self.step.block.ops:
            if isinstance(op, KVStateOp):
                self.layers.setdefault(op.symbol.name, len(self.layers))
                assert isinstance(op.cache.type, KVCacheType)
                layout = self.kv_layout(op.cache.type, op)
                if self.kv not in (None, layout):
                    raise DiagnosticError.of(
                        Diagnostic("error", "layers with different KV shapes are not supported", op.location)
                    )
                self.kv = layout
            if op.results and is_constant_expression(op.results[0]):
                continue
            for value in op.operands:
                if value not in self.weights and is_constant_expression(value):
                    self.weights[value] = self._unique(_weight_name(value, op))
        self.bundles = expert_bundles(self.step, self.weights)

    def kv_layout(self, cache: KVCacheType, op: Op) -> Any:
        """Where the keys and values of a layer lie."""
        return KVLayout.of(cache)

    def weights_file(self) -> WeightsFile:
        """Plans the file. Raises DiagnosticError for weights that cannot be stored."""
        roots = in_file_order([(name, value) for value, name in self.weights.items()], self.bundles)
        tensors, nbytes = plan_weights(roots, [bundle.weights for bundle in self.bundles])
        pieces, piece_of = plan_pieces(roots, tensors, self.bundles)
        return WeightsFile(roots, self.bundles, tuple(tensors), nbytes, pieces, piece_of)

    def _unique(self, name: str) -> str:
        count = self.names[name] = self.names.get(name, 0) + 1
        return name if count == 1 else f"{name}.{count}"

    def kernel(self, spec: KernelSpec) -> FuncOp:
        """The kernel of a spec, built when it is new."""
        func = self.kernels.get(spec.key)
        if func is None:
            func = self.kernels[spec.key] = spec.build(self._unique(spec.stem))
            if any(isinstance(op, TicketOp) for op in func.walk()):
                self.with_tickets[func.sym_name] = None
        return func


def _weight_name(value: Value, user: Op) -> str:
    op = value.defining_op()
    assert op is not None
    return op.location.origin or user.location.origin or "weight"
