"""The compiler's own speed on a 22-layer llama step: import, verify, print, parse, pipeline. Prints markdown.

python -m bench.compiler CHECKPOINT_DIR
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import ir
from bench.measure import machine, median, table
from frontends.huggingface import import_model
from passes.pass_manager import PassManager
from passes.pipelines import cpu_pipeline

RUNS = 5


def milliseconds(action: Callable[[], object]) -> float:
    """Median of some runs."""
    seconds = []
    for _ in range(RUNS):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return 1000 * median(seconds)


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    directory = Path(sys.argv[1])
    module = import_model(directory).module
    text = ir.print_module(module)
    ops = sum(1 for _ in module.walk())
    rows = [
        ("import (config, headers, graph)", milliseconds(lambda: import_model(directory).checkpoint.close())),
        ("verify", milliseconds(lambda: ir.verify(module))),
        ("print", milliseconds(lambda: ir.print_module(module))),
        ("parse", milliseconds(lambda: ir.parse(text))),
        ("pipeline, verified after each pass", milliseconds(lambda: PassManager(cpu_pipeline()).run(ir.parse(text)))),
    ]
    print(f"{machine()}, {ops} ops, {len(text) // 1024} KiB of text\n")
    print(table(["what", "median ms"], [(name, f"{ms:.1f}") for name, ms in rows]))


if __name__ == "__main__":
    main()
