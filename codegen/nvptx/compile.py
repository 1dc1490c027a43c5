"""Kernels -> PTX text for one architecture, through the same child processes as code for CPUs."""

from __future__ import annotations

from collections.abc import Sequence

from codegen.compile_worker import CompileRequest, compile_many
from codegen.nvptx.builder import GridKernel
from codegen.nvptx.lower_kernel import lower_grid_kernel
from codegen.nvptx.lowering import HOPPER, for_hopper, multiplies_fp8
from codegen.object_cache import ObjectCache
from ir.diagnostics import DiagnosticError

TRIPLE = "nvptx64-nvidia-cuda"
PTX_VERSION = "+ptx78"  # drivers from CUDA 11.8 on read it; knows sm_80, sm_89 and sm_90
ARCHITECTURES = ("sm_80", "sm_89", "sm_90")  # A100; RTX 4090, L4; H100, H200
HOPPER_PTX_VERSION = "+ptx80,+ptx78"  # `HOPPER` is known from CUDA 12.0 on
FP8_PTX_VERSION = "+ptx84,+ptx78"  # products of f8e4m3 are, from CUDA 12.4 on


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
        for kernel in kernels:
            _refuse(kernel, name)
    text = llvm_module(kernels)
    requests = [
        CompileRequest(text, TRIPLE, name, version, name=f"grid {name}", emit="assembly")
        for name in architectures
        for version in (_ptx_version(kernels, name),)
    ]
    return dict(zip(architectures, (made.decode() for made in compile_many(requests, cache=cache)), strict=True))


def _ptx_version(kernels: Sequence[GridKernel], architecture: str) -> str:
    if any(map(multiplies_fp8, kernels)):
        return FP8_PTX_VERSION
    return HOPPER_PTX_VERSION if architecture == HOPPER else PTX_VERSION


def runs_on(kernel: GridKernel, architecture: str) -> bool:
    """Whether an architecture has all instructions of a kernel."""
    return architecture in _needs(kernel)


def _needs(kernel: GridKernel) -> tuple[str, ...]:
    """The architectures that run a kernel."""
    if for_hopper(kernel):
        return (HOPPER,)
    return ("sm_89", "sm_90", HOPPER) if multiplies_fp8(kernel) else (*ARCHITECTURES, HOPPER)


def _refuse(kernel: GridKernel, architecture: str) -> None:
    if not runs_on(kernel, architecture):
        message = f"@{kernel.name} has instructions that {architecture} lacks"
        expected = " or ".join(_needs(kernel))
        raise DiagnosticError(message, expected=expected, hint="activations in bf16 run on all (recipe fp8)")
