"""docs/gpu.md names every op that occurs in the lowered steps of the families, and says which kernel takes it."""

from __future__ import annotations

import re
from pathlib import Path

from frontends.huggingface import import_model
from ir.core import Op
from ir.ops.builtin import ModuleOp
from ir.ops.fused import FusedOp
from passes.pass_manager import PassManager
from passes.pipelines import gpu_pipeline
from tests.goldens import GOLDEN_CASES, GOLDENS

PAGE = Path(__file__).parents[3] / "docs" / "gpu.md"


def ops_of(step: Op) -> set[str]:
    """Names of ops, those inside of regions for the regions."""
    found: set[str] = set()
    for op in step.region.block.ops[:-1]:
        found |= {o.name for o in op.body.block.ops[:-1]} if isinstance(op, FusedOp) else {op.name}
    return found


def test_every_op_of_the_families_has_a_row() -> None:
    section = PAGE.read_text(encoding="utf-8").split("## What a step is made of")[1].split("\n## ")[0]
    named = set(re.findall(r"`([a-z]+\.[a-z_]+)`", section))
    met: set[str] = set()
    for number, family in enumerate(sorted(GOLDEN_CASES)):
        recipe = ("w4a16-g32", "kv8") if number % 2 else ()
        imported = import_model(GOLDENS / family)
        module: ModuleOp = imported.module
        PassManager(gpu_pipeline(recipe=recipe)).run(module)
        met |= ops_of(module.function("step"))
        imported.checkpoint.close()
    assert met == named
