"""Single kernels as native code: many in one LLVM module, called by name with arrays and sizes.

with native_kernels([scale, add], target) as kernels:
    kernels.run("scale", x, y, 16, threads=2)
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from codegen.compile_worker import CompileRequest, compile_many
from codegen.llvm.instructions import InstructionSet
from codegen.llvm.lower_kernel import lower_kernel
from codegen.llvm.team import team_text
from codegen.object_cache import ObjectCache
from ir import verify
from ir.ops.builtin import FuncOp
from ir.types import BufferType
from runtime.native import NativeCode
from runtime.team import WorkerTeam
from tests.codegen.harness import MachineTarget, opt_level


def library_text(kernels: Sequence[FuncOp], target: MachineTarget) -> str:
    """LLVM IR of the kernels, each with an entry `run_NAME(words, tid)`: words are its arguments, threads, team."""
    declarations: dict[str, str] = {}
    instructions = InstructionSet(target.llvm_features)
    bodies = [lower_kernel(kernel, instructions, declarations, "#0") for kernel in kernels]
    entries = [_entry(kernel) for kernel in kernels]
    width = '"prefer-vector-width"="512" ' if "avx512f" in target.llvm_features else ""
    features = target.feature_string()
    attributes = f'nounwind {width}"target-cpu"="{target.llvm_cpu}" "target-features"="{features}"'
    group = f"attributes #0 = {{ {attributes} }}"
    return "\n".join([*sorted(declarations.values()), team_text(target.llvm_triple), *bodies, *entries, group, ""])


def _entry(kernel: FuncOp) -> str:
    lines, passed = [], []
    types = ["ptr" if isinstance(a.type, BufferType) else "i64" for a in kernel.arguments]
    for i, type in enumerate([*types, "i64", "ptr"]):
        lines.append(f"  %p{i} = getelementptr i64, ptr %words, i64 {i}")
        lines.append(f"  %w{i} = load {type}, ptr %p{i}, align 8")
        passed.append(f"{type} %w{i}")
    passed.insert(len(types), "i64 %tid")
    call = f"  call void @{kernel.sym_name}({', '.join(passed)})"
    threads, team = len(types), len(types) + 1
    wait = f"  call void @stratum_barrier(ptr %w{team}, i64 %w{threads})"  # the caller returns when all have finished
    body = "\n".join([*lines, call, wait, "  ret i64 0"])
    return f"define i64 @run_{kernel.sym_name}(ptr %words, i64 %tid) #0 {{\n{body}\n}}\n"


class NativeKernels:
    """Loaded kernels. `run` changes the arrays of buffers in place."""

    def __init__(self, libraries: Sequence[NativeCode]) -> None:
        self.libraries = libraries
        self.teams: dict[tuple[NativeCode, int], WorkerTeam] = {}
        self.homes = {symbol: code for code in libraries for symbol in code.functions}

    def run(self, name: str, *arguments: np.ndarray | int, threads: int = 1) -> None:
        symbol = f"run_{name}"
        code = self.homes[symbol]
        team = self.teams.get((code, threads))
        if team is None:
            team = self.teams[code, threads] = WorkerTeam(code, threads)
        words = [a.ctypes.data if isinstance(a, np.ndarray) else a for a in arguments]
        buffer = (ctypes.c_int64 * (len(words) + 2))(*words, threads, team.address)
        assert team.run(code.functions[symbol], ctypes.addressof(buffer)) == 0

    def close(self) -> None:
        assert all(team.close() for team in self.teams.values())
        for code in self.libraries:
            code.close()


@contextmanager
def native_kernels(
    kernels: Sequence[FuncOp], target: MachineTarget, *, optimize_every: int = 1
) -> Iterator[NativeKernels]:
    """Verifies, compiles and loads kernels. Every so many-th, the first among them, is optimized as builds are.

    Optimizing is nine tenths of compiling. What it might break (wrong flags on instructions) shows in any kernel of a
    kind, so sweeps over many formats optimize some of them.
    """
    for kernel in kernels:
        verify(kernel)
    plain = [kernel for number, kernel in enumerate(kernels) if number % optimize_every]
    groups = [(opt_level(True), kernels[::optimize_every]), *([(opt_level(False), plain)] if plain else [])]
    cpu, features = target.llvm_cpu, target.feature_string()
    requests = [
        CompileRequest(library_text(group, target), target.llvm_triple, cpu, features, level, "kernels")
        for level, group in groups
    ]
    # Hundreds of kernels in one module take half a minute alone, and minutes on a machine that is busy otherwise.
    codes = compile_many(requests, cache=ObjectCache(), timeout_seconds=900)
    loaded = NativeKernels(
        [
            NativeCode(code, [f"run_{kernel.sym_name}" for kernel in group], where="test kernels")
            for code, (_, group) in zip(codes, groups, strict=True)
        ]
    )
    try:
        yield loaded
    finally:
        loaded.close()
