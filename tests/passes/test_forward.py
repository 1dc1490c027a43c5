"""The float32 run of a whole batch: what the interpreter computes, and products that are answered differently."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frontends.huggingface import import_model
from ir.interpreter import interpret, zero_states
from passes.quantize.forward import Forward, constant_value
from passes.quantize.weight_groups import joined_products
from tests.stratum.tiny_model import LLAMA, QWEN3_MOE, VOCAB, write_model

MISTRAL: dict[str, Any] = {
    **LLAMA, "architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 5
}  # fmt: skip


def sequences(count: int, length: int) -> np.ndarray:
    return np.random.default_rng(3).integers(0, VOCAB, (count, length)).astype(np.int32)


@pytest.mark.parametrize("config", [LLAMA, QWEN3_MOE, MISTRAL], ids=["llama", "moe", "window"])
def test_logits_are_those_of_the_interpreter(config: dict[str, Any], tmp_path: Path) -> None:
    imported = import_model(write_model(tmp_path / "model", config))
    tokens = sequences(3, 11)
    with imported.checkpoint as checkpoint:
        step = imported.module.function("step")
        ids = tokens.reshape(-1)
        positions, slots = np.tile(np.arange(11, dtype=np.int32), 3), np.repeat(np.arange(3, dtype=np.int32), 11)
        rows = np.arange(33, dtype=np.int32)
        states = zero_states(step, 3, 11)
        wanted = interpret(step, [ids, positions, slots, rows], weights=checkpoint.read, states=states)[0]
        func, products = joined_products(imported.module, {n: s.role for n, s in imported.weights.items()})
        forward = Forward(func, checkpoint.read, tokens)
        np.testing.assert_allclose(forward.run(), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
        thinned = Forward(func, checkpoint.read, tokens, row_step=4).run()
        np.testing.assert_allclose(thinned, wanted[3::4], rtol=0, atol=2e-4 * np.abs(wanted).max())

        visited = []
        for visit in forward.products():
            visited.append(visit.op)
            y = visit.factors.product()
            assert np.array_equal(visit.factors.w, constant_value(visit.op.w, checkpoint.read))
            np.testing.assert_allclose(visit.logits_with(y), wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())
        assert [op for op in visited if op in dict(products)] == [op for op, _ in products]

        last = products[-1][0]
        doubled = forward.run(lambda op, factors: 2 * factors.product() if op is last else None)
        np.testing.assert_allclose(doubled, 2 * forward.run(), rtol=1e-6)  # the last product gives the logits
