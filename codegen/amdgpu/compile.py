"""Kernels -> an object for gfx942 (MI300), through the same child processes as code for CPUs. Nothing has run it."""

from __future__ import annotations

from collections.abc import Sequence

from codegen.amdgpu.lowering import lower_amd_kernel
from codegen.compile_worker import CompileRequest, compile_many
from codegen.nvptx.builder import GridKernel
from codegen.object_cache import ObjectCache

TRIPLE = "amdgcn-amd-amdhsa"
ARCHITECTURE = "gfx942"
FEATURES = "+mai-insts"  # has matrix products, as the table of intrinsics asks


def amd_module(kernels: Sequence[GridKernel]) -> str:
    """The LLVM IR of kernels in one module. Raises DiagnosticError for those that these GPUs cannot do."""
    declarations: dict[str, str] = {}
    bodies = [lower_amd_kernel(kernel, declarations) for kernel in kernels]
    return "\n".join([*declarations.values(), "", *bodies])


def compile_amd(kernels: Sequence[GridKernel], cache: ObjectCache | None = None) -> bytes:
    """An ELF object with the kernels, to be linked by lld. Raises DiagnosticError as `amd_module` does."""
    request = CompileRequest(amd_module(kernels), TRIPLE, ARCHITECTURE, FEATURES, name=f"grid {ARCHITECTURE}")
    return compile_many([request], cache=cache)[0]
