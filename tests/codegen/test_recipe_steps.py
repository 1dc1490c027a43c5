"""Whole steps in low-bit formats, compiled, against the meaning of the same graph: weights, rotations, outlier columns,
experts of one layer in two formats.

What is compared is the graph after the passes, so that only the kernels' own roundings differ: sums in another order,
and once in a while an activation that lies between two int8 codes.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from codegen.build_pipeline import default_pipeline
from codegen.compile_step import compile_step
from codegen.object_cache import ObjectCache
from ir import interpret
from passes.pass_manager import PassManager
from tests.codegen.harness import CTX, SLOTS, Batch, host_target, opt_level, running
from tests.codegen.models import Shape, build_model

NEAR = 2e-2  # of the largest logit: some activations one int8 code apart
SHAPE = Shape(hidden=64, ffn=96, vocab=37, experts=4, top_k=2, q_heads=2, kv_heads=1, dim=32, bias=True)
RULES = """
[[rule]]
role = "attention"
outliers = 16
[[rule]]
role = "experts"
format = "q5_sym<group=32, scale=f16>"
rotate = 32
[[rule]]
experts = "1,3"
format = "float"
"""


def batch(count: int, slot: int = 0, start: int = 0) -> Batch:
    """`count` tokens of a slot, logits of all."""
    ids = np.random.default_rng([start, slot]).integers(0, 36, count)
    at = np.arange(start, start + count)
    return Batch(
        ids.astype(np.int32), at.astype(np.int32), np.full(count, slot, np.int32), np.arange(count, dtype=np.int32)
    )


@pytest.mark.slow
def test_compiled_steps_mean_what_their_graphs_mean(tmp_path: Path) -> None:
    path = tmp_path / "rules.toml"
    path.write_text(RULES)
    target = host_target(())
    model = build_model(SHAPE, seed=3)
    PassManager(default_pipeline(target, "f32", ("w8a8", str(path)))).run(model.module)
    names = {op.name for op in model.module.walk()}
    assert "moe.join_rows" in names  # experts in two formats
    assert names >= {"quant.rotate", "quant.outlier_columns", "quant.select_columns", "quant.clear_columns"}
    step = compile_step(model.step, target, cache=ObjectCache(), opt_level=opt_level(False))
    states = model.states(SLOTS, CTX)
    with running(step, model, 2) as runner:
        for one, program in ((batch(7), "prefill"), (batch(1, 0, 7), "decode"), (batch(2, 1), "decode")):
            (want,) = interpret(model.step, one.arrays, weights=model.weights, states=states)
            got = runner.native(one, program)
            assert np.abs(got - want).max() <= NEAR * np.abs(want).max()
