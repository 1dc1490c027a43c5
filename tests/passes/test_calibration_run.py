"""The step run weight by weight: what the interpreter computes, what the hook is told, what it may replace."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from frontends.huggingface import ImportedModel, import_model
from ir.interpreter import interpret, zero_states
from passes.quantize.calibrate.executor import LayerwiseForward, Product
from tests.frontends.model_files import FAMILIES, config_of, random_tensors, write_model

COUNT, LENGTH = 2, 11


def imported_model(directory: Path, family: str) -> ImportedModel:
    config = config_of(family)
    return import_model(write_model(directory, config, random_tensors(config)))


def sequences(vocab: int = 40) -> np.ndarray:
    return np.random.default_rng(3).integers(0, vocab, (COUNT, LENGTH)).astype(np.int32)


def forward_of(imported: ImportedModel) -> LayerwiseForward:
    roles = {name: spec.role for name, spec in imported.weights.items()}
    return LayerwiseForward(imported.module.function("step"), imported.checkpoint.read, sequences(), roles)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_logits_are_those_of_the_interpreter(family: str, tmp_path: Path) -> None:
    imported = imported_model(tmp_path / "model", family)
    with imported.checkpoint as checkpoint:
        step = imported.module.function("step")
        places = np.arange(LENGTH, dtype=np.int32)
        inputs = [
            sequences().reshape(-1),
            np.tile(places, COUNT),
            np.repeat(np.arange(COUNT, dtype=np.int32), LENGTH),
            np.arange(COUNT * LENGTH, dtype=np.int32),
        ]
        (wanted,) = interpret(step, inputs, weights=checkpoint.read, states=zero_states(step, COUNT, LENGTH))
        found = forward_of(imported).run()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-4 * np.abs(wanted).max())


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "olmoe"])
def test_every_weight_of_a_product_is_offered_once_with_its_rows(family: str, tmp_path: Path) -> None:
    imported = imported_model(tmp_path / "model", family)
    seen: list[Product] = []
    with imported.checkpoint as checkpoint:
        forward_of(imported).run_products(seen.append)
        wanted = [n for n, s in imported.weights.items() if len(s.shape) == 2 and s.role != "embedding"]
        assert sorted(p.name for p in seen) == sorted(wanted)
        for product in seen:
            w = product.read()
            assert w.dtype == np.float32
            assert np.array_equal(w, checkpoint.read(product.name).astype(np.float32))
            assert product.x.shape[1] == w.shape[1]
        inputs = {p.name.split("self_attn.")[1]: p.source for p in seen if "layers.0.self_attn" in p.name}
        assert inputs["q_proj.weight"] is inputs["k_proj.weight"] is inputs["v_proj.weight"]
        assert inputs["o_proj.weight"] is not inputs["q_proj.weight"]
        experts = [p for p in seen if p.expert is not None and "layers.0" in p.name and "up_proj" in p.name]
        if experts:
            assert sum(len(p.x) for p in experts) == 2 * COUNT * LENGTH  # two experts a token
            for product in experts:  # rows of an expert are rows of all tokens
                assert product.shared is not None
                assert {row.tobytes() for row in product.x} <= {row.tobytes() for row in product.shared}


def test_what_the_hook_returns_is_gone_on_with(tmp_path: Path) -> None:
    imported = imported_model(tmp_path / "model", "qwen3_moe")
    with imported.checkpoint as checkpoint:
        forward = forward_of(imported)
        plain = forward.run()
        forward.hook = lambda product: 0 * product.read() if product.role.endswith((".o", ".down")) else None
        found = forward.run()
        assert not np.allclose(found, plain)
        # without attention and experts the residual stream is the embedding
        table = checkpoint.read("model.embed_tokens.weight").astype(np.float64)[sequences().reshape(-1)]
        gain = checkpoint.read("model.norm.weight").astype(np.float64)
        normed = table / np.sqrt((table**2).mean(axis=-1, keepdims=True) + imported.config.norm_eps) * gain
        wanted = normed @ checkpoint.read("lm_head.weight").astype(np.float64).T
        np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())
