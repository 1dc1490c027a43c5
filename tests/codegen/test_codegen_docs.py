"""docs/codegen.md says what the code does: the table of instructions, the words of the step, the files, the example."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from codegen.compile_step import DECODE_TOKENS, PREFILL_TOKENS
from codegen.llvm.instructions import describe
from codegen.llvm.step import _INPUT_WORDS, _SIZE_WORDS
from codegen.llvm.team import BARRIER_SECONDS
from codegen.tile_builder import KernelBuilder
from ir.formats import F32
from ir.tile_interpreter import interpret_kernel

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "codegen.md").read_text(encoding="utf-8")


def test_the_table_of_instructions_is_current() -> None:
    assert describe() in PAGE, "put codegen.llvm.instructions.describe() into docs/codegen.md"


def test_the_words_of_the_step() -> None:
    rows = re.findall(r"\| (\d+) \| (\w+)[^|]* \| (\d+) \| (\w+)", PAGE)
    words = {int(n): name for first, a, second, b in rows for n, name in ((first, a), (second, b))}
    assert sorted(words) == list(range(18))
    for name, number in (_INPUT_WORDS | _SIZE_WORDS).items():
        assert words[number] == name
    assert f"at most {DECODE_TOKENS} tokens" in PAGE and f"at most {PREFILL_TOKENS}" in PAGE
    assert f"after {BARRIER_SECONDS} seconds" in PAGE


def test_files_and_links_are_there() -> None:
    for kernel in (ROOT / "codegen" / "kernels").glob("*.py"):
        assert kernel.name == "__init__.py" or kernel.name in PAGE
    for target in re.findall(r"\]\(([\w/.-]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
    for path in re.findall(r"`((?:codegen|passes|tests|ir)/[\w/]+\.py)`", PAGE):
        assert (ROOT / path).exists(), path


def test_the_example_runs() -> None:
    example = PAGE.split("```python\n")[1].split("```")[0]
    names: dict[str, object] = {"KernelBuilder": KernelBuilder, "F32": F32}
    exec(example, names)  # the page's own code
    x, y = np.arange(37, dtype=np.float32), np.zeros(37, np.float32)
    interpret_kernel(names["kernel"], [x, y, 37], threads=3)  # type: ignore[arg-type]
    np.testing.assert_array_equal(y, 2 * x)
