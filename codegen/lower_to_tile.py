"""lower-to-tile: the graph-level step becomes programs at plan level and kernels at tile level.

    func @step(...) { %y = gemm.matmul %x, %w ... }
        -->  func @decode() { plan.launch %x, %w, %y, ... {kernel = @gemm_...} ... }
             func @prefill() { ... }
             func @gemm_...(%x: buffer<bf16>, %w: buffer<bf16>, ...) { tile.for ... }

`target` is a target's name as `compile-model targets list` shows them. Refuses, with a diagnostic, ops that have no
kernel: attention that is still a chain of scores, softmax and combine (run fuse-attention), rope and the KV append on
their own (run fuse-rope-append), weights without a layout (run choose-layouts).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from codegen.compile_step import lower_step
from hw_targets import load
from ir.core import Op
from ir.ops.builtin import ModuleOp
from ir.rewriter import PatternRewriter
from passes.pass_base import Pass, PassContext, register_pass


@register_pass
@dataclass(frozen=True)
class LowerToTilePass(Pass):
    """Replaces @step by programs and kernels."""

    name: ClassVar[str] = "lower-to-tile"
    target: str = "host"

    def run(self, module: Op, ctx: PassContext, /) -> None:
        assert isinstance(module, ModuleOp)
        step = module.function("step")
        lowered = lower_step(step, load(self.target).llvm_features)
        rewriter: PatternRewriter = ctx.rewriter()
        rewriter.erase(step)
        for func in (*(p.func for p in lowered.programs), *lowered.kernels):
            module.append(func)
            rewriter.changed = True
