"""The code of a step for GPUs, and what an artifact says of it.

PTX for each architecture, which a driver assembles when it is loaded; and machine code where NVIDIA's assembler is at
hand. Neither needs a GPU. Text and machine code depend on the kernels and the versions of LLVM and ptxas only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from codegen.compile_worker import CODEGEN_VERSION
from codegen.nvptx.compile import ARCHITECTURES, TRIPLE, compile_ptx_for, runs_on
from codegen.nvptx.host.attention import LEVELS
from codegen.nvptx.host.objects import object_path
from codegen.nvptx.launches import GridOptions
from codegen.nvptx.lower_to_grid import LoweredGridStep
from codegen.nvptx.lowering import HOPPER
from codegen.nvptx.program_entry import gpu_entry, kv_entry, programs_entry
from codegen.nvptx.ptxas import assemble, find_ptxas
from codegen.object_cache import ObjectCache, content_key
from hw_targets.target import Target
from ir.diagnostics import DiagnosticError

ANY = "cuda"  # the target that stands for every GPU there are kernels for


def gpu_architectures(target: Any) -> tuple[str, ...]:
    """The architectures to build for: () for a CPU, all for the target `cuda`, else the newest that its GPU runs: for
    one of sm_90a (`cuda-sm90a`, and machines with one) that one, with instructions that no other has.

    A machine is a GPU's where its first unit is one of NVIDIA or AMD. Raises DiagnosticError for AMD's, on which
    nothing runs kernels, and for those older than the kernels.
    """
    first = target.units[0] if isinstance(target, Target) and target.units else None
    if target.llvm_triple == TRIPLE:
        return (HOPPER,) if first is not None and first.arch == HOPPER else ARCHITECTURES
    if first is None or first.kind != "gpu" or not first.arch.startswith(("sm_", "gfx")):
        return ()
    if first.arch == HOPPER:
        return (HOPPER,)
    nvidia = first.arch.startswith("sm_")
    known = [name for name in ARCHITECTURES if nvidia and _number(name) <= _number(first.arch)]
    if not known:
        raise DiagnosticError(
            f"no model can be built for the GPU of {target.name} ({first.arch})",
            expected=f"an NVIDIA GPU of {ARCHITECTURES[0]} or newer",
            hint="build for the CPU beside it: --target x86-64-v3",
        )
    return (known[-1],)


def grid_options(target: Any) -> GridOptions:
    """What a build for a target with `gpu_architectures` chooses."""
    options = GridOptions(hopper=gpu_architectures(target) == (HOPPER,))
    first = target.units[0] if isinstance(target, Target) and target.units else None
    return replace(options, multiprocessors=first.multiprocessors) if first and first.multiprocessors else options


def _number(architecture: str) -> int:
    return int(architecture.removeprefix("sm_").rstrip("af"))


@dataclass(frozen=True)
class GpuCode:
    """A lowered step with its code by architecture; `cubins` has those that were assembled, `host` the objects of
    experts, `attention` those of attention, by instruction set of the CPU."""

    lowered: LoweredGridStep
    ptx: dict[str, str]
    cubins: dict[str, bytes]
    host: dict[str, bytes]
    attention: dict[str, bytes]

    def files(self) -> dict[str, str | bytes]:
        """Path in the artifact -> content."""
        made: dict[str, str | bytes] = {f"code/{name}.ptx": text for name, text in self.ptx.items()}
        made |= {f"code/{name}.cubin": data for name, data in self.cubins.items()}
        made |= {object_path("experts", level): data for level, data in self.host.items()}
        return made | {object_path("attention", level): data for level, data in self.attention.items()}

    def entries(self) -> dict[str, Any]:
        """What the manifest says of code, programs and cache."""
        code = [
            {
                "architecture": name,
                "ptx": f"code/{name}.ptx",
                "cubin": f"code/{name}.cubin" if name in self.cubins else "",
            }
            for name in self.ptx
        ]
        return {
            "gpu": gpu_entry(self.lowered, code, tuple(self.host), tuple(self.attention)),
            "programs": programs_entry(self.lowered),
            "kv": kv_entry(self.lowered),
        }


def compile_gpu_step(
    lowered: LoweredGridStep, architectures: Sequence[str], cache: ObjectCache | None = None
) -> GpuCode:
    """PTX of all kernels for each architecture that runs them, machine code where there is ptxas.

    Raises DiagnosticError where none of these architectures does.
    """
    runs = [name for name in architectures if all(runs_on(kernel, name) for kernel in lowered.kernels)]
    ptx = compile_ptx_for(lowered.kernels, runs or architectures, cache)
    program = find_ptxas()
    cubins = {} if program is None else {name: _cubin(text, name, program, cache) for name, text in ptx.items()}
    return GpuCode(lowered, ptx, cubins, lowered.host.objects(cache), lowered.attention.objects(cache, LEVELS))


def _cubin(ptx: str, architecture: str, program: Path, cache: ObjectCache | None) -> bytes:
    key = content_key(["cubin", str(CODEGEN_VERSION), _version(program), architecture, ptx])
    found = cache.get(key) if cache else None
    if found is None:
        found = assemble(ptx, architecture, program).cubin
        if cache:
            cache.put(key, found)
    return found


def _version(program: Path) -> str:
    """What tells two assemblers apart without running them."""
    status = program.stat()
    return f"{program} {status.st_size} {status.st_mtime_ns}"
