"""Graph level -> plan level and tile level: every op becomes a launch of a kernel, every value a buffer.

    program = lower_program(Lowering(step), spec, file)        # `decode`, `prefill`: other row limits and kernel shapes

`codegen.program_builder` gives everything its place.
"""

from __future__ import annotations

from dataclasses import replace

import codegen.kernels.fused
import codegen.kernels.moe  # noqa: F401 - both register emitters
from codegen.kernels.call import EMITTERS, Temporary
from codegen.kernels.kv_layout import MAX_STEP_TOKENS
from codegen.lowering import Lowering
from codegen.program_builder import Call, ProgramBuilder
from codegen.programs import Program, ProgramSpec, WeightsFile
from ir.core import Op
from ir.diagnostics import Diagnostic, DiagnosticError
from ir.spelling import did_you_mean


def lower_program(lowering: Lowering, spec: ProgramSpec, file: WeightsFile) -> Program:
    """Lowers the step. `file` is what `lowering.weights_file` gave."""
    ring = lowering.kv is not None and bool(lowering.kv.recent)
    assert not ring or spec.max_tokens <= MAX_STEP_TOKENS, "the ring is too short"
    strides = {value: bundle.stride for bundle in file.bundles for value in bundle.weights}
    return _CpuProgram(lowering, replace(spec, context=replace(spec.context, strides=strides)), file).build()


class _CpuProgram(ProgramBuilder):
    """A program whose kernels are run by a team of threads."""

    def __init__(self, lowering: Lowering, spec: ProgramSpec, file: WeightsFile) -> None:
        super().__init__(lowering, spec.name, spec.max_tokens, file)
        self.context = spec.context

    def _launch_op(self, op: Op) -> None:
        """Adds the launches of an op."""
        emit = EMITTERS.get(type(op))
        if emit is None:
            names = sorted(c.name for c in EMITTERS)
            hint = "attention is lowered after fuse-attention, rope and the cache after fuse-rope-append"
            message = f"no kernel for '{op.name}'{did_you_mean(op.name, names)}; {hint}"
            raise DiagnosticError.of(Diagnostic("error", message, op.location))
        spec = emit(op, self.context)
        kernel = self.lowering.kernel(spec)
        buffers = [(len(self.calls), i) if isinstance(a, Temporary) else a for i, a in enumerate(spec.arguments)]
        self.calls.append(Call(op, spec, kernel.sym_name, buffers))
