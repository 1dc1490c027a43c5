"""What becomes of each kernel on gfx942, for docs/gpu.md. `python -m tests.codegen.nvptx.amd_table` prints the rows."""

from __future__ import annotations

from codegen.amdgpu.lowering import launch_threads, lower_amd_kernel
from ir.diagnostics import DiagnosticError
from tests.codegen.nvptx.kernel_list import kernels


def amd_rows() -> list[str]:
    """A row for each kernel: threads of a block at the launch, and "object" or why there is none."""
    rows = []
    for kernel in kernels():
        try:
            lower_amd_kernel(kernel, {})
            outcome = "object"
        except DiagnosticError as refused:
            outcome = "refused: " + str(refused).splitlines()[0].replace(f"error: @{kernel.name} ", "")
        rows.append(f"| `{kernel.name}` | {launch_threads(kernel)} | {outcome} |")
    return rows


if __name__ == "__main__":
    print("\n".join(amd_rows()))
