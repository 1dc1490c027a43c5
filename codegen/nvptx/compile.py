"""Kernels -> PTX text for one architecture, through the same child processes as code for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from codegen.compile_worker import CompileRequest, compile_many
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.lowering import HOPPER, for_hopper, lower_grid_kernel
from codegen.object_cache import ObjectCache
from ir.diagnostics import DiagnosticError

TRIPLE = "nvptx64-nvidia-cuda"
PTX_VERSION = "+ptx78"  # drivers from CUDA 11.8 on read it; knows sm_80, sm_89 and sm_90
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")  # A100; RTX 4090, L4; H100, H200
HOPPER_PTX_VERSION = "+ptx80,+ptx78"  # `HOPPER` is known from CUDA 12.0 on


def llvm_module(kernels: Sequence[GridKernel]) -> str:
    """The LLVM IR of kernels in one module."""
    names = [k.name for k in kernels]
    assert len(set(names)) == len(names), f"two kernels of one name among {', '.join(names)}"
    declarations: dict[str, str] = {}
    bodies = [lower_grid_kernel(kernel, declarations) for kernel in kernels]
    return "\n".join([*declarations.values(), "", *bodies])


def compile_ptx(kernels: Sequence[GridKernel], architecture: str, cache: ObjectCache | None = None) -> str:
    """PTX of kernels. Raises DiagnosticError for an architecture that is not known and for what LLVM refuses."""
    return compile_ptx_for(kernels, [architecture], cache)[architecture]


def compile_ptx_for(
    kernels: Sequence[GridKernel], architectures: Sequence[str] = ARCHITECTURES, cache: ObjectCache | None = None
) -> dict[str, str]:
    """Architecture -> PTX of the same kernels. Raises DiagnosticError for kernels that an architecture cannot run."""
    known = (*ARCHITECTURES, HOPPER)
    for name in architectures:
        if name not in known:
            raise DiagnosticError(f"no kernels for the GPU architecture {name!r}", expected=", ".join(known))
        refused = [k.name for k in kernels if name != HOPPER and for_hopper(k)]
        if refused:
            message = f"@{refused[0]} has instructions that {name} lacks"
            raise DiagnosticError(message, expected=HOPPER, hint="take the product of warps there")
    text = llvm_module(kernels)
    requests = [
        CompileRequest(text, TRIPLE, name, version, name=f"grid {name}", emit="assembly")
        for name in architectures
        for version in (HOPPER_PTX_VERSION if name == HOPPER else PTX_VERSION,)
    ]
    return dict(zip(architectures, (made.decode() for made in compile_many(requests, cache=cache)), strict=True))
