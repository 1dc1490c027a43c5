"""The imported graph, run by the interpreter, equals transformers in float32 on random tiny models.

Also the rotary frequencies. Needs torch and transformers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import ir
from frontends.config_reader import ConfigReader
from frontends.huggingface import import_model
from frontends.rope_config import read_rope
from ir.interpreter import zero_states
from tests.reference.tiny_models import CASES, LINEAR, LLAMA3, SMALL, YARN, save_model


@pytest.mark.parametrize(("family", "changes", "dtype"), CASES)
def test_logits_equal_transformers(family: str, changes: dict[str, Any], dtype: str, tmp_path: Path) -> None:
    import torch

    model = save_model(family, changes, dtype, tmp_path)
    ids = np.random.default_rng(3).integers(0, SMALL["vocab_size"], 14).astype(np.int32)
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids.astype(np.int64))[None]).logits[0].numpy()

    imported = import_model(tmp_path)
    ir.verify(imported.module)
    assert not imported.warnings
    func = imported.module.function("step")
    states = zero_states(func, slots=2, ctx=16)
    got = []
    # a chunk of nine in slot 1, then single tokens: the windows are crossed in both
    for first, last in ((0, 9), *((i, i + 1) for i in range(9, 14))):
        positions = np.arange(first, last, dtype=np.int32)
        rows = np.arange(last - first, dtype=np.int32)
        inputs = [ids[first:last], positions, np.ones_like(rows), rows]
        (logits,) = ir.interpret(func, inputs, weights=imported.checkpoint.read, states=states)
        got.append(logits)
    imported.checkpoint.close()
    error = np.abs(np.concatenate(got) - wanted).max() / np.abs(wanted).max()
    assert error < 2e-5
    assert np.array_equal(np.concatenate(got).argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default", "rope_theta": 500000.0},
        LINEAR,
        LLAMA3,
        {**LLAMA3, "original_max_position_embeddings": 8192, "factor": 32.0, "rope_theta": 500000.0},
        YARN,
        {**YARN, "truncate": False, "beta_fast": 24.0, "beta_slow": 2.0},
        {**YARN, "attention_factor": 0.75},
        {**YARN, "mscale": 1.0, "mscale_all_dim": 0.5, "factor": 40.0, "original_max_position_embeddings": 4096},
        {**YARN, "factor": 0.5},
        {"rope_type": "yarn", "factor": 16.0, "rope_theta": 10000.0},
    ],
)
@pytest.mark.parametrize("head_dim", [8, 64, 128])
def test_rotary_frequencies_equal_transformers(parameters: dict[str, Any], head_dim: int) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    sizes = {**SMALL, "head_dim": head_dim, "max_position_embeddings": 131072}
    embedding = LlamaRotaryEmbedding(LlamaConfig(**sizes, rope_parameters=dict(parameters)))
    fields = ConfigReader({"rope_parameters": parameters}, "config.json")
    rope = read_rope(fields, head_dim, 131072, default_theta=10000.0)
    assert rope.inverse_frequencies() == pytest.approx(embedding.inv_freq.numpy().astype(np.float64), rel=2e-6)
    assert rope.attention_factor == pytest.approx(embedding.attention_scaling)
