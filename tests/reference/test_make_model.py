"""transformers loads what examples/make_model.py writes, without a missing or unexpected tensor."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from examples.make_model import write_model
from examples.model_presets import FAMILIES


@pytest.mark.parametrize("style", ["v4", "v5"])
@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_it_without_missing_or_unexpected_tensors(family: str, style: str, tmp_path: Path) -> None:
    scaling = {"rope_type": "linear", "factor": 2.0}
    overrides = {"rope_theta": 5000.0, "rope_scaling": scaling}
    write_model(f"tiny-{family}", tmp_path, config_style=style, overrides=overrides)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.rope_parameters["rope_theta"] == 5000.0
    assert model.config.rope_parameters["factor"] == 2.0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        logits = model(ids).logits
    assert 0.3 < float(logits.std()) < 30  # neither flat nor exploded
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<s>user\nhi</s>\n"


def test_biases_and_dense_layers_load_in_transformers(tmp_path: Path) -> None:
    for name, family, overrides in (
        ("a", "llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
        ("b", "qwen3_moe", {"mlp_only_layers": [0], "attention_bias": True, "tie_word_embeddings": True}),
        ("c", "qwen2", {"tie_word_embeddings": False, "head_dim": 32}),
    ):
        write_model(family, tmp_path / name, overrides=overrides)
        _, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
