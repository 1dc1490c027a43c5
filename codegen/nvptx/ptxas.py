"""PTX -> machine code by NVIDIA's assembler, and what it says of each kernel: registers, spills, shared memory.

The assembler comes with the package `nvidia-cuda-nvcc` (extra `cuda-tools`) or a CUDA toolkit; it needs no GPU. Without
it the driver assembles PTX when it is loaded.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from ir.diagnostics import Diagnostic, DiagnosticError

_SECONDS = 300.0


@dataclass(frozen=True)
class Resources:
    """What one kernel takes: 32-bit registers of a thread, bytes spilled by a thread, shared bytes of a block."""

    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int


@dataclass(frozen=True)
class Assembled:
    """Machine code (a cubin), the resources of its kernels by name, and what the assembler said."""

    cubin: bytes
    resources: dict[str, Resources]
    report: str = ""


def find_ptxas() -> Path | None:
    """The assembler: of the installed package, else on the path, else None."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for path in sorted(Path(folder).glob("*/bin/ptxas")):
            if os.access(path, os.X_OK):
                return path
    found = shutil.which("ptxas")
    return Path(found) if found else None


def assemble(ptx: str, architecture: str, ptxas: Path | None = None) -> Assembled:
    """Machine code for one architecture. Raises DiagnosticError without an assembler, or with what it objects to."""
    program = ptxas or find_ptxas()
    if program is None:
        raise DiagnosticError(
            "there is no ptxas to assemble PTX with",
            hint="pip install 'stratum[cuda-tools]', or leave it to the driver",
        )
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "kernels.ptx"), Path(folder, "kernels.cubin")
        source.write_text(ptx, encoding="ascii")
        command = [str(program), "-v", "-O3", f"-arch={architecture}", str(source), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
        if done.returncode:
            said = [line for line in (done.stderr + done.stdout).splitlines() if line.strip()][:6]
            notes = tuple(Diagnostic("note", line.strip()) for line in said)
            raise DiagnosticError.of(Diagnostic("error", f"ptxas refused the PTX for {architecture}", notes=notes))
        report = done.stderr + done.stdout
        return Assembled(target.read_bytes(), read_resources(report), report)


_ENTRY = re.compile(r"Compiling entry function '([^']+)'")
_FRAME = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers(?:.*?(\d+) bytes smem)?")


def read_resources(report: str) -> dict[str, Resources]:
    """Kernel -> resources, from what `ptxas -v` prints."""
    found: dict[str, Resources] = {}
    name, frame = "", (0, 0)
    for line in report.splitlines():
        if entry := _ENTRY.search(line):
            name, frame = entry[1], (0, 0)
        elif stack := _FRAME.search(line):
            frame = int(stack[1]), int(stack[2]) + int(stack[3])
        elif name and (used := _USED.search(line)):
            found[name] = Resources(int(used[1]), frame[1], frame[0], int(used[2] or 0))
    return found
