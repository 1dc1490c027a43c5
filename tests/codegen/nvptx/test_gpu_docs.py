"""docs/gpu.md says what is there: its files, its table of kernels, its example."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from codegen.nvptx.builder import GridBuilder, GridKernel
from codegen.nvptx.lowering import MAX_SHARED_BYTES, STATIC_SHARED_BYTES, shared_bytes
from ir.formats import F32
from ir.grid_interpreter import interpret_grid
from tests.codegen.nvptx.kernel_list import fp8_kernels, hopper_kernels, kernels

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")


def test_files_and_links_are_there() -> None:
    for target in re.findall(r"\]\(([\w/.-]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:codegen|tests|ir|bench)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists(), path


def test_the_table_of_kernels() -> None:
    rows = re.findall(r"^\| `(\w+)` \| \d+ \| 0 \| (\d+) \|$", PAGE, re.MULTILINE)
    assert [(k.name, str(shared_bytes(k))) for k in (*kernels(), *hopper_kernels(), *fp8_kernels())] == rows
    assert f"Up to {STATIC_SHARED_BYTES >> 10} KiB" in PAGE and f"up to {MAX_SHARED_BYTES >> 10} KiB" in PAGE


def test_the_example_runs() -> None:
    names: dict[str, object] = {"GridBuilder": GridBuilder, "F32": F32}
    exec(PAGE.split("```python\n")[1].split("```")[0], names)  # the page's own code
    kernel = names["kernel"]
    assert isinstance(kernel, GridKernel)
    x, y = np.arange(300, dtype=np.float32), np.zeros(300, np.float32)
    interpret_grid(kernel.func, [x, y, 300], blocks=2, threads=kernel.threads)
    np.testing.assert_array_equal(y, 2 * x)
